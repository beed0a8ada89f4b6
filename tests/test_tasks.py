"""Held-out prompts: bundled prompts, files with and without answers, and invalid files."""

import json

import pytest

from mtp_trl.evaluation.tasks import load_task, result
from mtp_trl.word_problems import test_problems


def write(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_bundled_prompts_score_only_their_own_answers():
    task = load_task("word_problems", limit=5)
    problems = test_problems(5)
    assert task.prompts == [problem.prompt for problem in problems]
    for i, problem in enumerate(problems):
        assert task.scorer(i, problem.completion)
        assert not task.scorer(i, f"nonsense\n#### {problem.result + 1}")
        assert not task.scorer(i, str(problem.result))


def test_a_file_of_worked_answers_is_scored(tmp_path):
    rows = [{"prompt": "a", "completion": "so #### 1,234"}, {"prompt": "b", "completion": "#### -2"}]
    task = load_task(write(tmp_path, rows))
    assert task.prompts == ["a", "b"]
    assert task.scorer(0, "x #### 1234\nand more")
    assert task.scorer(1, "####-2")
    assert not task.scorer(1, "#### 2")


def test_other_columns_can_be_named(tmp_path):
    task = load_task(write(tmp_path, [{"question": "q", "answer": "#### 3"}]), prompt="question", completion="answer")
    assert task.prompts == ["q"]
    assert task.scorer(0, "#### 3")


@pytest.mark.parametrize("row", [{"prompt": "b"}, {"prompt": "b", "completion": "no number"}])
def test_a_file_with_an_unknown_answer_is_decoded_without_scores(tmp_path, row):
    assert load_task(write(tmp_path, [{"prompt": "a", "completion": "#### 1"}, row])).scorer is None


def test_limit_takes_the_first_rows(tmp_path):
    path = write(tmp_path, [{"prompt": str(i)} for i in range(5)])
    assert load_task(path, limit=2).prompts == ["0", "1"]
    assert len(load_task(path).prompts) == 5
    with pytest.raises(ValueError, match="limit must be >= 1, got 0"):
        load_task(path, limit=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no lines"),
        ('{"prompt": "a"}\nnot json\n', "line 2 is not JSON"),
        ('{"question": "a"}\n', "line 1 has no text column 'prompt', only: question"),
        ("[1]\n", "line 1 is a JSON list, not an object"),
    ],
)
def test_invalid_files_are_refused_with_the_line(tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_task(str(path))


def test_line_ends_inside_of_text_and_a_byte_order_mark_are_accepted(tmp_path):
    path, texts = tmp_path / "data.jsonl", ["a\u2028b", "c\x85d"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    path.write_bytes("".join(line + "\r\n" for line in lines).encode("utf-8-sig"))
    assert load_task(str(path)).prompts == texts


def test_a_file_in_another_encoding_is_refused_with_the_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2 is not UTF-8 \(byte 0xff\)"):
        load_task(str(path))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="word_problem_s"):
        load_task("word_problem_s")


@pytest.mark.parametrize(
    ("text", "number"),
    [("#### 12", "12"), ("a\n#### 1,000.5 b", "1000.5"), ("#### x", None), ("12", None), ("#### 1 #### 2", "1")],
)
def test_result_is_the_first_number_after_the_marker(text, number):
    assert result(text) == number
