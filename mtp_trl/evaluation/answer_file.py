"""Run `mtp-trl generate`: answer a file of prompts. Answers are written batch by batch, so that an interrupted run resumes."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..modeling.files import write_atomically
from .answers import AnswerSettings, Prompt, encode_prompts, generate_answers
from .loading import check_exists, load_causal_lm, load_tokenizer, weights_identity
from .tasks import read_rows

Rows = list[dict[str, Any]]


def run_generate(
    model: str,
    prompts: Path,
    output: Path,
    settings: AnswerSettings,
    *,
    column: str | None = None,
    chat_template: bool = True,
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Answer the prompts in a JSON Lines or Parquet file, and write the answers to a JSON Lines file.

    Args:
        model: folder or Hub id of a causal LM.
        prompts: file of the prompts.
        output: file of the answers; see `write_answers` for what happens if it exists.
        settings: how to decode.
        column, chat_template: as in `encode_prompts`.
        limit: number of rows to read; None means all.
        trust_remote_code: as in `load_causal_lm`.

    Raises:
        FileNotFoundError: there is no file of prompts.
        ValueError: as in `load_causal_lm`, `encode_prompts`, `generate_answers` and `write_answers`.
    """
    data = _read_prompts(prompts)[:limit]
    check_exists(model)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    encoded = encode_prompts(data, tokenizer, column=column, chat_template=chat_template)
    console = Console(highlight=False, markup=False, soft_wrap=True)

    def batches(done: int) -> Iterator[Rows]:
        if done:
            console.print(f"Resuming after {done} answers.")
        loaded, _ = load_causal_lm(model, trust_remote_code=trust_remote_code)
        yield from generate_answers(loaded, tokenizer, encoded, settings, done=done)

    existed = output.exists()
    arguments = describe(model, weights_identity(model), encoded, settings, chat_template=chat_template)
    rows = write_answers(output, batches, arguments=arguments, batch_size=settings.batch_size)
    cut = sum(row["finish_reason"] == "length" for row in rows)
    if existed:
        summary = f"{output} is complete: it was made with the same arguments, and has {len(rows)} answers, {cut} of them cut."
    else:
        summary = f"Wrote {len(rows)} answers to {output}; {cut} were cut (finish_reason 'length')."
    console.print(summary)


def _read_prompts(path: Path) -> Sequence[Mapping[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}; pass a JSON Lines or Parquet file with prompts.")
    if path.suffix == ".parquet":
        from datasets import Dataset

        rows: Rows = Dataset.from_parquet(str(path)).to_list()
        return rows
    return read_rows(path)


def describe(
    model: str, weights: Sequence[str], prompts: Sequence[Prompt], settings: AnswerSettings, *, chat_template: bool
) -> dict[str, Any]:
    """Return what answers depend on, for `write_answers`. Weights and prompts are represented by hashes."""
    parts = {"weights": weights, "prompts": list(map(asdict, prompts))}
    digests = {name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for name, part in parts.items()}
    return {"model": model, **digests, "chat_template": chat_template, **asdict(settings)}


def write_answers(
    output: Path, batches: Callable[[int], Iterable[Rows]], *, arguments: Mapping[str, Any], batch_size: int
) -> Rows:
    """Write the rows of all batches to a JSON Lines file, sorted by `index`, and return them.

    Finished batches are in `OUTPUT.partial` until the last one is finished. `OUTPUT.arguments` has the arguments. A second call
    with the same arguments continues the partial file, or returns the rows of the finished file.

    Args:
        output: the file.
        batches: returns the batches that follow this number of rows, a multiple of `batch_size`.
        arguments: what the rows depend on; values that JSON can hold.
        batch_size: rows of each batch but the last.

    Raises:
        ValueError: the file or its partial file was made with other arguments.
    """
    partial, record = (output.with_name(output.name + suffix) for suffix in (".partial", ".arguments"))
    if output.exists():
        _check_made_with(arguments, output, record)
        return _rows(output.read_bytes())
    if partial.exists() and partial.stat().st_size:
        _check_made_with(arguments, partial, record)
    write_atomically(record, json.dumps(arguments, indent=2) + "\n")
    with partial.open("a+b") as file:
        file.seek(0)
        lines = file.read().split(b"\n")[:-1]  # a run that was killed while it wrote leaves a last line without an end
        done = len(lines) - len(lines) % batch_size
        file.truncate(sum(len(line) + 1 for line in lines[:done]))
        for batch in batches(done):
            file.write("".join(json.dumps(row) + "\n" for row in batch).encode())
            file.flush()
    rows = sorted(_rows(partial.read_bytes()), key=lambda row: row["index"])
    write_atomically(output, "".join(json.dumps(row) + "\n" for row in rows))
    partial.unlink()
    return rows


def _rows(content: bytes) -> Rows:
    return [json.loads(line) for line in content.splitlines()]


def _check_made_with(arguments: Mapping[str, Any], file: Path, record: Path) -> None:
    """Raise ValueError unless `record` says that the file was made with these arguments."""
    remedy = f"choose another --output, or delete {file.name}."
    if not record.exists():
        raise ValueError(f"{file} exists, but {record.name}, which would say how it was made, does not; {remedy}")
    made = json.loads(record.read_text(encoding="utf-8"))
    changed = [f"{name}={made.get(name)} (now {value})" for name, value in arguments.items() if made.get(name) != value]
    if changed:
        raise ValueError(f"{file} was made with {', '.join(changed)}; repeat those arguments, {remedy}")
