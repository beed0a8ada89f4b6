"""Options of `mtp-trl demo`, `mtp-trl show` and `mtp-trl app`.

torch and other slow modules are imported inside functions, so that --help is instant.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..argument_types import (
    Command,
    block,
    check_gguf_option,
    gguf_option,
    new_file,
    positive,
    require,
    threshold,
    trust_option,
)


def declare_demo(parser: argparse.ArgumentParser) -> Command:
    """Adapt the bundled model, evaluate it and show one answer, in under 8 minutes on 2 CPU cores."""
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="recipes/tiny_exact.yaml (default), recipes/tiny.yaml or a similar recipe"
    )

    def command(options: argparse.Namespace) -> int:
        from .demo import RECIPE, run_demo

        run_demo(recipe=options.recipe or RECIPE)
        return 0

    return command


def declare_show(parser: argparse.ArgumentParser) -> Command:
    """Print the answer to a prompt, with a colour for each forward pass."""
    parser.add_argument("model", help="folder or Hub id of an adapted model")
    parser.add_argument("prompt", help="text to complete, without a chat template")
    parser.add_argument("--base", metavar="MODEL", help="base of an adapter-only repository (default: the one it names)")
    gguf_option(parser)
    parser.add_argument(
        "--confadapt", type=threshold, metavar="T", help="threshold, or T/T/... by position (default: the model's)"
    )
    parser.add_argument("--k", type=block, metavar="K", help="largest block size, or auto (default: the model's)")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="return exactly the model's single-token text (default: the model's setting)",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N")
    parser.add_argument("--html", type=new_file, metavar="FILE", help="also write the coloured answer to this file")
    trust_option(parser)

    def command(options: argparse.Namespace) -> int:
        check_gguf_option(options)
        from .show import run_show

        run_show(
            options.model,
            options.prompt,
            base=options.base,
            gguf_file=options.gguf_file,
            confadapt=options.confadapt,
            mtp_k=options.k,
            verify=options.verify,
            max_new_tokens=options.max_new_tokens,
            html_file=options.html,
            trust_remote_code=options.trust_remote_code,
        )
        return 0

    return command


def declare_app(parser: argparse.ArgumentParser) -> Command:
    """Serve a page that compares decoding in blocks with plain decoding, with the ratio of speeds (needs mtp-trl[app])."""
    parser.add_argument("model", help="folder or Hub id of an adapted model")
    parser.add_argument("--base", metavar="MODEL", help="base of an adapter-only repository (default: the one it names)")
    gguf_option(parser)
    parser.add_argument(
        "--port", type=int, metavar="N", help="port on the loopback interface (default: the first free one from 7860)"
    )
    trust_option(parser)

    def command(options: argparse.Namespace) -> int:
        check_gguf_option(options)
        require("gradio", "mtp-trl app", extra="app")
        from .app import run_app

        run_app(
            options.model,
            base=options.base,
            gguf_file=options.gguf_file,
            port=options.port,
            trust_remote_code=options.trust_remote_code,
        )
        return 0

    return command
