"""A plugin for unmodified vLLM: `--speculative-config '{"model": "mtp_trl.serving.vllm.proposer.MTPProposer", ...}'`.

The masks are draft tokens. A step feeds `[last token | drafts | masks]`; the drafts are verified, the masks give the next
block, and since a mask is never emitted vLLM's own rejection sampler drops them and their keys and values.
"""
