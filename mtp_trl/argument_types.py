"""What options of the command line may hold: text into values, with errors that argparse shows in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

# A subcommand: called with its parsed options, it returns the exit status.
Command = Callable[[argparse.Namespace], int]


def require(package: str, what: str, *, extra: str) -> None:
    """Raises ValueError where a package of an extra is missing, before any work is done."""
    if find_spec(package) is None:
        raise ValueError(f"{what} needs {package}, which is not installed; pip install 'mtp-trl[{extra}]'.")


def trust_option(parser: argparse.ArgumentParser) -> None:
    """Add --trust-remote-code, for commands that load a model from the Hub."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code of a Hub repository that is not mtp-trl's own decoder (see `mtp-trl check-decoder`)",
    )


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def integers(text: str) -> list[int]:
    """2,4,8."""
    return [positive(part) for part in text.split(",")]


def block(text: str) -> int | str:
    """A block size, or auto."""
    return text if text == "auto" else positive(text)


def threshold(text: str) -> float | tuple[float, ...]:
    """0.9, or 0.99/0.9 by block position."""
    try:
        positions = tuple(float(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a probability, such as 0.9, or several by position, 0.99/0.9"
        ) from None
    return positions if len(positions) > 1 else positions[0]


def thresholds(text: str) -> list[float | tuple[float, ...]]:
    """0.95,0.9,0.99/0.9."""
    return [threshold(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """one,two,three."""
    return text.split(",")


def task_file(text: str) -> tuple[str, Path]:
    """TASK=FILE, with a file that exists."""
    task, equals, path = text.partition("=")
    if not equals or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=FILE with a file that exists")
    return task, Path(path)


def new_folder(text: str) -> Path:
    """A folder that exists, or can be made."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file, and a folder is needed")
    return Path(text)


def new_file(text: str) -> Path:
    """A file that can be written: its folder exists."""
    if Path(text).is_dir() or not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written as a file: its folder must exist")
    return Path(text)
