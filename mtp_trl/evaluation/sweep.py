"""Decode the same prompts in several settings and compare accuracy, acceleration, speed and agreement."""

# Shapes: B rows of the batch, L columns of the text

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.files import write_atomically
from ..publishing.report import Estimate, Setting, TableRow, Threshold
from .statistics import mean_with_error, paired_difference, ratio_of_sums, share_identical

# Returns whether the answer (text without special tokens) to problem i is right.
Scorer = Callable[[int, str], bool]


def decoding_settings(
    *,
    ks: Iterable[int] = (),
    confadapt: Iterable[Threshold] = (),
    verified: Iterable[Threshold] = (),
    trees: Iterable[tuple[int, Threshold]] = (),
    base: bool = True,
) -> list[Setting]:
    """Return the settings of the usual table, in its order.

    Args:
        ks: sizes of static blocks.
        confadapt: ConfAdapt thresholds, decoded without verification.
        verified: thresholds decoded with verification.
        trees: (blocks, threshold) pairs, decoded with verification and this many blocks of masks per pass.
        base: include the base at k=1. The student at k=1 is always included.
    """
    settings = [Setting("base")] if base else []
    settings.append(Setting("plain"))
    settings += [Setting("static", k=k) for k in ks]
    settings += [Setting("confadapt", threshold=threshold) for threshold in confadapt]
    settings += [Setting("verified", threshold=threshold) for threshold in verified]
    settings += [Setting("tree", k=blocks, threshold=threshold) for blocks, threshold in trees]
    return settings


@dataclass(frozen=True)
class Record:
    """One answer. `blocks` are the accepted lengths per pass; `seconds` is an equal share of the batch's wall-clock time."""

    text: str
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...]
    passes: int
    seconds: float
    correct: bool | None


@dataclass(frozen=True)
class Sweep:
    """The records of every setting, in the order of the prompts, and the table computed from them."""

    records: dict[Setting, list[Record]]
    rows: list[TableRow]
    batch_size: int
    max_new_tokens: int


def evaluate_decoding(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    settings: Sequence[Setting],
    batch_size: int,
    max_new_tokens: int,
    scorer: Scorer | None = None,
    base: PreTrainedModel | None = None,
    parts: Path | None = None,
    progress: bool = True,
) -> Sweep:
    """Decode all prompts greedily in every setting and aggregate the results.

    Each batch is decoded in all settings before the next batch, so that their speeds are comparable.

    Args:
        model: the student, with the multi-token `generate` bound to it.
        tokenizer: encodes the prompts; it must have a pad token.
        prompts: texts to complete.
        settings: must contain the student's k=1 (`Setting("plain")`), which the other settings are compared with.
        batch_size: rows decoded together.
        max_new_tokens: longest answer, in tokens.
        scorer: returns whether the answer to problem i is right; without one the table has no accuracies.
        base: the model before adaptation; required if a setting is of kind `base`.
        parts: a folder that stores every finished batch. Stored batches are not decoded again, so they must come from the
            same models, prompts and arguments.
        progress: show a progress bar with the remaining time on stderr.

    Raises:
        ValueError: there are no prompts, `settings` has no k=1 or has the base while `base` is None, or the tokenizer has no
            pad token.
    """
    _check(tokenizer, prompts, settings, base)
    records: dict[Setting, list[Record]] = {setting: [] for setting in settings}
    with progress_bar(shown=progress) as bar:
        task = bar.add_task("", total=len(settings) * len(prompts))
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            file = None if parts is None else parts / f"{start}.json"
            done = {} if file is None or not file.is_file() else _read_part(file)
            stored = len(done)
            for setting, answers in records.items():
                bar.update(task, description=setting.label)
                if setting.label not in done:
                    done[setting.label] = _decode_batch(
                        model, base, tokenizer, batch, setting=setting, max_new_tokens=max_new_tokens
                    )
                answers += done[setting.label]
                bar.advance(task, len(batch))
            if file is not None and len(done) > stored:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps({label: list(map(asdict, part)) for label, part in done.items()}) + "\n")
    if scorer is not None:
        records = {setting: _scored(answers, scorer) for setting, answers in records.items()}
    return Sweep(records, aggregate(records, batch_size=batch_size), batch_size, max_new_tokens)


def _read_part(path: Path) -> dict[str, list[Record]]:
    parts = json.loads(path.read_text(encoding="utf-8"))
    return {label: [_record(**fields) for fields in part] for label, part in parts.items()}


def _record(*, token_ids: list[int], blocks: list[int], **fields: Any) -> Record:
    return Record(token_ids=tuple(token_ids), blocks=tuple(blocks), **fields)


def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    setting: Setting,
    batch_size: int,
    max_new_tokens: int,
    scorer: Scorer | None = None,
    progress: bool = True,
) -> list[Record]:
    """Decode all prompts with the student in one setting. The arguments are those of `evaluate_decoding`."""
    answers: list[Record] = []
    with progress_bar(shown=progress) as bar:
        for start in bar.track(range(0, len(prompts), batch_size), description=setting.label):
            batch = prompts[start : start + batch_size]
            answers += _decode_batch(model, None, tokenizer, batch, setting=setting, max_new_tokens=max_new_tokens)
    return answers if scorer is None else _scored(answers, scorer)


def progress_bar(*, shown: bool) -> Progress:
    """Return a progress bar with the remaining time, on stderr. It disappears when it is done."""
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # rich estimates the remaining time from the updates of this many seconds, and a batch may take minutes.
    return Progress(*columns, console=console, disable=not shown, transient=True, speed_estimate_period=3600)


def aggregate(records: dict[Setting, list[Record]], *, batch_size: int) -> list[TableRow]:
    """Return the table of decoded settings. `records` must include the student's k=1; the base is optional."""
    plain = records[Setting("plain")]
    base = records.get(Setting("base"))
    return [_row(setting, answers, batch_size, plain=plain, base=base) for setting, answers in records.items()]


def _row(
    setting: Setting, answers: list[Record], batch_size: int, *, plain: list[Record], base: list[Record] | None
) -> TableRow:
    tokens = [len(record.token_ids) for record in answers]
    return TableRow(
        setting=setting,
        problems=len(answers),
        accuracy=_accuracy(answers),
        versus_base=None if base is None else _accuracy_difference(answers, base),
        versus_plain=_accuracy_difference(answers, plain),
        same_as_base=None if base is None else _same(answers, base),
        same_as_plain=_same(answers, plain),
        tokens_per_pass=ratio_of_sums(tokens, [record.passes for record in answers]),
        tokens_per_second=_median_speed(answers, batch_size),
        tokens_per_answer=mean_with_error(tokens).value,
    )


SPEEDS = "the median batch"


def _median_speed(answers: list[Record], batch_size: int) -> float:
    """Return the tokens per second of the median batch, so that a batch slowed down by other processes has no effect."""
    batches = [answers[start : start + batch_size] for start in range(0, len(answers), batch_size)]
    return statistics.median(
        ratio_of_sums([len(record.token_ids) for record in batch], [record.seconds for record in batch]) for batch in batches
    )


def _scores(answers: list[Record]) -> list[float] | None:
    scores = [float(record.correct) for record in answers if record.correct is not None]
    return scores or None


def _accuracy(answers: list[Record]) -> Estimate | None:
    scores = _scores(answers)
    return None if scores is None else mean_with_error(scores)


def _accuracy_difference(answers: list[Record], reference: list[Record]) -> Estimate | None:
    scores, others = _scores(answers), _scores(reference)
    return None if scores is None or others is None else paired_difference(scores, others)


def _same(answers: list[Record], reference: list[Record]) -> float:
    return share_identical([record.token_ids for record in answers], [record.token_ids for record in reference])


def _check(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    settings: Sequence[Setting],
    base: PreTrainedModel | None,
) -> None:
    if not prompts:
        raise ValueError("There is nothing to decode: prompts is empty; pass at least one.")
    if Setting("plain") not in settings:
        raise ValueError(
            "The student's k=1 is missing from settings, but the others are compared with it; add Setting('plain')."
        )
    if Setting("base") in settings and base is None:
        raise ValueError("A setting decodes the base, but base is None; pass the base model or drop the setting.")
    if tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no pad token, which a batch needs; set tokenizer.pad_token.")


def _scored(answers: list[Record], scorer: Scorer) -> list[Record]:
    return [replace(record, correct=scorer(i, record.text)) for i, record in enumerate(answers)]


def _decode_batch(
    student: PreTrainedModel,
    base: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    setting: Setting,
    max_new_tokens: int,
) -> list[Record]:
    """Return greedy answers to a batch, not scored yet. The rows share the wall-clock time of `generate` equally."""
    model = base if setting.kind == "base" and base is not None else student
    encoded = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt").to(model.device)
    prompt_BL = encoded["input_ids"]
    started = time.perf_counter()
    output = model.generate(
        input_ids=prompt_BL,
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
        **setting.arguments(student.config.mtp),
    )
    answers = output.sequences[:, prompt_BL.shape[1] :].tolist()  # synchronises with the device
    seconds = (time.perf_counter() - started) / len(prompts)
    if setting.kind == "base":  # transformers' own generate: one token per pass, padding after EOS
        ends = end_of_text_ids(model)
        blocks = [[1] * answer_length(answer, ends) for answer in answers]
        passes = [len(lengths) for lengths in blocks]
    else:
        blocks, passes = output.block_lengths, output.forward_passes.tolist()
    records = []
    for answer, lengths, count in zip(answers, blocks, passes, strict=True):
        token_ids = tuple(answer[: sum(lengths)])
        text = str(tokenizer.decode(list(token_ids), skip_special_tokens=True))
        records.append(Record(text, token_ids, tuple(lengths), count, seconds, correct=None))
    return records


def end_of_text_ids(model: PreTrainedModel) -> set[int]:
    """Return the EOS token ids of the model's generation_config."""
    ids = model.generation_config.eos_token_id
    return set(ids) if isinstance(ids, list) else set() if ids is None else {ids}


def answer_length(token_ids: Sequence[int], ends: set[int]) -> int:
    """Return the number of tokens through the first EOS, or of all tokens if there is none."""
    return next((i + 1 for i, token in enumerate(token_ids) if token in ends), len(token_ids))
