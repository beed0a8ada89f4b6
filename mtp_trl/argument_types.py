"""Types of command-line options: convert text to values, with errors that argparse shows in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

# A subcommand: called with its parsed options, it returns the exit status.
Command = Callable[[argparse.Namespace], int]


def require(package: str, what: str, *, extra: str) -> None:
    """Raise ValueError if a package of an extra is not installed, before any work is done."""
    if find_spec(package) is None:
        raise ValueError(f"{what} needs {package}, which is not installed; pip install 'mtp-trl[{extra}]'.")


def trust_option(parser: argparse.ArgumentParser) -> None:
    """Add --trust-remote-code, for commands that load a model from the Hub."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code of a Hub repository that is not mtp-trl's own decoder (see `mtp-trl check-decoder`)",
    )


def gguf_option(parser: argparse.ArgumentParser) -> None:
    """Add --gguf-file, for commands that load the model given as --base."""
    parser.add_argument("--gguf-file", metavar="NAME", help="read --base from this GGUF file in its folder or repository")


def check_gguf_option(options: argparse.Namespace) -> None:
    """Exit with a usage error if --gguf-file is given without --base."""
    if options.gguf_file is not None and options.base is None:
        options.parser.error("--gguf-file needs --base: it names a file of the base")


def positive(text: str) -> int:
    """Return a whole number >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


def integers(text: str) -> list[int]:
    """Return the numbers of a list such as 2,4,8."""
    return [positive(part) for part in text.split(",")]


def block(text: str) -> int | str:
    """Return a block size, or auto."""
    return text if text == "auto" else positive(text)


def threshold(text: str) -> float | tuple[float, ...]:
    """Return a threshold such as 0.9, or several by block position such as 0.99/0.9."""
    try:
        positions = tuple(float(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a probability such as 0.9 nor several by position such as 0.99/0.9"
        ) from None
    return positions if len(positions) > 1 else positions[0]


def thresholds(text: str) -> list[float | tuple[float, ...]]:
    """Return the thresholds of a list such as 0.95,0.9,0.99/0.9."""
    return [threshold(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Return the names of a list such as one,two,three."""
    return text.split(",")


def task_file(text: str) -> tuple[str, Path]:
    """Return the task and the path of TASK=FILE; the file must exist."""
    task, equals, path = text.partition("=")
    if not equals or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=FILE with an existing file")
    return task, Path(path)


def new_folder(text: str) -> Path:
    """Return the path of a folder that exists or can be created."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file, but a folder is needed")
    return Path(text)


def new_file(text: str) -> Path:
    """Return the path of a file to write; its folder must exist."""
    if Path(text).is_dir() or not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: it must be a file in an existing folder")
    return Path(text)
