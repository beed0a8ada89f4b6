"""The console script `mtp-trl`. Each subcommand is a function that declares its options and returns the function to run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from . import __version__
from .apps.cli import declare_app, declare_demo, declare_show
from .argument_types import Command, positive
from .evaluation.cli import declare_calibrate, declare_eval, declare_generate
from .publishing.cli import declare_check_decoder, declare_export, declare_push
from .serving.cli import declare_serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit status."""
    parser = argparse.ArgumentParser(prog="mtp-trl", description="Multi-token prediction by online self-distillation.")
    parser.add_argument("--version", action="version", version=f"mtp-trl {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    for name, declare in COMMANDS.items():
        description = (declare.__doc__ or "").strip()
        subparser = subparsers.add_parser(name, help=description.splitlines()[0], description=description, allow_abbrev=False)
        subparser.set_defaults(command=declare(subparser), parser=subparser)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(f"there is no command {arguments[0]!r}{_suggestion(arguments[0], COMMANDS)}; `mtp-trl --help` lists them")
    options, unknown = parser.parse_known_args(arguments)
    if "command" not in options:
        parser.print_help(sys.stderr)
        return 2
    if unknown and "overrides" not in options:
        known = [option for action in options.parser._actions for option in action.option_strings]
        suggestion = _suggestion(unknown[0].partition("=")[0], known) if unknown[0].startswith("-") else ""
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}{suggestion}")
    options.overrides = unknown
    command: Command = options.command
    try:
        return command(options)
    except (ValueError, OSError) as error:  # the user can fix these; other errors are bugs and keep their traceback
        print(f"mtp-trl: {error}", file=sys.stderr)
        return 2


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def declare_train(parser: argparse.ArgumentParser) -> Command:
    """Train a recipe in a single process (use `accelerate launch` for several)."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the recipe to train")
    parser.epilog = "Any other option overrides a recipe key: --max_steps 10."
    parser.set_defaults(overrides=[])

    def command(options: argparse.Namespace) -> int:
        from .launch import main as launch

        return launch(options.config, options.overrides)

    return command


def declare_estimate(parser: argparse.ArgumentParser) -> Command:
    """Estimate the GPU memory that a recipe needs, from the model's config without its weights."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument(
        "--gpus", type=positive, default=1, metavar="N", help="processes that share the ZeRO shards (default: 1)"
    )
    parser.add_argument("--memory", type=float, default=80, metavar="GIB", help="memory of each GPU (default: 80)")
    parser.epilog = "Any other option overrides a recipe key. The exit status is 1 if the run does not fit."
    parser.set_defaults(overrides=[])

    def command(options: argparse.Namespace) -> int:
        from .estimate import run_estimate

        fits = run_estimate(options.recipe, options.overrides, processes=options.gpus, memory=options.memory)
        return 0 if fits else 1

    return command


def declare_env(parser: argparse.ArgumentParser) -> Command:
    """Print versions and hardware, for bug reports."""

    def command(options: argparse.Namespace) -> int:
        from .publishing.provenance import run_facts

        facts = run_facts()
        for name, value in {**facts["versions"], "hardware": facts["hardware"], "platform": sys.platform}.items():
            print(f"{name}: {value}")
        return 0

    return command


COMMANDS: dict[str, Callable[[argparse.ArgumentParser], Command]] = {
    "demo": declare_demo,
    "train": declare_train,
    "estimate": declare_estimate,
    "generate": declare_generate,
    "eval": declare_eval,
    "calibrate": declare_calibrate,
    "show": declare_show,
    "serve": declare_serve,
    "app": declare_app,
    "export": declare_export,
    "push": declare_push,
    "check-decoder": declare_check_decoder,
    "env": declare_env,
}


if __name__ == "__main__":
    sys.exit(main())
