"""Where held-out prompts come from: the bundled word problems or a JSON Lines file, with or without answers."""

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..word_problems import test_problems
from .sweep import Scorer

BUNDLED = "word_problems"
# GSM8K's form of a worked answer's last line; thousands may be grouped.
_RESULT = re.compile(r"####\s*(-?[\d,]*\d(?:\.\d+)?)")


@dataclass(frozen=True)
class Task:
    """Prompts to decode and, where their right answers are known, the scorer."""

    title: str
    prompts: list[str]
    scorer: Scorer | None

    def without_repetitions(self) -> "Task":
        """Every prompt once, the first time it occurs: repeated evidence is no evidence."""
        first = {prompt: i for i, prompt in reversed(list(enumerate(self.prompts)))}
        kept = sorted(first.values())
        scorer = self.scorer
        return Task(
            self.title, [self.prompts[i] for i in kept], None if scorer is None else lambda i, text: scorer(kept[i], text)
        )


def load_task(data: str, *, limit: int | None = None, prompt: str = "prompt", completion: str = "completion") -> Task:
    """The first `limit` problems of the bundled test set (`word_problems`) or of a JSON Lines file.

    A file's answers are scored when every completion ends in `#### number`, as in GSM8K; otherwise only agreement and
    speed are measured.

    Args:
        data: `word_problems` or a path.
        limit: how many problems; all by default.
        prompt: the file's column of prompts.
        completion: the file's column of completions; may be absent.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a JSON object, or without the prompt column; nothing to evaluate.
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
    rows = _read_rows(path, column=prompt)[:limit]
    if not rows:
        raise ValueError(f"{data} has no lines; one JSON object per line is needed, with a column {prompt!r}.")
    references = [result(str(row.get(completion, ""))) for row in rows]
    known = [reference for reference in references if reference is not None]
    scorer = _matches(known) if len(known) == len(rows) else None
    return Task(path.name, [str(row[prompt]) for row in rows], scorer)


def result(text: str) -> str | None:
    """The number after the first `####` of a worked answer, without grouping commas; None when there is none."""
    match = _RESULT.search(text)
    return match.group(1).replace(",", "") if match else None


def _matches(references: Sequence[str]) -> Scorer:
    return lambda i, text: result(text) == references[i]


def _read_rows(path: Path, *, column: str) -> list[dict[str, object]]:
    rows = []
    # Text as JSON allows it has line ends of its own (U+2028), and some editors begin a file with a mark.
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
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            names = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{path.name}, line {number} has no text {column!r}, only: {names}; name the column.")
        rows.append(row)
    return rows
