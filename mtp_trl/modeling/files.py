"""Files of a model's folder or repository: where they are, what they are called, and how they are written whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

_PACKAGE = Path(__file__).resolve().parents[1]
PROVENANCE_FILE = "mtp_provenance.json"
LORA_CONFIG, LORA_FILE = "adapter_config.json", "adapter_model.safetensors"
# Whatever a tokenizer may consist of.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.jinja",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)


def repository_file(name: str | Path, file: str, revision: str | None = None) -> str | None:
    """Where a file of a folder or of a repository on the Hub lies; None where it has none."""
    path: str | None = cached_file(str(name), file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return path


def is_hub_id(name: str) -> bool:
    """Whether a name can be a repository's: owner/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def public_name(source: str) -> str:
    """A Hub id or a path inside this package as it is; of other files the name, since their paths mean nothing elsewhere."""
    path = Path(source)
    if path.resolve().is_relative_to(_PACKAGE) and path.exists():
        return str(Path(_PACKAGE.name) / path.resolve().relative_to(_PACKAGE))
    return path.name if path.exists() or not is_hub_id(source) else source


def write_atomically(path: Path, text: str) -> None:
    """Replace a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_provenance(name: str | Path) -> dict[str, Any] | None:
    """What a folder or repository says of how it was made; None where it says nothing."""
    path = repository_file(name, PROVENANCE_FILE)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
