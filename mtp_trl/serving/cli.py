"""`mtp-trl serve`: its options. Imports of torch and the like stay inside, so that --help is instant."""

from __future__ import annotations

import argparse

from ..argument_types import Command, threshold


def declare_serve(parser: argparse.ArgumentParser) -> Command:
    """Serve an adapted model with vLLM's OpenAI server, several tokens per forward pass."""
    parser.add_argument("model", help="folder or Hub id of an adapted model")
    parser.add_argument(
        "--confadapt", type=threshold, metavar="T", help="threshold, or T/T/... by place (default: the model's)"
    )
    parser.add_argument("--k", type=int, metavar="K", help="largest block (default: the model's)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="return exactly the model's own text (default: the model's, else yes)",
    )
    parser.add_argument("--adapter", metavar="REPO", help="exact mode: an adapter published alone, for the base named as model")
    parser.add_argument("--fixed-width", action="store_true", help="draft as many tokens in every pass (full CUDA graphs)")
    parser.epilog = "Any other option is vLLM's: --port 8001 --max-model-len 4096. A request may carry its own values."
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
