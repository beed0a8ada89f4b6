"""Evaluate lm-evaluation-harness tasks in every decoding setting, with one model load.

Tasks, prompts, stop strings and answer extraction are those of the harness.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..modeling.files import write_atomically
from ..publishing.report import Setting, TableRow
from .statistics import mean_with_error, paired_difference, share_identical
from .sweep import answer_length, end_of_text_ids

# (metric, filter) that the paper reports for each of its tasks. Other tasks report their first metric.
PAPER_TASKS = {
    "gsm8k_cot": ("exact_match", "flexible-extract"),
    "bbh_cot_fewshot": ("exact_match", "get-answer"),
    "ifeval": ("prompt_level_strict_acc", "none"),
    "cnn_dailymail": ("rougeL", "none"),
    "aime25": ("exact_match", "none"),
    "gpqa_main_cot_n_shot": ("exact_match", "flexible-extract"),
}

# Whether the paper applies the chat template, by base model. For other models it is not applied by default.
PAPER_CHAT_TEMPLATE = {"Magpie-Align/Llama-3.1-8B-Magpie-Align-SFT-v0.1": True, "Qwen/Qwen3-4B-Instruct-2507": False}


@dataclass(frozen=True)
class Part:
    """Results of one task in one setting. `scores` and `answers` have one entry per problem, in the task's order."""

    scores: list[float]
    answers: list[str]
    tokens: int
    passes: int
    seconds: float
    dataset: str | None


class HarnessModel(HFLM):
    """A harness model that decodes with its current `setting` and counts tokens, passes and seconds."""

    def __init__(
        self,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        base: PreTrainedModel | None = None,
        batch_size: int = 1,
    ) -> None:
        super().__init__(pretrained=student, tokenizer=tokenizer, batch_size=batch_size)
        self.student, self.base = student, base
        self.use(Setting("plain"))

    def use(self, setting: Setting) -> None:
        """Decode with `setting` from now on, and reset the counts."""
        self.setting = setting
        self.tokens = self.passes = 0
        self.seconds = 0.0
        self._model = self.base if setting.kind == "base" else self.student

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], temperature: float = 0.0, **generation_kwargs: Any
    ) -> torch.Tensor:
        """Generate as `HFLM` does, but end each row at its own stop string.

        `HFLM` continues a batch until every row has reached a stop string.
        """
        arguments: dict[str, Any] = self.setting.arguments(self.student.config.mtp)
        if temperature:
            arguments["temperature"] = temperature
        own_stop = OwnStop(self.tokenizer, stop, prompt_length=context.shape[1])
        started = time.perf_counter()
        output = self.model.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=StoppingCriteriaList([own_stop]),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            return_dict_in_generate=True,
            **{"do_sample": False} | generation_kwargs | arguments,
        )
        answers = output.sequences[:, context.shape[1] :].tolist()  # synchronises with the device
        self.seconds += time.perf_counter() - started
        if self.setting.kind == "base":
            ends = end_of_text_ids(self.model)
            lengths = [own_stop.length(answer[: answer_length(answer, ends)]) for answer in answers]
            self.tokens, self.passes = self.tokens + sum(lengths), self.passes + sum(lengths)
        else:
            self.tokens += sum(map(sum, output.block_lengths))
            self.passes += int(output.forward_passes.sum())
        sequences: torch.Tensor = output.sequences
        return sequences


class OwnStop(StoppingCriteria):
    """Ends each row at the token that completes a stop string in its generated text, independently of the other rows.

    Transformers' `stop_strings` also match text at the end of the prompt. The harness does not, and neither does this class.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], *, prompt_length: int) -> None:
        self.tokenizer, self.stops, self.prompt_length = tokenizer, [stop for stop in stops if stop], prompt_length
        # At most one token per byte of a stop string, plus a margin for tokenizers that drop a space before the first token.
        self.window = max((len(stop.encode()) for stop in self.stops), default=0) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return whether each row has ended, bool [rows]."""
        generated = input_ids[:, self.prompt_length :].tolist()
        return torch.tensor([self.reached(token_ids) for token_ids in generated], device=input_ids.device)

    def reached(self, token_ids: list[int]) -> bool:
        """Whether the last token, or one shortly before it, completes a stop string."""
        text = self.tokenizer.decode(token_ids[-self.window :])
        return any(stop in text for stop in self.stops)

    def length(self, token_ids: list[int]) -> int:
        """Return the number of tokens through the first that completes a stop string, or of all tokens if none does."""
        return next((n for n in range(1, len(token_ids)) if self.reached(token_ids[:n])), len(token_ids))


def run_task(
    model: HarnessModel,
    task: str,
    setting: Setting,
    *,
    limit: int | None = None,
    chat_template: bool = False,
    data: Path | None = None,
    tasks_folder: Path | None = None,
) -> Part:
    """Decode and score one task or group of tasks in one setting.

    Args:
        model: the model; its setting and counts are replaced.
        task: name of a task or group that the harness knows.
        setting: how to decode.
        limit: number of problems of each task; None means all.
        chat_template: whether to apply the tokenizer's chat template to prompts.
        data: a JSON Lines file that replaces the task's test set.
        tasks_folder: a folder with additional tasks.

    Raises:
        ValueError: the harness does not know the task, the task does not generate text, or `data` is given for a group.
    """
    manager = check_task(task, tasks_folder)
    source: str | dict[str, Any] = task
    if data is not None:
        definition = manager.task_index[task].yaml_path
        if definition is None:
            raise ValueError(f"{task!r} is a group of tasks; pass a file for each of its tasks instead.")
        files = {"data_files": {"test": str(data.resolve())}}
        changes = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files, "test_split": "test"}
        source = {**load_yaml(definition), **changes, "training_split": None, "validation_split": None}
    model.use(setting)
    results = simple_evaluate(
        model,
        tasks=[source],
        limit=limit,
        bootstrap_iters=0,
        apply_chat_template=chat_template,
        task_manager=manager,
        log_samples=True,
    )
    samples = [sample for name in sorted(results["samples"]) for sample in results["samples"][name]]
    if model.passes == 0:
        raise ValueError(f"The task {task!r} generates no text, so there is nothing to accelerate; choose a task that does.")
    metric, chosen = PAPER_TASKS.get(task, (samples[0]["metrics"][0], samples[0]["filter"]))
    samples = [sample for sample in samples if sample["filter"] == chosen]
    configuration = next(iter(results["configs"].values()))
    return Part(
        scores=[float(sample[metric]) for sample in samples],
        answers=[str(sample["resps"][0][0]) for sample in samples],
        tokens=model.tokens,
        passes=model.passes,
        seconds=model.seconds,
        dataset=None if data is not None else configuration.get("dataset_path"),
    )


def check_task(task: str, tasks_folder: Path | None = None) -> TaskManager:
    """Return the harness's task manager; raise ValueError if it does not know the task."""
    manager = _task_manager(tasks_folder)
    if task not in manager.all_tasks:
        raise ValueError(f"lm-evaluation-harness does not know the task {task!r}; `lm_eval ls tasks` lists all tasks.")
    return manager


@functools.cache
def _task_manager(folder: Path | None) -> TaskManager:
    """Return the task manager, cached because reading the list of all tasks takes seconds."""
    return TaskManager(include_path=None if folder is None else str(folder))


def run_settings(
    model: HarnessModel, task: str, settings: Sequence[Setting], *, parts: Path | None = None, **options: Any
) -> dict[Setting, Part]:
    """Run a task in every setting and return the results by setting.

    Args:
        model: the model that decodes.
        task: name of the task.
        settings: the settings to run, in this order.
        parts: a folder for the result of each setting. Results of an earlier run are read from it instead of running again.
        options: arguments of `run_task`. Two files or folders are the same if their contents are.

    Raises:
        ValueError: the results in `parts` were made with other options.
    """
    finished: dict[Setting, Part] = {}
    console = Console(stderr=True)
    for number, setting in enumerate(settings, start=1):
        path = None if parts is None else parts / f"{task}.{re.sub('[ ,/]+', '_', setting.label)}.json"
        current = {"task": task} | {name: _by_content(option) for name, option in options.items()}
        if path is not None and path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["options"] != current:
                raise ValueError(f"{path} was made with {saved['options']}, not {current}; use another output folder.")
            finished[setting] = Part(**saved["part"])
            continue
        console.print(f"{task}: {setting.label} ({number} of {len(settings)})", highlight=False)
        finished[setting] = run_task(model, task, setting, **options)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({"options": current, "part": vars(finished[setting])}) + "\n")
    return finished


def _by_content(option: Any) -> Any:
    """Return the hash of a file, or of the task files in a folder; other options are returned unchanged.

    Paths do not identify contents: a file can be rewritten under the same name, or be moved.
    """
    if not isinstance(option, Path):
        return option
    tasks = {path for pattern in ("*yaml", "*yml", "*.py") for path in option.rglob(pattern)}
    digest = hashlib.sha256()
    for path in [option] if option.is_file() else sorted(filter(Path.is_file, tasks)):
        digest.update(f"{path.relative_to(option)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def table(parts: Mapping[Setting, Part]) -> list[TableRow]:
    """Return the rows of a report. Differences are paired by problem."""
    plain, base = parts[Setting("plain")], parts.get(Setting("base"))
    return [_row(setting, part, plain=plain, base=base) for setting, part in parts.items()]


def _row(setting: Setting, part: Part, *, plain: Part, base: Part | None) -> TableRow:
    return TableRow(
        setting=setting,
        problems=len(part.scores),
        accuracy=mean_with_error(part.scores),
        versus_base=None if base is None else paired_difference(part.scores, base.scores),
        versus_plain=paired_difference(part.scores, plain.scores),
        same_as_base=None if base is None else _same(part, base),
        same_as_plain=_same(part, plain),
        tokens_per_pass=part.tokens / part.passes,
        tokens_per_second=part.tokens / part.seconds,
        tokens_per_answer=part.tokens / len(part.scores),
    )


def _same(part: Part, reference: Part) -> float:
    return share_identical([list(map(ord, text)) for text in part.answers], [list(map(ord, t)) for t in reference.answers])
