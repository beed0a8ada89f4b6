"""Prints every table of the documents anew from its results: between `<!-- table:NAME -->` and `<!-- /table:NAME -->`
goes docs/results/NAME.json. Run it from the repository's root; tests/test_report.py checks that nothing was forgotten.
"""

import re
from pathlib import Path

from mtp_trl.evaluation.report import from_json, markdown, replace_table


def main() -> None:
    for document in [Path("README.md"), *sorted(Path("docs").glob("*.md"))]:
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- table:(\w+) -->", text):
            report = from_json((Path("docs/results") / f"{name}.json").read_text(encoding="utf-8"))
            text = replace_table(text, name, markdown(report))
        document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
