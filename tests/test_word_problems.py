"""The bundled benchmark: correct arithmetic, a fixed and disjoint test set, a tokenizer for any text, a working base."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtp_trl import word_problems
from mtp_trl.word_problems import Problem, final_answer, load_dataset, train_problems
from mtp_trl.word_problems.generator import TEST_SIZE
from mtp_trl.word_problems.generator import test_problems as held_out
from mtp_trl.word_problems.tokenizer import VOCABULARY, train_tokenizer

BASE = Path(word_problems.__file__).parent / "base"
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def problems():
    return train_problems(3000, seed=7)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def test_every_equation_is_correct(problems):
    for problem in problems:
        for left, sign, right, result in EQUATION.findall(problem.answer):
            a, b, c = int(left), int(right), int(result)
            expected = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
            assert c == expected, problem.answer


def test_the_last_equation_gives_the_result(problems):
    for problem in problems:
        assert int(EQUATION.findall(problem.answer)[-1][3]) == problem.result == final_answer(problem.completion)
        assert 1 <= problem.result <= 999


def test_two_to_five_steps_of_every_operation(problems):
    steps = {len(EQUATION.findall(problem.answer)) for problem in problems}
    assert steps == {2, 3, 4, 5}
    signs = {sign for problem in problems for _, sign, _, _ in EQUATION.findall(problem.answer)}
    assert signs == set("+-*/")


def test_every_number_of_the_question_is_used(problems):
    words = {"twice": 2, "three": 3, "four": 4}
    for problem in problems:
        for number in re.findall(r"\d+", problem.question):
            assert re.search(rf"\b{number}\b", problem.answer), problem
        for word, value in words.items():
            if f"{word} times as" in problem.question or f"{word} as" in problem.question:
                assert f"* {value} =" in problem.answer, problem


def test_no_placeholder_is_left(problems):
    for problem in problems:
        text = problem.prompt + problem.completion
        assert not set(text) & set("{}"), text
        assert "  " not in text


def test_questions_hardly_repeat(problems):
    assert len({problem.question for problem in problems}) > 0.99 * len(problems)


def test_the_stream_is_a_function_of_the_seed():
    assert train_problems(20, seed=3) == train_problems(50, seed=3)[:20]
    assert train_problems(20, seed=3) != train_problems(20, seed=4)


def test_test_set_is_fixed():
    """The 1,000 problems are the same on every Python version, so that published accuracies are comparable."""
    text = "\n".join(problem.prompt + problem.completion for problem in held_out())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "7a696afe393b874a"


def test_test_questions_are_distinct_and_never_in_training(monkeypatch):
    questions = {problem.question for problem in held_out()}
    assert len(questions) == TEST_SIZE == 1000
    # a stream with the seed of the test set must omit all of its questions
    monkeypatch.setattr("random.Random.__init__", lambda self, seed=None: self.seed("word_problems/test"))
    assert not questions & {problem.question for problem in train_problems(1500, seed=0)}


def test_a_shorter_test_set_is_a_prefix_of_the_longer():
    assert held_out(10) == held_out()[:10]


@pytest.mark.parametrize("n", [-1, 1001])
def test_invalid_sizes_are_refused(n):
    with pytest.raises(ValueError, match=f"n={n}"):
        held_out(n)


def test_negative_training_size_is_refused():
    with pytest.raises(ValueError, match="got -2"):
        train_problems(-2, seed=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" 1 + 1 = 2\n#### 2", 2), ("#### 12\n#### 13", 12), ("no answer", None), ("####", None), ("#### 40 apples", 40)],
)
def test_final_answer(text, expected):
    assert final_answer(text) == expected


def test_dataset_has_prompts_and_completions():
    dataset = load_dataset("train", 5, seed=2)
    problem = train_problems(5, seed=2)[4]
    assert dataset[4] == {"prompt": f"Question: {problem.question}\nAnswer:", "completion": f" {problem.answer}"}
    assert load_dataset("test", 3)[0]["prompt"] == held_out(1)[0].prompt


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' and 'test', got 'validation'"):
        load_dataset("validation")


def test_a_problem_is_its_prompt_and_completion():
    problem = Problem("How many?", "1 + 1 = 2\n#### 2", 2)
    assert problem.prompt + problem.completion == "Question: How many?\nAnswer: 1 + 1 = 2\n#### 2"


@pytest.mark.parametrize("text", ["Ünïcode ✓ 漢字 12.5%\t x\n\n  y", "\u0000\u200b🙂 {}<|im_end|>", " "])
def test_tokenizer_encodes_any_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_tokenizer_has_one_token_per_digit(tokenizer):
    tokens = tokenizer.tokenize(" 1234567890 + 12.5 = 3")
    assert all(len(token) == 1 for token in tokens if any(map(str.isdigit, token)))
    assert [token for token in tokens if token.isdigit()] == list("1234567890" + "125" + "3")


def test_a_completion_continues_its_prompt(tokenizer, problems):
    for problem in problems[:300]:
        prompt = tokenizer(problem.prompt)["input_ids"]
        completion = tokenizer(problem.completion, add_special_tokens=False)["input_ids"]
        assert prompt[0] == tokenizer.bos_token_id
        assert prompt + completion == tokenizer(problem.prompt + problem.completion)["input_ids"]


def test_tokenizer_leaves_rows_free_for_the_mask_token(tokenizer):
    config = json.loads((BASE / "config.json").read_text())
    assert len(tokenizer) == VOCABULARY < config["vocab_size"]
    assert config["vocab_size"] % 64 == 0
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_a_trained_tokenizer_is_the_same_after_saving_and_loading(tmp_path):
    trained = train_tokenizer([p.prompt + p.completion for p in train_problems(200, seed=0)], vocabulary=320)
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = held_out(1)[0].prompt
    assert loaded(text)["input_ids"] == trained(text)["input_ids"]
    assert loaded.padding_side == "left"
    assert len(loaded) == 320


def test_base_is_small_and_answers(tokenizer):
    """The published accuracy is in provenance.json. Here the base only has to solve half of 20 problems."""
    assert (BASE / "model.safetensors").stat().st_size <= 8_000_000
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    problems = held_out(20)
    inputs = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=130)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sum(final_answer(text) == problem.result for text, problem in zip(texts, problems, strict=True)) >= 10


def test_base_has_provenance():
    made = json.loads((BASE / "provenance.json").read_text())
    assert made["command"] == "accelerate launch recipes/tiny_base.yaml"
    assert made["evaluation"]["problems"] == 1000
    assert made["evaluation"]["accuracy"] >= 0.7
    assert {"recipe", "date", "hardware", "versions", "seed", "steps", "tokens"} <= set(made)
