"""`benchmarks/architectures.py`: three model types, a composite, and a check that times out."""

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "benchmarks" / "architectures.py"
SOURCE = {**os.environ, "PYTHONPATH": str(ROOT)}


def rows_of(path):
    return {row["type"]: row for row in json.loads(path.read_text("utf-8"))["rows"]}


def test_three_types_and_a_composite_are_checked(run_program, tmp_path):
    output = tmp_path / "rows.json"
    result = run_program([PROGRAM, "--only", "llama,jamba,ctrl,gemma3", "--output", output], env=SOURCE)
    assert result.returncode == 0, result.stderr
    rows = rows_of(output)
    right = dict.fromkeys(["built", "upstream", "verified", "blocks", "training", "exact"], "right")
    assert rows["llama"] == right | {"type": "llama", "cache": "cached", "layout": "packed"}
    assert rows["jamba"] == right | {"type": "jamba", "cache": "uncached", "layout": "suffix"}
    assert rows["ctrl"] == right | {"type": "ctrl", "cache": "cached", "layout": "packed"}
    assert rows["gemma3"] == {"type": "gemma3", "built": "see gemma3_text"}
    assert set(json.loads(output.read_text("utf-8"))["provenance"]) >= {"command", "date", "hardware", "versions"}


def test_a_check_that_hangs_is_stopped_and_the_next_one_runs(run_program, tmp_path):
    output = tmp_path / "rows.json"
    result = run_program([PROGRAM, "--only", "llama,mistral", "--seconds", "0", "--output", output], env=SOURCE)
    assert result.returncode == 0, result.stderr
    assert [row["built"] for row in rows_of(output).values()] == ["fails: not finished within 0 s"] * 2
