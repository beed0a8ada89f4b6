"""`mtp-trl push`, `export` and `check-decoder`: their options. Imports of torch and the like stay inside."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..argument_types import Command


def declare_push(parser: argparse.ArgumentParser) -> Command:
    """Upload an adapted model to the Hub in one commit, with its decoder, defaults, provenance and card."""
    parser.add_argument("folder", type=Path, help="where a run saved its model, or one of its checkpoints")
    parser.add_argument("repository", help="you/name; made if it is not there")
    _publishing_options(parser)
    parser.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    parser.add_argument("--revision", metavar="BRANCH", help="a branch (default: main)")
    parser.add_argument("--message", default="Upload model", help="of the commit")

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
    """Write what `push` would upload into a new folder."""
    parser.add_argument("folder", type=Path, help="where a run saved its model, or one of its checkpoints")
    parser.add_argument("output", type=Path, help="the folder to make")
    _publishing_options(parser)
    parser.add_argument("--repository", metavar="NAME", help="what the card tells readers to load")

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
        "--adapter-only", action="store_true", help="the adapter of exact mode, or the LoRA, without the base's weights"
    )
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="FILE", help="results.json of `mtp-trl eval`, for the card"
    )


def declare_check_decoder(parser: argparse.ArgumentParser) -> Command:
    """Say whether the code of a repository is a decoder of this package's, before anyone trusts it.

    Nothing of the repository is run. The exit status is 1 where other code would be.
    """
    parser.add_argument("repository", help="folder or Hub id")
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit (default: main)")

    def command(options: argparse.Namespace) -> int:
        from .decoder_check import check_decoder

        check = check_decoder(options.repository, options.revision)
        print(check.sentence)
        return 0 if check.is_safe else 1

    return command
