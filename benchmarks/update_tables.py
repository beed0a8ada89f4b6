"""Updates the tables of README.md and docs/ from their results. The text between `<!-- table:NAME -->` and
`<!-- /table:NAME -->` comes from docs/results/NAME.json, or from a folder NAME of such files. A test checks that all tables are
up to date.

    python benchmarks/update_tables.py
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))

import ablate  # noqa: E402
import agreement  # noqa: E402
import architectures  # noqa: E402
import calibration  # noqa: E402
import decode  # noqa: E402
import exactness  # noqa: E402
import memory  # noqa: E402
import serve  # noqa: E402
import train  # noqa: E402

from mtp_trl.publishing.report import TableRow, from_json, markdown, replace_table, threshold_text  # noqa: E402

RESULTS = ROOT / "docs" / "results"
RUNS = {
    "tiny_exact": "exact mode, the demo",
    "tiny_exact_long": "exact mode, longer",
    "tiny": "full fine-tuning, as short",
    "tiny_long": "full fine-tuning, longer",
}


def table(name: str) -> str:
    """Return the results of any of the programs as a Markdown table."""
    if name == "summary":
        return summary()
    if (RESULTS / name).is_dir():
        return ablate.table(RESULTS / name)
    text = (RESULTS / f"{name}.json").read_text(encoding="utf-8")
    results = json.loads(text)
    if "built" in results["rows"][0]:
        return architectures.table(results)
    if "identical" in results["rows"][0]:
        return exactness.table(results)
    if "way" in results["rows"][0] and "same_as_greedy" in results["rows"][0]:
        return decode.table(results)
    if "max_drop" in results["rows"][0]:
        return calibration.table(results)
    if "gib" in results["rows"][0]:
        return memory.table(results)
    if "history" in results["rows"][0]:
        return agreement.table(results)
    if "positions_per_second" in results["rows"][0]:
        return train.table(results)
    if "time_to_first_token" in results["rows"][0]:
        return serve.table(results)
    return markdown(from_json(text))


def summary() -> str:
    """Return a table with a line for each run in `RUNS`."""
    lines = [
        "| run | problems | k=1 vs base, points | verified: tokens per pass | 8 blocks | ConfAdapt within 1 point of k=1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, label in RUNS.items():
        rows = from_json((RESULTS / f"{name}.json").read_text(encoding="utf-8")).rows
        accurate = [row for row in rows if row.versus_plain is None or row.versus_plain.value >= -0.01]
        (plain,) = (row for row in rows if row.setting.kind == "plain")
        assert plain.versus_base is not None
        drift = f"{100 * plain.versus_base.value:+.1f} ± {100 * plain.versus_base.standard_error:.1f}"
        best = (_fastest(rows, "verified"), _fastest(rows, "tree"), _fastest(accurate, "confadapt"))
        lines.append(f"| {label} (`recipes/{name}.yaml`) | {plain.problems} | {drift} | " + " | ".join(best) + " |")
    return "\n".join(lines)


def _fastest(rows: list[TableRow], kind: str) -> str:
    row = max((row for row in rows if row.setting.kind == kind), key=lambda row: row.tokens_per_pass, default=None)
    return "-" if row is None else f"{row.tokens_per_pass:.2f} at {threshold_text(row.setting.threshold)}"


def updated() -> dict[Path, str]:
    """Return README.md and every document of docs/ with its tables updated."""
    documents = {}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- table:(\w+) -->", text):
            is_measured = f"<!-- table:{name} -->\nNot measured yet" not in text or (RESULTS / f"{name}.json").is_file()
            if is_measured:
                text = replace_table(text, name, table(name))
        documents[path] = text
    return documents


if __name__ == "__main__":
    for path, text in updated().items():
        path.write_text(text, encoding="utf-8")
