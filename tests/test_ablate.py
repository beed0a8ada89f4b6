"""The ablation program: finished cells survive a kill, only the running cell is lost, and the table shows finished cells."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Replaces training: every cell finishes at once, except the last one, which never finishes.
PROGRAM = """
import sys, time
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import ablate

folder, fast = Path(sys.argv[1]), len(sys.argv) > 2
example = ablate.read(next(iter(sorted(ablate.RESULTS.glob("*.json")))))

def measure(cell):
    if not fast and cell.level == "reward_literal":
        (folder / "running").touch()
        time.sleep(600)
    return ablate.Result(cell, 1.0, example.report)

ablate.run_missing(ablate.cells(only=["objective"], seeds=[0], changes={{}}), folder, measure)
"""


@pytest.fixture(scope="module")
def ablate():
    spec = importlib.util.spec_from_file_location("ablate", ROOT / "benchmarks" / "ablate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablate"] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ablate"]


def finished(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def test_a_killed_run_loses_only_the_running_cell(tmp_path):
    program = [sys.executable, "-c", PROGRAM.format(benchmarks=str(ROOT / "benchmarks")), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    with subprocess.Popen(program, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (tmp_path / "running").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    before = finished(tmp_path)
    assert {name.split("-")[1] for name in before} == {"soft", "ground_truth", "reward"}

    again = subprocess.run([*program, "fast"], env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "1 of 1: objective=reward_literal" in again.stderr  # progress
    after = finished(tmp_path)
    assert len(after) == 4
    assert before.items() <= after.items()  # finished cells are not run again


def test_cells_made_with_other_options_are_refused_before_anything_runs(tmp_path, ablate):
    (path, *_) = sorted(ablate.RESULTS.glob("*.json"))
    done = ablate.read(path)
    (tmp_path / path.name).write_text(done.to_json())
    other = replace(done.cell, options=done.cell.options | {"max_steps": "7"})
    with pytest.raises(ValueError, match=r"'max_steps': '7'.*name another --output"):
        ablate.run_missing([other], tmp_path, lambda cell: pytest.fail("measured"))
    with pytest.raises(ValueError, match="Unknown factor or level colour; the factors are default"):
        ablate.cells(only=["colour"], seeds=[0], changes={})


def test_every_committed_cell_has_the_options_that_the_program_would_use(ablate):
    paths = sorted(ablate.RESULTS.glob("*.json"))
    assert len(paths) >= 10
    for path in paths:
        done = ablate.read(path)
        known = ablate.cells(only=[done.cell.factor], seeds=[done.cell.seed], changes={})
        assert done.cell in known, path.name
        assert done.cell.file_name == path.name
        assert json.loads(done.to_json()) == json.loads(path.read_text())
        assert {"command", "date", "hardware", "versions"} <= set(done.report.provenance)


def test_one_option_differs_from_the_default(ablate):
    """Exceptions: another kind of adapter, and AdamW, which needs its own learning rate."""
    (default,) = ablate.cells(only=["default"], seeds=[0], changes={})
    for cell in ablate.cells(only=[], seeds=[0], changes={}):
        base = default.options | (ablate.FULL if cell.factor.startswith("full ") else {})
        changed = {name for name, value in cell.options.items() if base.get(name) != value} - {"exact_alpha"}
        assert len(changed) == 1 or cell.factor in ("default", "adapter", "optimizer"), cell.name


def test_seeds_of_a_level_share_a_line(tmp_path, ablate):
    (path, *_) = sorted(ablate.RESULTS.glob("default-*-0.json"))
    done = ablate.read(path)
    for seed in (0, 1):
        cell = replace(done.cell, seed=seed)
        (tmp_path / cell.file_name).write_text(replace(done, cell=cell).to_json())
    lines = [line for line in ablate.table(tmp_path).splitlines() if line.startswith("| default")]
    accelerated = f"{done.row('verified').tokens_per_pass:.2f}"
    assert len(lines) == 1
    assert f"| {accelerated}, {accelerated} |" in lines[0]
    ablate.plot(tmp_path / "plot.png", tmp_path)
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_thresholds_by_position_are_printed_as_the_command_line_takes_them(tmp_path, ablate):
    (path, *_) = sorted(ablate.RESULTS.glob("default-*-0.json"))
    done = ablate.read(path)
    by_position = replace(done.row("verified"), setting=replace(done.row("verified").setting, threshold=(0.9, 0.5)))
    report = replace(done.report, rows=[row for row in done.report.rows if row.setting.kind != "verified"] + [by_position])
    (tmp_path / path.name).write_text(replace(done, report=report).to_json())
    assert "| 0.9/0.5 |" in ablate.table(tmp_path)
