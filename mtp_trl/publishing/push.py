"""A model repository to the Hub, in a single commit."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError  # type: ignore[attr-defined]

from ..modeling.files import PROVENANCE_FILE, TOKENIZER_FILES
from .calibration_file import CALIBRATION_FILE
from .card import CARD, MARK, RESULTS_FOLDER
from .export import WEIGHT_FILES, existing_folder, export, matches

logger = logging.getLogger(__name__)

# What an earlier push may have left and would be wrong beside this one: other shards, an adapter before it was merged.
_STALE = (
    "config.json",
    "generation_config.json",
    *WEIGHT_FILES,
    *TOKENIZER_FILES,
    "custom_generate/*",
    PROVENANCE_FILE,
    CALIBRATION_FILE,
    f"{RESULTS_FOLDER}/*",
    "adapter_config.json",
    "adapter_model.*",
    "pytorch_model*.bin*",
)


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    adapter_only: bool = False,
    results: Sequence[Path] = (),
    tags: Sequence[str] = (),
    merged: Path | None = None,
    blocking: bool = True,
) -> CommitInfo | Future[CommitInfo]:
    """`export` a folder and upload it in one commit: a push that fails leaves the repository as it was.

    Run again it sends what is missing; weights that the Hub has are not sent twice, and an unchanged folder makes no commit.

    Args:
        folder: as for `export`, which also takes `adapter_only`, `results`, `tags` and `merged`.
        repo_id: `you/name`, or a name under your own account; made if it is not there.
        private: whether a new repository is private.
        token: by default that of `hf auth login` or of HF_TOKEN.
        revision: a branch, made if it is not there; main by default.
        commit_message: of the commit.
        blocking: False uploads in the background and returns a future; the folder may then change or vanish.

    Raises:
        ValueError: as `export`.
        OSError: the Hub refused or the connection broke.
    """
    folder = existing_folder(folder)
    api = HfApi(token=token)
    with _explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    temporary = _beside(folder)  # the folder may be a checkpoint that training removes meanwhile
    try:
        snapshot = export(
            folder,
            Path(temporary.name) / "model",
            repo_id=repo_id,
            adapter_only=adapter_only,
            results=results,
            tags=tags,
            merged=merged,
            copy=link_or_copy if blocking else shutil.copy2,
        )
    except BaseException:
        temporary.cleanup()
        raise

    def send() -> CommitInfo:
        with temporary:
            return _commit(api, snapshot, repo_id, revision=revision, message=commit_message)

    return send() if blocking else in_background(send)


def push_unchanged(
    folder: str | Path, repo_id: str, *, path_in_repo: str, token: str | None, revision: str | None, commit_message: str
) -> Future[CommitInfo]:
    """Upload all of a folder to a place in a repository, in the background; the folder may vanish meanwhile."""
    temporary = _beside(existing_folder(folder))
    snapshot = Path(temporary.name) / "folder"
    # Hard links cost nothing. The files of a checkpoint are replaced, never written into.
    shutil.copytree(folder, snapshot, copy_function=lambda source, target: link_or_copy(Path(source), Path(target)))

    def send() -> CommitInfo:
        with temporary:
            return HfApi(token=token).upload_folder(
                repo_id=repo_id,
                folder_path=snapshot,
                path_in_repo=path_in_repo,
                commit_message=commit_message,
                revision=revision,
            )

    return in_background(send)


def _beside(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder on the same disk where that can be written, so that links are enough."""
    parent = folder.resolve().parent
    where = parent if os.access(parent, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix=".push-", dir=where, ignore_cleanup_errors=True)


_QUEUE = HfApi()


def in_background(send: Callable[[], Any]) -> Future[Any]:
    """Uploads one after the other: two at a time would each find that the other had changed the repository."""
    return _QUEUE.run_as_future(send)


def link_or_copy(source: Path, target: Path) -> None:
    """Another name for a file, or a copy. Of a link its target is taken: files in the Hub's cache are relative links."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _commit(api: HfApi, folder: Path, repo_id: str, *, revision: str | None, message: str) -> CommitInfo:
    """`upload_folder` splits a large model into several commits, between which the repository is broken: not this."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    with _explained(repo_id):
        head = api.model_info(repo_id, revision=revision)
        there = {sibling.rfilename for sibling in head.siblings or []}
        if CARD in there and _is_rendered(folder / CARD):
            own = Path(api.hf_hub_download(repo_id, CARD, revision=head.sha))
            if not _is_rendered(own):  # the author has written a card there
                logger.warning(f"{repo_id} keeps its own {CARD}, which is not mtp-trl's.")
                del names[CARD]
        stale = {name for name in there if any(matches(name, pattern) for pattern in _STALE)}
        reports = {Path(name).stem for name in stale if matches(name, f"{RESULTS_FOLDER}/*.json")}
        stale |= there & {f".eval_results/{report}.yaml" for report in reports}  # entries of others are the author's
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationDelete(name) for name in sorted(stale - names.keys())
        ]
        operations += [CommitOperationAdd(name, str(path)) for name, path in names.items()]
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=head.sha)


def _is_rendered(card: Path) -> bool:
    return card.is_file() and MARK in card.read_text(encoding="utf-8")


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Errors of the Hub with what to do about them; in each case nothing was changed there."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise OSError(f"No token to write to {repo_id} with; run `hf auth login` or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        raise OSError(_REFUSALS.get(status, _BROKEN).format(repo_id=repo_id, error=_first_line(error))) from error
    except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:  # RuntimeError: a file that was not uploaded
        raise OSError(_BROKEN.format(repo_id=repo_id, error=f"{type(error).__name__}: {_first_line(error)}")) from error


_NO_RIGHT = (
    "The Hub does not let this token write to {repo_id} ({error}); check the name, and that the token of "
    "`hf auth login` or HF_TOKEN has the right to write. Nothing was changed."
)
_REFUSALS: dict[int | None, str] = {
    401: _NO_RIGHT,
    403: _NO_RIGHT,
    404: _NO_RIGHT,
    412: "{repo_id} has changed on the Hub while this push was under way; nothing was written. Look at it, then run again.",
}
_BROKEN = (
    "The push to {repo_id} did not go through ({error}). The repository is as it was; run the same again: what has "
    "arrived is not sent twice."
)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
