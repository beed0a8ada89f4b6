"""Upload a model repository to the Hub in a single commit."""

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
from .card import CARD, RESULTS_FOLDER, is_rendered
from .export import WEIGHT_FILES, existing_folder, export, matches

logger = logging.getLogger(__name__)

# Files that are deleted unless this push replaces them. Left over from an earlier push, for example as other shards or as an
# adapter that is now merged, they would make the repository inconsistent.
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
    """`export` a folder and upload it in one commit, so that a failed push leaves the repository unchanged.

    After a failure, push again: weights that are already on the Hub are not uploaded a second time. Pushing an unchanged folder
    makes no commit.

    Args:
        folder: as in `export`, which also describes `adapter_only`, `results`, `tags` and `merged`.
        repo_id: `you/name`, or a name under your own account. Created if it does not exist.
        private: whether a new repository is private.
        token: access token. Defaults to the token of `hf auth login` or `HF_TOKEN`.
        revision: branch to push to, created if it does not exist. Defaults to main.
        commit_message: message of the commit.
        blocking: whether to wait for the upload. If False, it runs in the background, and the folder may change or be deleted
            meanwhile.

    Returns:
        The commit, or a future of it if `blocking` is False.

    Raises:
        ValueError: under the same conditions as `export`.
        OSError: the Hub refused the push, or the connection failed.
    """
    folder = existing_folder(folder)
    api = HfApi(token=token)
    with _with_remedies(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    temporary = _temporary_sibling(folder)  # a copy, because training may delete a checkpoint during the upload
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
    """Upload a whole folder to `path_in_repo` in the background. The folder may be deleted meanwhile.

    Returns:
        A future of the commit.
    """
    temporary = _temporary_sibling(existing_folder(folder))
    snapshot = Path(temporary.name) / "folder"
    # Hard links take no space. They are safe because the files of a checkpoint are replaced, never modified in place.
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


def _temporary_sibling(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """Create a temporary folder next to `folder`, so that its files can be hard links.

    If the parent of `folder` is not writable, the temporary folder is created in the system's default location.
    """
    parent = folder.resolve().parent
    location = parent if os.access(parent, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix=".push-", dir=location, ignore_cleanup_errors=True)


_QUEUE = HfApi()


def in_background(send: Callable[[], Any]) -> Future[Any]:
    """Run uploads one after the other. Of two simultaneous uploads, one would fail because the other changes the repository."""
    return _QUEUE.run_as_future(send)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if that fails.

    Symbolic links are resolved first: files in the Hub's cache are relative links, which would be broken elsewhere.
    """
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _commit(api: HfApi, folder: Path, repo_id: str, *, revision: str | None, message: str) -> CommitInfo:
    """Upload a folder and delete stale files, in one commit.

    `upload_folder` is not used because it splits a large model into several commits, between which the repository is broken.
    """
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    with _with_remedies(repo_id):
        head = api.model_info(repo_id, revision=revision)
        remote_names = {sibling.rfilename for sibling in head.siblings or []}
        if CARD in remote_names and is_rendered(folder / CARD):
            remote_card = Path(api.hf_hub_download(repo_id, CARD, revision=head.sha))
            if not is_rendered(remote_card):  # the author has written this card
                logger.warning(f"{repo_id} keeps its {CARD}, because mtp-trl did not generate it.")
                del names[CARD]
        stale = {name for name in remote_names if any(matches(name, pattern) for pattern in _STALE)}
        reports = {Path(name).stem for name in stale if matches(name, f"{RESULTS_FOLDER}/*.json")}
        # Other files in .eval_results belong to the author.
        stale |= remote_names & {f".eval_results/{report}.yaml" for report in reports}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationDelete(name) for name in sorted(stale - names.keys())
        ]
        operations += [CommitOperationAdd(name, str(path)) for name, path in names.items()]
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=head.sha)


@contextmanager
def _with_remedies(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub into OSErrors that name a remedy. In each case the repository is unchanged."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise OSError(f"Writing to {repo_id} requires a token; run `hf auth login` or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        raise OSError(_REFUSALS.get(status, _PUSH_FAILED).format(repo_id=repo_id, error=_first_line(error))) from error
    except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:  # RuntimeError: a file failed to upload
        raise OSError(_PUSH_FAILED.format(repo_id=repo_id, error=f"{type(error).__name__}: {_first_line(error)}")) from error


_NO_PERMISSION = (
    "The Hub does not let this token write to {repo_id} ({error}); check the name, and that the token of "
    "`hf auth login` or HF_TOKEN has write permission. Nothing was changed."
)
_REFUSALS: dict[int | None, str] = {
    401: _NO_PERMISSION,
    403: _NO_PERMISSION,
    404: _NO_PERMISSION,
    412: "{repo_id} changed on the Hub during this push; nothing was written. Check the repository, then push again.",
}
_PUSH_FAILED = (
    "The push to {repo_id} failed ({error}). The repository is unchanged; push again. Weights that are already on the Hub are "
    "not uploaded a second time."
)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
