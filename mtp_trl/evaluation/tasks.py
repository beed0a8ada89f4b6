"""Load held-out prompts from the bundled word problems or from a JSON Lines file, with or without answers."""

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..word_problems import test_problems
from .sweep import Scorer

BUNDLED = "word_problems"
# The last line of a worked answer in GSM8K; thousands may be grouped by commas.
_RESULT = re.compile(r"####\s*(-?[\d,]*\d(?:\.\d+)?)")


@dataclass(frozen=True)
class Task:
    """Prompts to decode and, if their right answers are known, a scorer."""

    title: str
    prompts: list[str]
    scorer: Scorer | None

    def without_repetitions(self) -> "Task":
        """Return the task without repeated prompts, which are no additional evidence. The first of each is kept."""
        first = {prompt: i for i, prompt in reversed(list(enumerate(self.prompts)))}
        kept = sorted(first.values())
        scorer = self.scorer
        return Task(
            self.title, [self.prompts[i] for i in kept], None if scorer is None else lambda i, text: scorer(kept[i], text)
        )


def load_task(data: str, *, limit: int | None = None, prompt: str = "prompt", completion: str = "completion") -> Task:
    """Load the first `limit` problems of the bundled test set (`word_problems`) or of a JSON Lines file.

    Answers are scored if every completion of the file has `#### number`, as in GSM8K. Otherwise only agreement and speed are
    measured.

    Args:
        data: `word_problems` or a path.
        limit: number of problems; None means all.
        prompt: the file's column of prompts.
        completion: the file's column of completions; it may be missing.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: `limit` is below 1, a line is not a JSON object or has no prompt, or the file has no lines.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be >= 1, got {limit}; leave it out for all problems.")
    if data == BUNDLED:
        problems = test_problems() if limit is None else test_problems(limit)
        results = [str(problem.result) for problem in problems]
        return Task("held-out word problems", [problem.prompt for problem in problems], _matches(results))
    path = Path(data)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {data!r}; pass {BUNDLED!r} or a JSON Lines file.")
    rows = read_rows(path, column=prompt)[:limit]
    if not rows:
        raise ValueError(f"{data} has no lines; write one JSON object per line, with a column {prompt!r}.")
    references = [result(str(row.get(completion, ""))) for row in rows]
    known = [reference for reference in references if reference is not None]
    scorer = _matches(known) if len(known) == len(rows) else None
    return Task(path.name, [str(row[prompt]) for row in rows], scorer)


def result(text: str) -> str | None:
    """Return the number after the first `####` of a worked answer, without grouping commas; None if there is none."""
    match = _RESULT.search(text)
    return match.group(1).replace(",", "") if match else None


def _matches(references: Sequence[str]) -> Scorer:
    return lambda i, text: result(text) == references[i]


def read_rows(path: Path, *, column: str | None = None) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file. Blank lines are skipped.

    Args:
        path: the file.
        column: a column that must hold text in every row.

    Raises:
        ValueError: a line is not a JSON object, or has no text in `column`.
    """
    rows = []
    # Split at \n only: JSON strings may contain other line ends (U+2028). Some editors begin a file with a byte order mark.
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            byte = f"0x{line[error.start]:02x}"
            raise ValueError(f"{path.name}, line {number} is not UTF-8 (byte {byte}); save the file as UTF-8.") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number} is not JSON ({error.msg}); one object per line.") from None
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ValueError(f"{path.name}, line {number} is a JSON {kind}, not an object; write one object per line.")
        if column is not None and not isinstance(row.get(column), str):
            names = ", ".join(row)
            raise ValueError(f"{path.name}, line {number} has no text column {column!r}, only: {names}; name the column.")
        rows.append(row)
    return rows
