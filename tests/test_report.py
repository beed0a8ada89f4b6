"""Test that a report can be written and read, shows the same values in every format, and that the tables in the docs match."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from mtp_trl.evaluation.sweep import Record, Sweep, aggregate, decoding_settings
from mtp_trl.evaluation.tables import plot_pareto, terminal_table, write_report
from mtp_trl.publishing.report import Report, Setting, from_json, markdown, replace_table, to_json

ROOT = Path(__file__).resolve().parents[1]
PROVENANCE = {
    "command": "mtp-trl demo",
    "date": "2026-11-22",
    "hardware": "CPU (2 cores)",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
}


def record(n, blocks, correct, text="The answer | is\n#### 7"):
    return Record(text, tuple(range(3, 3 + n)), tuple(blocks), len(blocks), 0.1, correct)


def make_sweep(*, scored=True):
    records = {}
    for i, setting in enumerate(decoding_settings(ks=[2, 4], confadapt=[0.9, 0.7], verified=[0.5])):
        step = 1 + i
        blocks = [step] * (12 // step) + ([12 % step] if 12 % step else [])
        records[setting] = [record(12, blocks, (p % 4 != 0 and p > i) if scored else None) for p in range(20)]
    return Sweep(records, aggregate(records, batch_size=4), batch_size=4, max_new_tokens=64)


def make_report(sweep=None, **changes):
    sweep = sweep or make_sweep()
    fields = {"title": "word problems", "rows": sweep.rows, "batch_size": 4, "max_new_tokens": 64}
    return Report(**fields | {"provenance": PROVENANCE} | changes)


def test_json_round_trip_keeps_every_number():
    report = make_report(single=make_sweep().rows)
    assert from_json(to_json(report)) == report


def test_an_undefined_standard_error_is_null_in_json():
    records = {Setting("plain"): [record(3, [3], True)]}
    text = to_json(make_report(rows=aggregate(records, batch_size=4)))
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert math.isnan(from_json(text).rows[0].accuracy.standard_error)


def test_markdown_has_one_line_per_setting_and_as_many_cells_as_titles():
    report = make_report(single=make_sweep().rows)
    lines = markdown(report).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(report.rows)
    assert {line.count("|") for line in table} == {len(report.header) + 1}
    assert "± is one standard error" in lines[-1]
    assert "2026-11-22" in lines[-1]


def test_cells_show_the_values_of_their_row():
    row = dict(zip(make_report().header, make_report().cells[2], strict=True))
    source = make_report().rows[2]
    assert row["decoding"] == "static k=2"
    assert row["accuracy, %"] == f"{100 * source.accuracy.value:.1f} ± {100 * source.accuracy.standard_error:.1f}"
    assert row["vs base"].startswith("-10.0 ± ")
    assert row["tokens per pass"] == "3.00"


def test_a_reference_is_not_compared_with_itself():
    base, plain = make_report().cells[:2]
    assert base[2:6] == ["-"] * 4
    assert plain[3] == plain[5] == "-"
    assert plain[2] != "-"


def test_terminal_shows_the_same_cells():
    console = Console(width=80, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print(terminal_table(make_report(single=make_sweep().rows)))
    shown = console.export_text()
    console.file.close()
    for cells in make_report().cells:
        for cell in cells:
            assert cell.replace(" ± ", "±") in shown


def test_write_report_writes_complete_files_and_leaves_no_others(tmp_path):
    sweep = make_sweep()
    written = write_report(tmp_path / "out", make_report(sweep), sweep)
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 20 * len(sweep.rows)
    assert answers[0].keys() == {"decoding", "problem", "text", "token_ids", "blocks", "passes", "seconds", "correct"}
    with Image.open(tmp_path / "out" / "pareto.png") as plot:
        assert plot.size == (1280, 800)


def test_an_unscored_sweep_has_a_table_and_no_plot(tmp_path):
    sweep = make_sweep(scored=False)
    written = write_report(tmp_path, make_report(sweep), sweep)
    assert [path.name for path in written] == ["results.md", "results.json", "answers.jsonl"]
    with pytest.raises(ValueError, match="without a scorer"):
        plot_pareto(make_report(sweep), tmp_path / "plot.png")


def test_replace_table_touches_only_what_is_between_the_markers():
    text = "a\n<!-- table:x -->\nold\n<!-- /table:x -->\nb\n"
    assert replace_table(text, "x", "| new |\n") == "a\n<!-- table:x -->\n| new |\n<!-- /table:x -->\nb\n"
    assert replace_table(replace_table(text, "x", "| n |"), "x", "| n |") == replace_table(text, "x", "| n |")
    with pytest.raises(ValueError, match="table:y"):
        replace_table(text, "y", "")


@pytest.fixture
def update_tables():
    spec = importlib.util.spec_from_file_location("update_tables", ROOT / "benchmarks" / "update_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_summary_prints_thresholds_by_position(update_tables):
    row = from_json((ROOT / "docs" / "results" / "tiny_exact_long.json").read_text("utf-8")).rows[-1]
    by_position = replace(row, setting=Setting("verified", threshold=(0.9, 0.5)), tokens_per_pass=3.0)
    assert update_tables._fastest([by_position], "verified") == "3.00 at 0.9/0.5"


def test_the_tables_in_the_docs_match_the_results(update_tables):
    """If this fails, run `python benchmarks/update_tables.py`."""
    documents = update_tables.updated()
    assert sum(text.count("<!-- table:") for text in documents.values()) >= 5
    for document, text in documents.items():
        assert document.read_text("utf-8") == text, document.name
