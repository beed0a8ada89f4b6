"""Test that a card describes its model and results correctly, and shows untrusted text literally."""

import ast
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest

from mtp_trl import MTPDistillConfig
from mtp_trl.publishing.calibration_file import Calibration, Counts, Step
from mtp_trl.publishing.card import MARK, RESULTS_FOLDER, render_card, write_card
from mtp_trl.publishing.provenance import provenance_of_run
from mtp_trl.publishing.report import escape_markdown, from_json, markdown, to_json

REPORT = from_json((Path(__file__).parents[1] / "docs" / "results" / "tiny_exact.json").read_text())


def provenance(base: str, tmp_path: Path, **changes) -> dict:
    args = MTPDistillConfig(str(tmp_path), use_cpu=True, bf16=False, **(changes or {"ntp_coef": 0.5}))
    return provenance_of_run(base_model=base, args=args, mask_token="<|mtp|>")


def test_a_card_names_its_base_and_its_limits(tmp_path):
    path = write_card(tmp_path, model_name="me/small", provenance=provenance("org/base", tmp_path), repo_id="me/small")
    text = path.read_text()
    assert "base_model: org/base" in text
    assert "base_model_relation: finetune" in text
    assert "trust_remote_code=True" in text
    assert "## Limitations" in text
    assert '"ntp_coef": 0.5' in text
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("adapter_only", [False, True])
def test_a_card_of_exact_mode_says_what_is_exact_and_how_to_use_it(tmp_path, adapter_only):
    facts = provenance("org/base", tmp_path, exact=True, adapter_only=adapter_only)
    text = write_card(tmp_path, model_name="exact", provenance=facts, repo_id="me/exact").read_text()
    assert "Verified decoding returns exactly the\nbase model's text" in text
    assert "confadapt=0.5" in text
    assert "Training changes the model" not in text
    assert ("base_model_relation: adapter" in text) == adapter_only
    assert ('custom_generate="me/exact", trust_remote_code=True' in text) == adapter_only
    assert ('from_pretrained("me/exact", trust_remote_code=True)' in text) != adapter_only
    assert "{%" not in text
    assert "\n\n\n" not in text


def test_a_base_in_a_folder_is_not_presented_as_a_hub_model(tmp_path):
    text = write_card(tmp_path, model_name="small", provenance=provenance(str(tmp_path), tmp_path)).read_text()
    assert "base_model:" not in text
    assert str(tmp_path) not in text


def test_a_card_shows_the_results_in_its_folder_or_says_that_there_are_none(tmp_path):
    facts = provenance("org/base", tmp_path)
    assert "Not measured yet." in render_card(facts, model_name="small")
    (tmp_path / RESULTS_FOLDER).mkdir()
    (tmp_path / RESULTS_FOLDER / "words.json").write_text(to_json(REPORT))
    text = write_card(tmp_path, model_name="small", provenance=facts).read_text()
    assert markdown(REPORT).strip() in text
    assert "Not measured yet" not in text
    assert "words.png" not in text  # there is no such plot
    (tmp_path / RESULTS_FOLDER / "words.png").touch()
    assert "](mtp_results/words.png)" in write_card(tmp_path, model_name="small", provenance=facts).read_text()


def test_the_same_facts_give_the_same_card(tmp_path):
    facts = provenance("org/base", tmp_path)
    first = write_card(tmp_path, model_name="small", provenance=facts).read_text()
    assert write_card(tmp_path, model_name="small", provenance=json.loads(json.dumps(facts))).read_text() == first
    assert MARK in first


def test_a_card_of_an_earlier_version_is_replaced_and_one_of_the_author_is_kept(tmp_path):
    facts = provenance("org/base", tmp_path)
    earlier = "<!-- mtp-trl writes this card anew with every push. Delete this line to keep your own text. -->\nan earlier card"
    (tmp_path / "README.md").write_text(earlier)
    assert "an earlier card" not in write_card(tmp_path, model_name="small", provenance=facts).read_text()
    (tmp_path / "README.md").write_text("mine")
    assert write_card(tmp_path, model_name="small", provenance=facts).read_text() == "mine"


HOSTILE = "</td><script>alert(1)</script> | [x](javascript:alert(1)) ![](http://evil/x.png) `code`\n# heading\n---\n"


def test_untrusted_text_cannot_become_markup(tmp_path):
    facts = provenance("org/base", tmp_path) | {"command": "mtp-trl ` x", "dataset": "a`b<script>"}
    (tmp_path / RESULTS_FOLDER).mkdir()
    hostile = dataclasses.replace(REPORT, title=HOSTILE, provenance=REPORT.provenance | {"command": f"x {HOSTILE}"})
    (tmp_path / RESULTS_FOLDER / "words.json").write_text(to_json(hostile))
    text = write_card(tmp_path, model_name=HOSTILE, repo_id="me/x", provenance=facts).read_text()
    outside_code = "".join(text.replace("```", "").split("`")[::2])
    assert "<script>" not in outside_code
    assert "](javascript" not in outside_code.replace("\\](", "")
    assert "\n# heading" not in text
    assert text.count("\n---\n") == 1  # the end of the metadata


@pytest.mark.parametrize("changes", [{"ntp_coef": 0.5}, {"exact": True}, {"exact": True, "adapter_only": True}], ids=str)
def test_names_and_settings_cannot_escape_their_code_blocks(tmp_path, changes):
    hostile = 'me/x"); import os #`\n```\n<script>'
    facts = provenance("org/base", tmp_path, **changes) | {"mask_token": "<b>`x`", "base_model": hostile}
    facts["objective"] = facts["hardware"] = "`<script>`"
    facts["settings"] |= {"run_name": "\n````\n<script>"}
    text = render_card(facts, model_name="m", repo_id=hostile)
    assert "<script>" not in re.sub(r"(?s)(```+)(?!`).*?\n\1\n|`[^`\n]*`", "", text)
    blocks = re.findall(r"(?s)\n```python\n(.*?)\n```\n", text)
    assert len(blocks) == (1 if changes.get("adapter_only") else 2)
    for block in blocks:
        imported = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Import)]
        assert not imported
        assert hostile in {node.value for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)}
    assert json.loads(re.search(r"(?s)\n(````+)json\n(.*?)\n\1\n", text)[2]) == facts["settings"]


def test_the_limitations_mention_no_hardware_that_was_not_measured(tmp_path):
    text = render_card(provenance("org/base", tmp_path), model_name="x")
    assert "CPU" not in text.split("## Limitations")[1].split("## Training")[0]


@pytest.mark.parametrize("text", ["plain words, 1.5 %", "snake_case_name"])
def test_harmless_text_is_not_escaped(text):
    assert escape_markdown(text) == text


@pytest.mark.parametrize("adapter_only", [False, True])
def test_the_code_blocks_of_a_card_compile(tmp_path, adapter_only):
    text = render_card(provenance("org/base", tmp_path, exact=True, adapter_only=adapter_only), model_name="x", repo_id="me/x")
    blocks = [part.partition("\n")[2] for part in text.split("```")[1::2] if part.startswith("python")]
    assert len(blocks) == (1 if adapter_only else 2)
    for block in blocks:
        compile(block, "card", "exec")


def test_the_committed_cards_are_up_to_date():
    """If this fails, run `python benchmarks/render_cards.py`."""
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("render_cards", root / "benchmarks" / "render_cards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cards = module.rendered()
    assert set(cards) == set((root / "model_cards").glob("*.md"))
    for path, text in cards.items():
        assert path.read_text(encoding="utf-8") == text, path.name
    plots = module.plots()
    assert set(plots) == set((root / "model_cards").rglob("*.png"))
    for path, report in plots.items():
        assert module.is_up_to_date(path, report), f"{path.name} shows outdated results"
    for path, text in cards.items():
        pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
        assert [path.parent / picture for picture in pictures] == [plot for plot in plots if plot.stem == path.stem]
    planned = cards[root / "model_cards" / "llama_exact.md"]
    assert "has not been run yet" in planned
    assert "Not measured yet." in planned
    assert not [line for line in planned.splitlines() if line.startswith("| ")]  # no table without results


HOSTILE_LINE = "2026 <script>x</script> [a](javascript:b) | `c` **d**"


def test_dates_versions_and_hardware_from_files_are_shown_literally(tmp_path):
    """Like results, they may come from a folder of unknown origin."""
    hostile = {
        "date": HOSTILE_LINE,
        "hardware": HOSTILE_LINE,
        "versions": {"torch": HOSTILE_LINE, "transformers": HOSTILE_LINE, HOSTILE_LINE: "1"},
    }
    facts = provenance("org/base", tmp_path) | hostile
    (tmp_path / RESULTS_FOLDER).mkdir()
    report = dataclasses.replace(REPORT, provenance=REPORT.provenance | hostile | {"speeds": HOSTILE_LINE})
    (tmp_path / RESULTS_FOLDER / "words.json").write_text(to_json(report))
    text = write_card(tmp_path, model_name="m", repo_id="me/x", provenance=facts).read_text()
    outside_code = "".join(text.replace("```", "").split("`")[::2])
    assert "<script>" not in outside_code
    assert "](javascript" not in outside_code.replace("\\](", "")
    assert "**d**" not in outside_code


@pytest.mark.parametrize("change", [("batch_size", "1 <b>"), ("problems", "<b>"), ("k", "<b>"), ("max_new_tokens", "<b>")])
def test_a_results_file_with_text_instead_of_a_number_is_refused(change):
    name, value = change
    content = json.loads(to_json(REPORT))
    parent = {"problems": content["rows"][0], "k": content["rows"][2]["setting"]}.get(name, content)
    parent[name] = value
    with pytest.raises(TypeError, match="is not a whole number"):
        from_json(json.dumps(content))


@pytest.mark.parametrize("change", [{"measure": "<b>"}, {"lost": "<b>"}, {"problems": "<b>"}])
def test_a_calibration_file_with_text_instead_of_a_number_is_refused(tmp_path, change):
    calibration = Calibration("accuracy", 0.01, 0.95, 0.7, [Step(0.7, Counts(100, 0, 0, 2.0), 0.001, True)], {})
    calibration.write(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    (content if "measure" in change else content["steps"][0]["counts"]).update(change)
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises((TypeError, ValueError), match=r"whole number|must be one of"):
        Calibration.read(tmp_path / "c.json")
