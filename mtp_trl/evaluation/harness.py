"""lm-evaluation-harness with every decoding in one model load: its tasks, prompts, stops and answer extraction."""

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

# The figures that the paper reports: (metric, filter) of each of its tasks. Other tasks report their first metric.
PAPER_TASKS = {
    "gsm8k_cot": ("exact_match", "flexible-extract"),
    "bbh_cot_fewshot": ("exact_match", "get-answer"),
    "ifeval": ("prompt_level_strict_acc", "none"),
    "cnn_dailymail": ("rougeL", "none"),
    "aime25": ("exact_match", "none"),
    "gpqa_main_cot_n_shot": ("exact_match", "flexible-extract"),
}

# Whether the paper's prompts went through the chat template, by the base of the model. Other models go without.
PAPER_CHAT_TEMPLATE = {"Magpie-Align/Llama-3.1-8B-Magpie-Align-SFT-v0.1": True, "Qwen/Qwen3-4B-Instruct-2507": False}


@dataclass(frozen=True)
class Part:
    """One task decoded in one setting. `scores` and `answers` are in the task's order, one per problem."""

    scores: list[float]
    answers: list[str]
    tokens: int
    passes: int
    seconds: float
    dataset: str | None


class HarnessModel(HFLM):
    """A model that decodes as its `setting` says, and counts tokens, passes and seconds."""

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
        """Decode so from now on, and count from zero."""
        self.setting = setting
        self.tokens = self.passes = 0
        self.seconds = 0.0
        self._model = self.base if setting.kind == "base" else self.student

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], temperature: float = 0.0, **generation_kwargs: Any
    ) -> torch.Tensor:
        """As the harness's own, but each row ends at its own stop: there a batch goes on until all its rows have one."""
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
        answers = output.sequences[:, context.shape[1] :].tolist()  # waits for the device
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
    """Ends a row with the token that completes a stop string in what was generated, whatever the other rows do.

    Transformers' `stop_strings` also look at the end of the prompt, the harness does not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], *, prompt_length: int) -> None:
        self.tokenizer, self.stops, self.prompt_length = tokenizer, [stop for stop in stops if stop], prompt_length
        # At worst a token for each byte; a few more, because tokenizers drop a space before the first token.
        self.window = max((len(stop.encode()) for stop in self.stops), default=0) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """A verdict for each row."""
        generated = input_ids[:, self.prompt_length :].tolist()
        return torch.tensor([self.reached(token_ids) for token_ids in generated], device=input_ids.device)

    def reached(self, token_ids: list[int]) -> bool:
        """Whether the last of these tokens completes a stop string, or one shortly before it did."""
        text = self.tokenizer.decode(token_ids[-self.window :])
        return any(stop in text for stop in self.stops)

    def length(self, token_ids: list[int]) -> int:
        """Tokens up to the first that completes a stop string, inclusive; all without one."""
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
    """Decode and score one task or group of tasks.

    Args:
        task: a name that the harness knows.
        limit: problems of each task; all by default.
        chat_template: whether prompts go through the tokenizer's chat template.
        data: a JSON Lines file in place of the task's test set.
        tasks_folder: where tasks of one's own are.

    Raises:
        ValueError: no such task, or one that does not generate text.
    """
    manager = check_task(task, tasks_folder)
    source: str | dict[str, Any] = task
    if data is not None:
        definition = manager.task_index[task].yaml_path
        if definition is None:
            raise ValueError(f"{task!r} is a group of tasks: give each of them its own file.")
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
        raise ValueError(f"The task {task!r} generates no text, so there is nothing to accelerate; take a generating one.")
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
    """The harness's list of tasks, with this one in it; raises ValueError without."""
    manager = _task_manager(tasks_folder)
    if task not in manager.all_tasks:
        raise ValueError(f"lm-evaluation-harness knows no task {task!r}; `lm_eval ls tasks` lists them.")
    return manager


@functools.cache
def _task_manager(folder: Path | None) -> TaskManager:
    """Reading the list of all tasks takes seconds."""
    return TaskManager(include_path=None if folder is None else str(folder))


def run_settings(
    model: HarnessModel, task: str, settings: Sequence[Setting], *, parts: Path | None = None, **options: Any
) -> dict[Setting, Part]:
    """A task in every setting. With a folder for `parts`, what an earlier run with the same options finished is read there.

    Files among the options are told apart by what is in them.

    Raises:
        ValueError: the parts there were made with other options.
    """
    finished: dict[Setting, Part] = {}
    console = Console(stderr=True)
    for number, setting in enumerate(settings, start=1):
        path = None if parts is None else parts / f"{task}.{re.sub('[ ,/]+', '_', setting.label)}.json"
        asked = {"task": task} | {name: _by_content(option) for name, option in options.items()}
        if path is not None and path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved["options"] != asked:
                raise ValueError(f"{path} was made with {saved['options']}, not {asked}; name another output folder.")
            finished[setting] = Part(**saved["part"])
            continue
        console.print(f"{task}: {setting.label} ({number} of {len(settings)})", highlight=False)
        finished[setting] = run_task(model, task, setting, **options)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({"options": asked, "part": vars(finished[setting])}) + "\n")
    return finished


def _by_content(option: Any) -> Any:
    """Of a file its hash, of a folder that of the tasks in it: they may be written anew under the same name, or be moved."""
    if not isinstance(option, Path):
        return option
    tasks = {path for pattern in ("*yaml", "*yml", "*.py") for path in option.rglob(pattern)}
    digest = hashlib.sha256()
    for path in [option] if option.is_file() else sorted(filter(Path.is_file, tasks)):
        digest.update(f"{path.relative_to(option)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def table(parts: Mapping[Setting, Part]) -> list[TableRow]:
    """The rows of a report; pure. Differences are paired by problem."""
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
