"""Is the code of a repository ours? Asked before `trust_remote_code=True` runs it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils.hub import extract_commit_hash

from .. import __version__
from ..modeling.files import repository_file
from .repository import DECODER_FILE, LINK, decoder_files

# Decoders of earlier versions: `digest` by the version that published them.
_EARLIER = json.loads(Path(__file__).with_name("earlier_decoders.json").read_text(encoding="utf-8"))
# Files in which a repository can name other code that transformers would run.
_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json")
_CODE = ("auto_map", "custom_pipelines")


@dataclass(frozen=True)
class DecoderCheck:
    """What `trust_remote_code=True` would run of a repository.

    Attributes:
        name: folder or Hub id.
        commit: of a repository on the Hub, the one that was looked at.
        version: of this package, whose decoder it is; None where it is not ours, or there is none.
        has_decoder: whether there is a `custom_generate/generate.py`.
        other_code: code beside the decoder, as the repository's configs name it.
    """

    name: str
    commit: str | None
    version: str | None
    has_decoder: bool
    other_code: tuple[str, ...]

    @property
    def is_safe(self) -> bool:
        """Whether nothing would run but a decoder of ours."""
        return not self.other_code and (self.version is not None or not self.has_decoder)

    @property
    def sentence(self) -> str:
        """The result for people."""
        at = self.name if self.commit is None else f"{self.name} at commit {self.commit}"
        if self.other_code:
            return f"{at} runs code of its own: {', '.join(self.other_code)}. Read it before you trust it."
        if not self.has_decoder:
            return f"{at} has no {DECODER_FILE}: there is nothing to trust, it decodes one token per pass."
        if self.version is None:
            return f"{at} has a decoder that is none of mtp-trl's. Read {Path(DECODER_FILE).parent} before you trust it."
        return f"{at} has the decoder of mtp-trl {self.version}, unchanged, and no other code."


def check_decoder(name: str | Path, revision: str | None = None) -> DecoderCheck:
    """Compare a repository's decoder with those that this package has published; nothing of it is run.

    Raises:
        OSError: the repository cannot be read.
    """
    name = str(name)
    other_code, commit = [], None
    for config in _CONFIGS:
        path = repository_file(name, config, revision)
        if path is not None:
            commit = commit or extract_commit_hash(path, None)
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            other_code += [f"{config} names {json.dumps(content[key])}" for key in _CODE if content.get(key)]
    files = _imported(name, commit or revision)
    first = files.get(Path(DECODER_FILE).name)
    if first is not None and commit is None:
        commit = extract_commit_hash(repository_file(name, DECODER_FILE, revision), None)
    texts = {file: text for file, text in files.items() if text is not None}
    complete = len(texts) == len(files)
    version = _version(texts) if first is not None and complete else None
    return DecoderCheck(name, commit, version, first is not None, tuple(other_code))


def decoder_digest(name: str | Path) -> str:
    """`digest` of the decoder that a folder or repository has; of nothing where it has none."""
    return digest({file: text for file, text in _imported(str(name), None).items() if text is not None})


def digest(files: Mapping[str, str]) -> str:
    """SHA-256 of a decoder's files, whatever their line ends: git may write others on Windows."""
    sums = hashlib.sha256()
    for name, text in sorted(files.items()):
        sums.update(f"{name} {hashlib.sha256(text.replace(chr(13), '').encode()).hexdigest()}\n".encode())
    return sums.hexdigest()


def _version(files: Mapping[str, str]) -> str | None:
    found = digest(files)
    if found in (digest(decoder_files()), digest({"generate.py": LINK})):
        return __version__
    return next((version for version, known in _EARLIER.items() if known == found), None)


def _imported(name: str, revision: str | None) -> dict[str, str | None]:
    """`generate.py` and what it imports relatively, by name; None for a file that is not there."""
    folder, first = DECODER_FILE.split("/")
    found: dict[str, str | None] = {}
    wanted = [first]
    while wanted:
        file = wanted.pop()
        path = repository_file(name, f"{folder}/{file}", revision)
        found[file] = None if path is None else Path(path).read_text(encoding="utf-8")
        if path is not None:
            wanted += [f"{module}.py" for module in get_relative_imports(path) if f"{module}.py" not in found]
    return found
