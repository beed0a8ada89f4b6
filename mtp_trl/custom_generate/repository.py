"""Where `generate` was loaded from, and the adapter that an exact-mode repository brings with it."""

from __future__ import annotations

import inspect
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import cached_file

from .adapter import MaskGatedAdapter, adapter_of
from .adapter_file import ADAPTER_FILE, read_adapter
from .base import check_base
from .mtp_config import BROKEN_REPOSITORY, mtp_config_of, within_vocabulary

# Of `from_pretrained` and of `generate(custom_generate=...)`: how a repository's files are found.
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies", "subfolder")


@dataclass(frozen=True)
class Repository:
    """A folder or a repository on the Hub, and how its files are found.

    Attributes:
        name: folder or Hub id.
        options: arguments of `cached_file`, from `HUB_OPTIONS`.
        per_call: it was named in this call, `generate(..., custom_generate=name)`: its adapter replaces any other.
        adapter: read while the model was loading; None where a call names the repository, or it has no adapter.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    per_call: bool = False
    adapter: MaskGatedAdapter | None = None

    def adapter_file(self) -> Path | None:
        """The adapter's file; None where there is none."""
        path = cached_file(self.name, ADAPTER_FILE, _raise_exceptions_for_missing_entries=False, **self.options)
        return None if path is None else Path(path).resolve()

    def read(self, path: Path) -> MaskGatedAdapter:
        """The adapter in that file, not yet attached. Raises ValueError for a file that no adapter has."""
        adapter = read_adapter(str(path))
        adapter.source = self.source(path)
        return adapter

    def read_own(self) -> MaskGatedAdapter:
        """The adapter that this exact-mode repository must have.

        Raises:
            ValueError: it cannot be read. Not OSError: transformers would take that for "has no `generate`", and the model
                would decode one token per pass.
        """
        try:
            path = self.adapter_file()
        except OSError as error:
            raise ValueError(f"The adapter of {self.name} cannot be read ({ADAPTER_FILE}): {error}") from error
        if path is None:
            raise ValueError(f"{self.name} was adapted in exact mode, but has no {ADAPTER_FILE}; {BROKEN_REPOSITORY}")
        return self.read(path)

    def source(self, path: Path) -> tuple[str, str]:
        """Tells versions of the file apart: the name of a cached file holds its commit, a local one is dated."""
        return self.name, f"{path} {path.stat().st_mtime_ns}"


def being_loaded_from() -> Repository | None:
    """The repository from which transformers is fetching `generate` at this moment; None outside of that.

    transformers keeps the name and the options to itself, so they are read from its waiting call. In `from_pretrained` an
    exact-mode model's adapter is read at once: later the token, the network or the folder may be gone.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _LOADING:
        frame = frame.f_back
    if frame is None:
        return None
    given, model = frame.f_locals["kwargs"], frame.f_locals["self"]
    options = {name: given[name] for name in HUB_OPTIONS if given.get(name) not in (None, "")}
    per_call = frame.f_back is not None and frame.f_back.f_code is _GENERATING
    repository = Repository(str(frame.f_locals["pretrained_model_name_or_path"]), options, per_call)
    if per_call or not (mtp_config_of(model) or {}).get("exact"):
        return repository
    return Repository(repository.name, options, adapter=repository.read_own())


_LOADING = inspect.unwrap(GenerationMixin.load_custom_generate).__code__
_GENERATING = inspect.unwrap(GenerationMixin.generate).__code__


def attach_adapter(model: PreTrainedModel, repository: str) -> PreTrainedModel:
    """Put the adapter of an adapter-only repository on its base for good: `config.mtp` then names the mask token.

    Raises:
        ValueError: the adapter was trained on another base, or the repository has none.
    """
    source = Repository(repository, per_call=True)
    with one_at_a_time(model, source):
        adapter = adapter_for(model, source)
    if adapter is None:
        raise ValueError(f"{repository} has no {ADAPTER_FILE}; pass a repository of exact mode, or of a LoRA and its mask row.")
    model.config.mtp = within_vocabulary(adapter.mtp, model)
    for name, default in adapter.defaults.items():
        setattr(model.generation_config, name, default)
    return model


def adapter_for(model: PreTrainedModel, repository: Repository | None) -> MaskGatedAdapter | None:
    """The adapter that this call decodes with, attached; None where the model decodes as it is.

    Args:
        model: called within `one_at_a_time`.
        repository: where the call's `generate` came from; None for a model in memory.

    Raises:
        ValueError: the adapter was trained on another base, or its file is broken.
    """
    mtp = mtp_config_of(model)
    attached = adapter_of(model)
    if repository is not None and repository.per_call:
        return _swapped(model, repository, attached)
    if attached is not None or not (mtp or {}).get("exact"):
        return attached
    if repository is not None and repository.adapter is not None:
        return _attached(repository.adapter, model)
    # Loaded without its own `generate`, which was bound later.
    commit = getattr(model.config, "_commit_hash", None)
    own = Repository(model.config._name_or_path, {} if commit is None else {"revision": commit})
    return _attached(own.read_own(), model)


def _swapped(model: PreTrainedModel, repository: Repository, attached: MaskGatedAdapter | None) -> MaskGatedAdapter | None:
    """The repository's adapter in place of the one attached; none where the repository has none."""
    path = repository.adapter_file()
    if path is None:
        if attached is not None:
            attached.detach(model)
        return None
    if attached is not None and attached.source == repository.source(path):
        return attached
    return _attached(repository.read(path), model, instead_of=attached)


def _attached(
    adapter: MaskGatedAdapter, model: PreTrainedModel, *, instead_of: MaskGatedAdapter | None = None
) -> MaskGatedAdapter:
    check_base(adapter, model)
    if instead_of is not None:
        instead_of.detach(model)
    return adapter.to(model.dtype).attach(model)


class _Lock:
    """An RLock that may stand on a model: a copy of the model gets one of its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Lock:
        return _Lock()

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()


def one_at_a_time(model: PreTrainedModel, repository: Repository | None) -> AbstractContextManager[Any]:
    """Threads that decode with an adapter take turns: which adapter is on a model is a state that they would share.

    The lock stands on the model, since every repository has its own copy of this code.
    """
    mtp = getattr(model.config, "mtp", None)
    is_exact = adapter_of(model) is not None or (isinstance(mtp, dict) and mtp.get("exact"))
    is_swapped = repository is not None and repository.per_call
    if is_exact or is_swapped or "mtp_lock" in model.__dict__:  # whose adapter another thread may have taken off
        lock: AbstractContextManager[Any] = model.__dict__.setdefault("mtp_lock", _Lock()).lock
        return lock
    return nullcontext()
