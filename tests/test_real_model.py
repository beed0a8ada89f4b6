"""The programs for a real model, at toy size: its answers, its training data and its measurements."""

import json
from argparse import Namespace

import pytest
import real_model
import real_text
import torch
from decoding_reference import with_random_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mtp_trl import attach_decoder
from mtp_trl.publishing.repository import write_decoder

TEMPLATE = (
    "{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained("mtp_trl/word_problems/base")
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=768,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    tokenizer.save_pretrained(tmp_path / "base")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def prompts(tmp_path):
    folder = tmp_path / "data"
    for name in ("gsm8k/train", "gsm8k/test"):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"question": f"What is {i} + {i}?", "answer": "x"}) + "\n" for i in range(6)))
    for name in ("train_mixed", *(file.split("/")[1] for file, _ in real_text.SETS.values() if file.startswith("prompts"))):
        path = folder / "prompts" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = [{"prompt": [{"role": "user", "content": f"Say {name} {i} times."}]} for i in range(6)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_recorded_answers_are_complete_rows():
    rows = real_model.read_answers()
    assert len({(row["file"], row["index"]) for row in rows}) == len(rows) > 500
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    assert {row["file"] for row in rows} == set(real_model.PROMPTS)
    assert all(list(row) == ["file", "index", "answer", "finish_reason"] for row in rows)
    assert real_model.ANSWERS.stat().st_size < 4_000_000


def test_missing_answers_are_generated_once_and_become_training_data(base, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(real_model, "ANSWERS", tmp_path / "answers" / "answers.jsonl.gz")
    monkeypatch.setattr(real_model, "PROMPTS", {"gsm8k/train": 4, "prompts/train_mixed": 3})
    monkeypatch.setattr(real_model, "LONGEST_ANSWER", 4)
    real_model.generate_missing(base, prompts)
    rows = real_model.read_answers()
    assert [row["file"] for row in rows] == ["gsm8k/train"] * 4 + ["prompts/train_mixed"] * 3
    made = real_model.ANSWERS.read_bytes()
    real_model.write_answers(rows[1:-1])  # two answers are missing, as after an interruption
    real_model.generate_missing(base, prompts)
    assert real_model.ANSWERS.read_bytes() == made

    real_model.write_data(prompts, tmp_path)
    sets = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "train_math")
    }
    answered = [row for row in rows if row["answer"].strip()]
    assert len(sets["train"]) == len(answered)
    assert len(sets["train_math"]) == sum(row["file"] == "gsm8k/train" for row in answered)
    by_prompt = {row["prompt"][0]["content"]: row for row in sets["train"]}
    for row in answered:
        prompt = real_model.read_prompts(row["file"], prompts)[row["index"]][0]["content"]
        assert by_prompt[prompt]["completion"] == [{"role": "assistant", "content": row["answer"]}]
        assert by_prompt[prompt]["finish_reason"] == row["finish_reason"]


def test_a_folder_without_the_prompts_is_an_error_that_says_where_to_look(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"real_model\.py --help"):
        real_model.read_prompts("gsm8k/train", tmp_path)


@pytest.fixture
def bench(base, prompts, tmp_path, monkeypatch):
    """Return a function that measures for some minutes, with every size reduced."""
    model = attach_decoder(AutoModelForCausalLM.from_pretrained(base))
    model.config.mtp = {"mask_token": "<|mtp|>", "mask_token_id": 5, "k_max": 4, "barred_token_ids": [5], "exact": True}
    model.generation_config.update(confadapt=0.3, verify=True, allow_custom_entries=True)
    write_decoder(tmp_path / "adapter", with_random_adapter(model), {"base_model": str(base)})
    monkeypatch.setattr(real_text, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(real_text, "SETS", {name: (file, 4) for name, (file, _) in real_text.SETS.items()})
    monkeypatch.setattr(real_text, "SPEED_PROMPTS", {1: 1, 2: 2})
    monkeypatch.setattr(real_text, "CONTEXTS", (64,))
    monkeypatch.setattr(real_text, "LONGEST_ANSWER", 6)
    monkeypatch.setattr(real_text, "SPEED_TOKENS", 4)

    def run(minutes):
        options = Namespace(base=base, prompts=prompts, adapter=[("mixed", tmp_path / "adapter")], minutes=minutes)
        measured = real_text.Bench(options)
        measured.run()
        return measured.results

    return run


def test_measurements_resume_and_print_their_tables(bench, tmp_path, monkeypatch):
    assert not bench(minutes=0)["cells"]
    results = bench(minutes=60)
    cells = results["cells"]
    assert {name.split("/")[0] for name in cells} == {"text", "speed", "loss", "context"}
    verified = [cell for name, cell in cells.items() if name.startswith("text") and "float32" in name]
    assert verified
    assert all(cell["identical"] == cell["prompts"] > 0 for cell in verified)
    assert all(cell["tokens"] >= cell["passes"] for cell in verified)

    for kind in ("text", "speed", "loss", "context"):  # nothing is measured again
        monkeypatch.setattr(real_text.Bench, kind, lambda *_: pytest.fail("measured twice"))
    assert bench(minutes=60) == results
    text = real_text.table(json.loads((tmp_path / "results.json").read_text()))
    assert "| mixed | float32 | 1 | 0.3 |" in text
    assert "transformers, prompt lookup" in text
    assert "ConfAdapt, unverified" in text
    assert "context, tokens" in text
