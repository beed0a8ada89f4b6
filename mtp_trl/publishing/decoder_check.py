"""Check whether the code in a repository is an unmodified mtp-trl decoder, before `trust_remote_code=True` runs it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils.hub import extract_commit_hash

from .. import __version__
from ..modeling.files import LORA_CONFIG, repository_file
from .repository import DECODER_FILE, LINK, decoder_files

# `digest` of the decoders of earlier versions, by version.
_EARLIER_DIGESTS = json.loads(Path(__file__).with_name("earlier_decoders.json").read_text(encoding="utf-8"))
# Config files that can name other code for transformers to run, and the keys under which they name it.
_CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_CODE_KEYS = ("auto_map", "custom_pipelines")


@dataclass(frozen=True)
class DecoderCheck:
    """The code in a repository that `trust_remote_code=True` would run.

    Attributes:
        name: local folder or Hub id.
        commit: the checked commit of a repository on the Hub; None for a folder.
        version: the version of this package that the decoder belongs to; None if the decoder is not from this package, or
            there is none.
        has_decoder: whether there is a `custom_generate/generate.py`.
        other_code: other code that the repository's config files name.
    """

    name: str
    commit: str | None
    version: str | None
    has_decoder: bool
    other_code: tuple[str, ...]

    @property
    def is_safe(self) -> bool:
        """Whether no code would run except an unmodified decoder of this package."""
        return not self.other_code and (self.version is not None or not self.has_decoder)

    @property
    def sentence(self) -> str:
        """The result as text, with the remedy if the repository contains other code."""
        checked = self.name if self.commit is None else f"{self.name} at commit {self.commit}"
        if self.other_code:
            return f"{checked} would run other code: {', '.join(self.other_code)}. Read it before you trust it."
        if not self.has_decoder:
            return f"{checked} has no {DECODER_FILE}: it contains no code to trust and decodes one token per pass."
        if self.version is None:
            return f"{checked} has a decoder that differs from mtp-trl's. Read {Path(DECODER_FILE).parent} before you trust it."
        return f"{checked} has the unmodified decoder of mtp-trl {self.version} and no other code."


def check_decoder(name: str | Path, revision: str | None = None) -> DecoderCheck:
    """Compare the decoder in a repository with the decoders of this package, without running any of its code.

    Args:
        name: local folder or Hub id.
        revision: branch, tag or commit of a repository on the Hub.

    Raises:
        OSError: the repository does not exist or cannot be read.
    """
    check = _check_repository(str(name), revision)
    return replace(check, other_code=(*check.other_code, *_code_of_base(str(name), check.commit or revision)))


def _check_repository(name: str, revision: str | None) -> DecoderCheck:
    """Check a repository without the base that a LoRA adapter in it names."""
    other_code, commit = [], None
    for config in _CONFIGS:
        path = repository_file(name, config, commit or revision)
        if path is not None:
            commit = commit or extract_commit_hash(path, None)
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            other_code += [f"{config} names {json.dumps(content[key])}" for key in _CODE_KEYS if content.get(key)]
    files = _decoder_texts(name, commit or revision)
    first = files.get(Path(DECODER_FILE).name)
    if first is not None and commit is None:
        commit = extract_commit_hash(repository_file(name, DECODER_FILE, revision), None)
    texts = {file: text for file, text in files.items() if text is not None}
    complete = len(texts) == len(files)
    version = _matching_version(texts) if first is not None and complete else None
    return DecoderCheck(name, commit, version, first is not None, tuple(other_code))


def _code_of_base(name: str, revision: str | None) -> list[str]:
    """Describe the code of the base that a LoRA adapter names. `from_pretrained` loads the base, and runs its code, too."""
    path = repository_file(name, LORA_CONFIG, revision)
    if path is None:
        return []
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    try:
        check = _check_repository(str(base), config.get("revision"))
    except OSError:
        return [f"{LORA_CONFIG} names the base {base!r}, which cannot be read"]
    return [] if check.is_safe else [f"{LORA_CONFIG} names the base {base!r}, and {check.sentence}"]


def decoder_digest(name: str | Path) -> str:
    """Return the `digest` of the decoder in a folder or repository, or the digest of no files if it has none."""
    return digest({file: text for file, text in _decoder_texts(str(name), None).items() if text is not None})


def digest(files: Mapping[str, str]) -> str:
    """Return the SHA-256 of a decoder's files. Line endings are ignored, because git may change them on Windows."""
    sums = hashlib.sha256()
    for name, text in sorted(files.items()):
        sums.update(f"{name} {hashlib.sha256(text.replace(chr(13), '').encode()).hexdigest()}\n".encode())
    return sums.hexdigest()


def _matching_version(files: Mapping[str, str]) -> str | None:
    found = digest(files)
    if found in (digest(decoder_files()), digest({"generate.py": LINK})):
        return __version__
    return next((version for version, known in _EARLIER_DIGESTS.items() if known == found), None)


def _decoder_texts(name: str, revision: str | None) -> dict[str, str | None]:
    """Return the text of `generate.py` and of its relative imports by file name; None for a file that does not exist."""
    folder, first = DECODER_FILE.split("/")
    found: dict[str, str | None] = {}
    pending = [first]
    while pending:
        file = pending.pop()
        path = repository_file(name, f"{folder}/{file}", revision)
        found[file] = None if path is None else Path(path).read_text(encoding="utf-8")
        if path is not None:
            pending += [f"{module}.py" for module in get_relative_imports(path) if f"{module}.py" not in found]
    return found
