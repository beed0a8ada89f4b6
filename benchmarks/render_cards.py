"""Render model_cards/: one card for each model described there and for each recipe in NOT_YET_RUN.

    python benchmarks/render_cards.py                                             # render all cards
    python benchmarks/render_cards.py --add runs/my_model docs/results/mine.json  # add a model, then render all cards

model_cards/NAME.json describes a model: the provenance that its training run wrote, and the names of its results in
docs/results. A plot is drawn again only if its results have changed. A test checks that all cards and plots are up to date.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mtp_trl.evaluation.tables import plot_pareto
from mtp_trl.modeling.files import PROVENANCE_FILE, write_atomically
from mtp_trl.publishing.calibration_file import CALIBRATION_FILE, Calibration
from mtp_trl.publishing.card import RESULTS_FOLDER, Evidence, read_report, render_card
from mtp_trl.publishing.provenance import provenance_of_run
from mtp_trl.publishing.report import Report, fingerprint
from mtp_trl.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[1]
CARDS, RESULTS = ROOT / "model_cards", ROOT / "docs" / "results"
# Recipes that need GPUs, and their mask tokens: the last reserved token of Llama 3.1, a new token in an unused row of Qwen3.
NOT_YET_RUN = {"llama_exact": "<|reserved_special_token_247|>", "qwen3_exact": "<|mtp|>"}


def reports_of(path: Path) -> dict[str, Report]:
    """Return the results of a trained model, by name."""
    return {name: read_report(RESULTS / f"{name}.json") for name in json.loads(path.read_text(encoding="utf-8"))["results"]}


def described(path: Path) -> str:
    """Return the card of a trained model."""
    model, reports = json.loads(path.read_text(encoding="utf-8")), reports_of(path)
    found = path.with_name(f"{path.stem}.{CALIBRATION_FILE}")
    calibration = Calibration.read(found) if found.is_file() else None
    return render_card(model["provenance"], model_name=path.stem, evidence=Evidence(reports, tuple(reports), calibration))


def planned(recipe: Path, mask_token: str) -> str:
    """Return the card of a recipe that has not been run: the card of its model, without results."""
    read = read_recipe(recipe, ["--use_cpu", "true"])  # without this, reading the recipe needs a GPU
    facts = provenance_of_run(
        base_model=str(read.model.model_name_or_path),
        args=read.training,
        mask_token=mask_token,
        dataset=read.arguments.dataset_name,
    )
    recipe_keys = {*yaml.safe_load(recipe.read_text(encoding="utf-8")), "verify"}  # other settings depend on the machine
    facts["settings"] = {name: value for name, value in facts["settings"].items() if name in recipe_keys}
    command = f"accelerate launch recipes/{recipe.name}"
    facts |= {"command": command, "date": None, "hardware": None, "versions": None}
    return render_card(facts, model_name=recipe.stem)


def descriptions() -> list[Path]:
    """Return the files that describe a model, without the calibration files in the same folder."""
    return [path for path in sorted(CARDS.glob("*.json")) if path.stem.isidentifier()]


def plots() -> dict[Path, Report]:
    """Return the path of each plot that a card shows, and the results that it is drawn from."""
    return {
        CARDS / RESULTS_FOLDER / f"{name}.png": report for path in descriptions() for name, report in reports_of(path).items()
    }


def is_up_to_date(path: Path, report: Report) -> bool:
    """Whether a plot exists and shows this report."""
    if not path.is_file():
        return False
    with Image.open(path) as image:
        return bool(image.info.get("Source") == fingerprint(report))


def rendered() -> dict[Path, str]:
    """Return the text of every card by its path."""
    cards = {path.with_suffix(".md"): described(path) for path in descriptions()}
    for name, mask_token in NOT_YET_RUN.items():
        cards[CARDS / f"{name}.md"] = planned(ROOT / "recipes" / f"{name}.yaml", mask_token)
    return cards


def add(folder: Path, results: list[Path]) -> None:
    """Write the description of a trained model to model_cards/, under the name of its folder."""
    made: dict[str, Any] = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
    text = json.dumps({"results": [path.stem for path in results], "provenance": made}, indent=2) + "\n"
    write_atomically(CARDS / f"{folder.resolve().name}.json", text)
    if (folder / CALIBRATION_FILE).is_file():
        Calibration.read(folder / CALIBRATION_FILE).write(CARDS / f"{folder.resolve().name}.{CALIBRATION_FILE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--add", type=Path, nargs="+", metavar="PATH", help="a model's folder, then its result files in docs/results"
    )
    options = parser.parse_args()
    CARDS.mkdir(exist_ok=True)
    if options.add:
        add(options.add[0], options.add[1:])
    for path, report in plots().items():
        path.parent.mkdir(exist_ok=True)
        if not is_up_to_date(path, report):
            plot_pareto(report, path)
            print(path.relative_to(ROOT))
    for path, text in rendered().items():
        write_atomically(path, text)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
