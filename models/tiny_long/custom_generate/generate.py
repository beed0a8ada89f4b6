"""The decoder of the installed mtp-trl. `mtp-trl export` writes a folder with a decoder of its own."""

from typing import Any

from mtp_trl.custom_generate import generate as decoder


def __getattr__(name: str) -> Any:
    return getattr(decoder, name)
