"""A plugin for unmodified vLLM: `--speculative-config '{"model": "mtp_trl.serving.vllm.proposer.MTPProposer", ...}'`.

vLLM treats the masks as draft tokens. A step feeds `[last token | drafts | masks]`, verifies the drafts and predicts the next
block at the masks. A mask is never emitted, so vLLM's own rejection sampler rejects the masks and frees their keys and values.
"""
