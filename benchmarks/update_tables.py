"""Prints every table of the documents anew from its results: between `<!-- table:NAME -->` and `<!-- /table:NAME -->`
goes docs/results/NAME.json. A test checks that nothing was forgotten.

    python benchmarks/update_tables.py
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))

import exactness  # noqa: E402
import memory  # noqa: E402
import train  # noqa: E402

from mtp_trl.evaluation.report import from_json, markdown, replace_table  # noqa: E402


def table(name: str) -> str:
    """A results file as Markdown, whichever program wrote it."""
    text = (ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8")
    results = json.loads(text)
    if "identical" in results["rows"][0]:
        return exactness.table(results)
    if "gib" in results["rows"][0]:
        return memory.table(results)
    if "places_per_second" in results["rows"][0]:
        return train.table(results)
    return markdown(from_json(text))


def updated() -> dict[Path, str]:
    """Every document that has tables, with its tables as the results have them."""
    documents = {}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- table:(\w+) -->", text):
            text = replace_table(text, name, table(name))
        documents[path] = text
    return documents


if __name__ == "__main__":
    for path, text in updated().items():
        path.write_text(text, encoding="utf-8")
