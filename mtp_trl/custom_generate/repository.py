"""The repository from which `generate` was loaded, and the adapter of an exact-mode repository."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import cached_file

from .adapter import MaskGatedAdapter, adapter_of
from .adapter_file import ADAPTER_FILE, read_adapter
from .base import check_base
from .mtp_config import BROKEN_REPOSITORY, mtp_config_of, within_vocabulary

# Arguments of `from_pretrained` and of `generate(custom_generate=...)` that locate a repository's files.
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies", "subfolder")


@dataclass(frozen=True)
class Repository:
    """A folder or a repository on the Hub, with the options to load its files.

    Attributes:
        name: folder or Hub id.
        options: arguments for `cached_file`, from `HUB_OPTIONS`.
        per_call: whether this call named the repository, as in `generate(..., custom_generate=name)`. Its adapter then
            replaces any other.
        adapter: the adapter that was read while the model was loading. None if `per_call`, or if there is no adapter.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    per_call: bool = False
    adapter: MaskGatedAdapter | None = None

    def adapter_file(self) -> Path | None:
        """Return the path of the adapter's file, or None if there is none."""
        path = cached_file(self.name, ADAPTER_FILE, _raise_exceptions_for_missing_entries=False, **self.options)
        return None if path is None else Path(path).resolve()

    def read(self, path: Path) -> MaskGatedAdapter:
        """Read the adapter in a file, without attaching it. Raise ValueError if the file is not that of an adapter."""
        adapter = read_adapter(str(path))
        adapter.source = self.source(path)
        return adapter

    def read_own(self) -> MaskGatedAdapter:
        """Read the adapter that this exact-mode repository must have.

        Raises:
            ValueError: the adapter cannot be read. An OSError would make transformers assume that there is no custom
                `generate`, and the model would decode one token per pass.
        """
        try:
            path = self.adapter_file()
        except OSError as error:
            raise ValueError(f"The adapter of {self.name} cannot be read ({ADAPTER_FILE}): {error}") from error
        if path is None:
            raise ValueError(f"{self.name} was adapted in exact mode, but has no {ADAPTER_FILE}; {BROKEN_REPOSITORY}")
        return self.read(path)

    def source(self, path: Path) -> tuple[str, str]:
        """Return the repository and a string that identifies this version of the file.

        The string is the path, which contains a hash if the file is in the Hub's cache, and the modification time.
        """
        return self.name, f"{path} {path.stat().st_mtime_ns}"


def being_loaded_from() -> Repository | None:
    """Return the repository from which transformers is loading `generate` right now, or None.

    transformers does not pass on the name and the options, so they are read from its frame on the call stack. In
    `from_pretrained` the adapter of an exact-mode model is read at once, since the token, the network or the folder may not be
    available later.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _LOADING:
        frame = frame.f_back
    if frame is None:
        return None
    kwargs, model = frame.f_locals["kwargs"], frame.f_locals["self"]
    options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) not in (None, "")}
    per_call = frame.f_back is not None and frame.f_back.f_code is _GENERATING
    repository = Repository(str(frame.f_locals["pretrained_model_name_or_path"]), options, per_call)
    if per_call:
        return repository
    # The model keeps this object, which must not contain a token.
    is_exact = (mtp_config_of(model) or {}).get("exact")
    return Repository(repository.name, adapter=repository.read_own() if is_exact else None)


_LOADING = inspect.unwrap(GenerationMixin.load_custom_generate).__code__
_GENERATING = inspect.unwrap(GenerationMixin.generate).__code__


def attach_adapter(model: PreTrainedModel, repository: str) -> PreTrainedModel:
    """Attach the adapter of an adapter-only repository to its base permanently, and set `config.mtp` to its mask token.

    Returns:
        The model.

    Raises:
        ValueError: the adapter was trained on another base, or the repository has no adapter.
    """
    source = Repository(repository, per_call=True)
    path = source.adapter_file()
    if path is None:
        raise ValueError(f"{repository} has no {ADAPTER_FILE}; pass a repository of an exact-mode or a LoRA adapter.")
    with one_at_a_time(model, source):
        adapter = _replace_adapter(model, source, path)
    model.config.mtp = within_vocabulary(adapter.mtp, model)
    for name, default in adapter.defaults.items():
        setattr(model.generation_config, name, default)
    return model


@contextmanager
def adapter_for(model: PreTrainedModel, repository: Repository | None) -> Iterator[MaskGatedAdapter | None]:
    """Attach the adapter of this call, and hold the model's lock within the block. None if the model decodes without one.

    Args:
        model: the model that decodes.
        repository: source of the call's `generate`; None for a model in memory.

    Raises:
        ValueError: the adapter was trained on another base, or its file is broken.
    """
    mtp = mtp_config_of(model)
    named = repository if repository is not None and repository.per_call else None
    path = None if named is None else named.adapter_file()  # may use the network, so it is not called within the lock
    with one_at_a_time(model, repository):
        attached = adapter_of(model)
        if named is not None and path is not None:
            yield _replace_adapter(model, named, path)
        elif named is not None:
            if attached is not None:
                attached.detach(model)
            yield None
        elif attached is not None or not (mtp or {}).get("exact"):
            yield attached
        else:
            adapter = None if repository is None else repository.adapter
            yield _check_and_attach(adapter or Repository(model.config._name_or_path).read_own(), model)


def repository_of(model: PreTrainedModel, **options: Any) -> Repository | None:
    """Return the repository of an exact-mode model that was loaded without its `generate`, with the adapter read from it.

    Args:
        options: arguments of `from_pretrained`, from `HUB_OPTIONS`.

    Returns:
        None if the model has its adapter or was not adapted in exact mode.

    Raises:
        ValueError: the adapter cannot be read.
    """
    if unknown := sorted(set(options) - set(HUB_OPTIONS)):
        raise TypeError(f"unknown options {', '.join(unknown)}; the options are {', '.join(HUB_OPTIONS)}.")
    if adapter_of(model) is not None or not (mtp_config_of(model) or {}).get("exact"):
        return None
    commit = getattr(model.config, "_commit_hash", None)
    name, options = model.config._name_or_path, ({} if commit is None else {"revision": commit}) | options
    return Repository(name, adapter=Repository(name, options).read_own())


def _replace_adapter(model: PreTrainedModel, repository: Repository, path: Path) -> MaskGatedAdapter:
    """Attach the adapter in the repository's file in place of any other, and return it."""
    attached = adapter_of(model)
    if attached is not None and attached.source == repository.source(path):
        return attached
    return _check_and_attach(repository.read(path), model, instead_of=attached)


def _check_and_attach(
    adapter: MaskGatedAdapter, model: PreTrainedModel, *, instead_of: MaskGatedAdapter | None = None
) -> MaskGatedAdapter:
    check_base(adapter, model)
    if instead_of is not None:
        instead_of.detach(model)
    return adapter.to(model.dtype).attach(model)


class _Lock:
    """An RLock that can be copied and pickled with a model. The copy gets a new lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Lock:
        return _Lock()

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()


def one_at_a_time(model: PreTrainedModel, repository: Repository | None) -> AbstractContextManager[Any]:
    """Return a lock of the model if the call uses an adapter, since threads share the adapter that is attached to a model.

    The lock is an attribute of the model, since every repository has its own copy of this code.
    """
    mtp = getattr(model.config, "mtp", None)
    is_exact = adapter_of(model) is not None or (isinstance(mtp, dict) and mtp.get("exact"))
    may_replace = repository is not None and repository.per_call
    # If the model has a lock, it may have an adapter that another thread has detached for the moment.
    if is_exact or may_replace or "mtp_lock" in model.__dict__:
        lock: AbstractContextManager[Any] = model.__dict__.setdefault("mtp_lock", _Lock()).lock
        return lock
    return nullcontext()
