"""From a training folder to a repository that loads by itself, and to the Hub in a single commit."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, eval_result_entries_to_yaml
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError  # type: ignore[attr-defined]

from . import hub
from .card import RESULTS_FOLDER, eval_result_entries, read_evidence, read_report, write_card
from .custom_generate.generate import ADAPTER_FILE, check_mask_tokens
from .evaluation.calibration import CALIBRATION_FILE
from .lora import LORA_CONFIG, merge_folder, write_lora

# What a repository holds. All else stays at home: optimizer states, training arguments (a pickle), logs, checkpoints.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
)
_BESIDE = ("custom_generate/generate.py", hub.PROVENANCE_FILE, CALIBRATION_FILE, f"{RESULTS_FOLDER}/*", "LICENSE*", "README.md")
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_MODEL = ("config.json", "generation_config.json", "*.py", *_WEIGHTS)
# What an earlier push may have left and would be wrong beside this one: other shards, an adapter before it was merged.
_STALE = (
    "config.json", "generation_config.json", *_WEIGHTS, *_TOKENIZER, "custom_generate/*", hub.PROVENANCE_FILE, CALIBRATION_FILE,
    f"{RESULTS_FOLDER}/*", "adapter_config.json", "adapter_model.*", "pytorch_model*.bin*",
)  # fmt: skip


def export(
    folder: str | Path,
    output: str | Path,
    *,
    repo_id: str | None = None,
    adapter_only: bool = False,
    results: Sequence[Path] = (),
    tags: Sequence[str] = (),
    copy: Callable[[Path, Path], Any] = shutil.copy2,
) -> Path:
    """Write everything a model repository needs, and nothing else, into a new folder; whole or not at all.

    Args:
        folder: where a run saved its model, or one of its checkpoints. LoRA adapters are merged into their base.
        output: the folder to make.
        repo_id: what the card tells readers to load; the output's name by default.
        adapter_only: the adapter of exact mode, or the LoRA, and the decoder alone, without the base's weights.
        results: files `results.json` of `mtp-trl eval`, for the card; a `pareto.png` beside one goes along.
        tags: of the card.
        copy: how a file gets there.

    Raises:
        FileExistsError: the output folder is there already.
        ValueError: nothing that this package trained, weights that are missing or are not safetensors, or an adapter
            asked of a model that has none.
    """
    folder, output = _there(folder), Path(output)
    if output.exists():
        raise FileExistsError(f"{output} is there already; name another folder or remove it.")
    for path in results:
        read_report(path)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        partial = Path(temporary) / "model"
        source = folder
        is_lora = (folder / LORA_CONFIG).is_file()
        if is_lora and not adapter_only:
            source = merge_folder(folder, Path(temporary) / "merged")
        _copy_repository(source, partial, adapter_only=adapter_only, copy=copy)
        if is_lora and adapter_only:
            write_lora(folder, partial)
        for path in results:
            _add_results(path, partial / RESULTS_FOLDER)
        _write_eval_results(partial)
        name = repo_id or output.name
        has_weights = (partial / "config.json").is_file()
        write_card(partial, model_name=name.split("/")[-1], repo_id=name, adapter_only=not has_weights, tags=tags)
        partial.rename(output)
    return output


def _there(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}; pass the output folder of a run or one of its checkpoints.")
    return Path(folder)


def _copy_repository(source: Path, target: Path, *, adapter_only: bool, copy: Callable[[Path, Path], Any]) -> None:
    patterns = _patterns(source, adapter_only=adapter_only)
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if path.is_file() and any(_matches(name, pattern) for pattern in patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            copy(path, target / name)


def _patterns(folder: Path, *, adapter_only: bool) -> tuple[str, ...]:
    """What is copied of a folder, once it is clear that it is all there."""
    for needed in ("custom_generate/generate.py", hub.PROVENANCE_FILE):
        if not (folder / needed).is_file():
            raise ValueError(f"{folder} has no {needed}: it is not what MTPDistillTrainer saves; pass its output folder.")
    has_adapter, has_model = (folder / ADAPTER_FILE).is_file(), (folder / "config.json").is_file()
    if adapter_only and not has_adapter:
        raise ValueError(
            f"{folder} has no {ADAPTER_FILE}: only exact mode, and LoRA that trains no more rows than the mask's and is "
            "on no embedding that has grown by it, can be published as an adapter alone; leave adapter_only out."
        )
    if adapter_only or (has_adapter and not has_model):
        return (*_TOKENIZER, *_BESIDE, ADAPTER_FILE)
    _check_weights(folder)
    return (*_MODEL, *_TOKENIZER, *_BESIDE, *([ADAPTER_FILE] if has_adapter else []))


def _check_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if (folder / "config.json").is_file() else {}
    if "mtp" not in config:
        raise ValueError(f"{folder} has no mask token (`mtp` in config.json); pass a model that this package adapted.")
    check_mask_tokens(config["mtp"])
    if config["mtp"].get("exact") and not (folder / ADAPTER_FILE).is_file():
        raise ValueError(f"{folder} was trained in exact mode, but its {ADAPTER_FILE} is missing.")
    index = folder / "model.safetensors.index.json"
    needed = {"model.safetensors"}
    if index.is_file():
        needed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        raise ValueError(f"{folder} lacks {', '.join(missing)}; weights are published as safetensors, and all of them.")


def _matches(name: str, pattern: str) -> bool:
    """A pattern without a folder means the top folder alone."""
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _add_results(path: Path, folder: Path) -> None:
    """Under the name of its folder if it is called results.json, as `mtp-trl eval` does."""
    folder.mkdir(exist_ok=True)
    name = path.resolve().parent.name if path.stem == "results" else path.stem
    plots = [plot for plot in (path.with_suffix(".png"), path.with_name("pareto.png")) if plot.is_file()]
    for source, target in ((path, folder / f"{name}.json"), *((plot, folder / f"{name}.png") for plot in plots[:1])):
        target.unlink(missing_ok=True)  # it may be a link to the run's own file
        shutil.copyfile(source, target)


def _write_eval_results(folder: Path) -> None:
    for name, report in read_evidence(folder).reports.items():
        if entries := eval_result_entries(report):
            (folder / ".eval_results").mkdir(exist_ok=True)
            text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
            hub.write_atomically(folder / ".eval_results" / f"{name}.yaml", text)


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
    blocking: bool = True,
) -> CommitInfo | Future[CommitInfo]:
    """`export` a folder and upload it in one commit: a push that fails leaves the repository as it was.

    Run again it sends what is missing; weights that the Hub has are not sent twice, and an unchanged folder makes no commit.

    Args:
        folder: as for `export`, which also takes `adapter_only`, `results` and `tags`.
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
    folder = _there(folder)
    api = HfApi(token=token)
    with _explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    # A snapshot beside the folder, which may be a checkpoint that training removes meanwhile. Hard links cost nothing, but
    # show what is written into a file later.
    parent = Path(folder).resolve().parent
    temporary = tempfile.TemporaryDirectory(
        prefix=".push-", dir=parent if os.access(parent, os.W_OK) else None, ignore_cleanup_errors=True
    )
    try:
        snapshot = export(
            folder, Path(temporary.name) / "model", repo_id=repo_id, adapter_only=adapter_only, results=results, tags=tags,
            copy=_link_or_copy if blocking else shutil.copy2,
        )  # fmt: skip
    except BaseException:
        temporary.cleanup()
        raise

    def send() -> CommitInfo:
        with temporary:
            return _commit(api, snapshot, repo_id, revision=revision, message=commit_message)

    return send() if blocking else in_background(send)


_QUEUE = HfApi()


def in_background(send: Callable[[], Any]) -> Future[Any]:
    """Uploads one after the other: two at a time would each find that the other had changed the repository."""
    return _QUEUE.run_as_future(send)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _commit(api: HfApi, folder: Path, repo_id: str, *, revision: str | None, message: str) -> CommitInfo:
    """`upload_folder` splits a large model into several commits, between which the repository is broken: not this."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    with _explained(repo_id):
        head = api.model_info(repo_id, revision=revision)
        there = {sibling.rfilename for sibling in head.siblings or []}
        stale = {name for name in there if any(_matches(name, pattern) for pattern in _STALE)}
        reports = {Path(name).stem for name in stale if _matches(name, f"{RESULTS_FOLDER}/*.json")}
        stale |= there & {f".eval_results/{report}.yaml" for report in reports}  # entries of others are the author's
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationDelete(name) for name in sorted(stale - names.keys())
        ]
        operations += [CommitOperationAdd(name, str(path)) for name, path in names.items()]
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=head.sha)


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
