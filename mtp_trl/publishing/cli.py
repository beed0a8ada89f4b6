"""Options of `mtp-trl push`, `export` and `check-decoder`. Slow imports, such as torch, stay inside the commands."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..argument_types import Command


def declare_push(parser: argparse.ArgumentParser) -> Command:
    """Upload an adapted model to the Hub in one commit, with its decoder, decoding defaults, provenance and card."""
    parser.add_argument("folder", type=Path, help="output folder of a run, or one of its checkpoints")
    parser.add_argument("repository", help="you/name; created if it does not exist")
    _publishing_options(parser)
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to, created if it does not exist (default: main)")
    parser.add_argument("--message", default="Upload model", help="commit message (default: Upload model)")

    def command(options: argparse.Namespace) -> int:
        from .push import push

        commit = push(
            options.folder,
            options.repository,
            private=options.private,
            revision=options.revision,
            commit_message=options.message,
            adapter_only=options.adapter_only,
            results=options.results,
        )
        print(commit)
        return 0

    return command


def declare_export(parser: argparse.ArgumentParser) -> Command:
    """Write to a new folder the files that `push` would upload."""
    parser.add_argument("folder", type=Path, help="output folder of a run, or one of its checkpoints")
    parser.add_argument("output", type=Path, help="folder to create")
    _publishing_options(parser)
    parser.add_argument(
        "--repository", metavar="NAME", help="repository id that the card shows in its examples (default: the name of OUTPUT)"
    )

    def command(options: argparse.Namespace) -> int:
        from .export import export

        print(
            export(
                options.folder,
                options.output,
                repo_id=options.repository,
                adapter_only=options.adapter_only,
                results=options.results,
            )
        )
        return 0

    return command


def _publishing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter-only", action="store_true", help="publish only the exact-mode or LoRA adapter, without the base's weights"
    )
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="results.json files of `mtp-trl eval` to show in the card",
    )


def declare_check_decoder(parser: argparse.ArgumentParser) -> Command:
    """Check, without running it, whether the code in a repository is an unmodified mtp-trl decoder.

    The exit status is 1 if `trust_remote_code=True` would run any other code.
    """
    parser.add_argument("repository", help="local folder or Hub id")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit (default: main)")

    def command(options: argparse.Namespace) -> int:
        from .decoder_check import check_decoder

        check = check_decoder(options.repository, options.revision)
        print(check.sentence)
        return 0 if check.is_safe else 1

    return command
