"""Options of `mtp-trl serve`. The command itself imports torch and vLLM, so that --help is fast."""

from __future__ import annotations

import argparse

from ..argument_types import Command, threshold


def declare_serve(parser: argparse.ArgumentParser) -> Command:
    """Serve an adapted model with vLLM's OpenAI server, several tokens per forward pass."""
    parser.add_argument("model", help="folder or Hub id of an adapted model")
    parser.add_argument(
        "--confadapt", type=threshold, metavar="T", help="threshold, or T/T/... by block position (default: the model's)"
    )
    parser.add_argument("--k", type=int, metavar="K", help="largest block (default: the model's)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="return exactly the text of one-token-at-a-time decoding (default: the model's setting, else yes)",
    )
    parser.add_argument(
        "--adapter", metavar="REPO", help="exact mode: repository with only an adapter, for the base model given as `model`"
    )
    parser.add_argument("--fixed-width", action="store_true", help="same number of tokens in every pass (for full CUDA graphs)")
    parser.epilog = (
        "All other options are passed to vLLM, for example --port 8001 --max-model-len 4096. "
        "A request can set its own confadapt, verify and mtp_k."
    )
    parser.set_defaults(overrides=[])

    def command(options: argparse.Namespace) -> int:
        from .vllm.serve import run_serve

        return run_serve(
            options.model,
            options.overrides,
            confadapt=options.confadapt,
            mtp_k=options.k,
            verify=options.verify,
            adapter=options.adapter,
            fixed_width=options.fixed_width or None,
        )

    return command
