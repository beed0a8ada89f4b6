"""Names of the files in a model's folder or repository, and functions that find, read and write them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

_PACKAGE = Path(__file__).resolve().parents[1]
PROVENANCE_FILE = "mtp_provenance.json"
LORA_CONFIG, LORA_FILE = "adapter_config.json", "adapter_model.safetensors"
# Patterns of all files that a tokenizer may have.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)


def repository_file(name: str | Path, file: str, revision: str | None = None) -> str | None:
    """Return the local path of a file in a folder or Hub repository; None if it does not exist there."""
    path: str | None = cached_file(str(name), file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return path


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def public_name(source: str) -> str:
    """Return a name of `source` that means the same on other machines.

    A Hub id is returned unchanged. A path inside this package becomes relative to the folder that contains the package. Any
    other path is reduced to its last part.
    """
    path = Path(source)
    if path.resolve().is_relative_to(_PACKAGE) and path.exists():
        return str(Path(_PACKAGE.name) / path.resolve().relative_to(_PACKAGE))
    return path.name if path.exists() or not is_hub_id(source) else source


def write_atomically(path: Path, text: str) -> None:
    """Write a text file atomically: an interrupted call leaves the previous file unchanged."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_provenance(name: str | Path) -> dict[str, Any] | None:
    """Return the provenance recorded in a folder or repository; None if it has none."""
    path = repository_file(name, PROVENANCE_FILE)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
