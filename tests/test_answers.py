"""`mtp-trl generate`: the model's own answers as training data, resumed runs, and refusals."""

import json
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationMixin, PreTrainedTokenizerFast

from mtp_trl import cli
from mtp_trl.evaluation import answer_file, answers
from mtp_trl.evaluation.answers import AnswerSettings, Prompt, encode_prompts, generate_answers
from mtp_trl.evaluation.loading import load_causal_lm, load_tokenizer
from mtp_trl.training.data import prepare_dataset
from mtp_trl.word_problems import test_problems as word_problems

BASE = Path(__file__).resolve().parents[1] / "mtp_trl" / "word_problems" / "base"
# With it, a conversation of one question has the tokens of the plain text.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
TEXTS = [problem.prompt for problem in word_problems(11)[6:]]
NEW_TOKENS = 41  # one answer ends in its last token, one before, and the others are cut


@pytest.fixture(scope="module")
def base():
    return load_causal_lm(BASE)


@pytest.fixture(params=["text", "chat"])
def tokenizer(request):
    tokenizer = load_tokenizer(BASE)
    tokenizer.chat_template = TEMPLATE if request.param == "chat" else None
    return tokenizer


def greedy(model, ids, new_tokens):
    """Return the answer to one prompt by transformers' own `generate`."""
    out = GenerationMixin.generate(model, torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False)
    return out[0, len(ids) :].tolist()


def text_of(tokenizer, ids):
    """Return the text of a prompt and its cut answer. Random models emit incomplete characters."""
    return tokenizer.decode(ids).removeprefix(tokenizer.bos_token).rstrip("\ufffd")


def answer(model, tokenizer, rows, *, column=None, **settings):
    prompts = encode_prompts(rows, tokenizer, column=column)
    batches = generate_answers(model, tokenizer, prompts, AnswerSettings(**settings), progress=False)
    return sorted((row for batch in batches for row in batch), key=lambda row: row["index"])


def test_answers_are_those_of_transformers_and_the_trainer_reads_their_tokens(base, tokenizer):
    """Batched answers, cut ones included, are the greedy ones of single rows, and `prepare_dataset` gets the same tokens."""
    model, _ = base
    rows = answer(model, tokenizer, [{"prompt": text} for text in TEXTS[:4]], max_new_tokens=NEW_TOKENS, batch_size=2)
    prepared = prepare_dataset(Dataset.from_list(rows), tokenizer)
    eos = tokenizer.eos_token_id
    for index, (text, row, trained) in enumerate(zip(TEXTS, rows, prepared, strict=False)):
        ids = tokenizer(text)["input_ids"]
        expected = greedy(model, ids, NEW_TOKENS)
        completion = tokenizer.decode(expected, skip_special_tokens=True)
        if tokenizer.chat_template:
            assert row["prompt"] == [{"role": "user", "content": text}]
            assert row["completion"] == [{"role": "assistant", "content": completion}]
        else:
            assert (row["prompt"], row["completion"]) == (text, completion)
        assert row["finish_reason"] == ("stop" if expected[-1] == eos else "length")
        assert row["index"] == index
        assert (trained["prompt_ids"], trained["completion_ids"]) == (ids, expected)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}


@pytest.mark.parametrize("verify", [False, True])
def test_an_adapted_model_gives_its_single_token_text(verify, tmp_path, write_student):
    """By default, the unverified model would emit untrained blocks."""
    student = write_student(tmp_path / "student", confadapt=0.0, verify=verify)
    model, tokenizer = load_causal_lm(student)
    for row in answer(model, tokenizer, [{"prompt": "Tom has 3"}, {"prompt": "How many?"}], max_new_tokens=12):
        encoded = tokenizer(row["prompt"], return_tensors="pt")
        expected = model.generate(**encoded, max_new_tokens=12, do_sample=False, mtp_k=1, verify=False)
        assert row["prompt"] + row["completion"] == text_of(tokenizer, expected[0])


def test_answers_end_at_the_last_position_and_longer_prompts_are_skipped(tmp_path, write_student, caplog):
    student = write_student(tmp_path / "student", confadapt=0.0, verify=True, positions=32)
    model, tokenizer = load_causal_lm(student)
    texts = ["3 " * 40, "pens " * 12, "Tom has 3"]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert lengths[0] > 32 > lengths[1] + 6 > lengths[2] + 12
    with caplog.at_level(logging.WARNING, logger="mtp_trl.evaluation.answers"):
        rows = answer(model, tokenizer, [{"prompt": text} for text in texts], max_new_tokens=12)
    assert "1 prompts are skipped: they leave no room for an answer in the model's 32 positions" in caplog.text
    assert [(row["index"], row["finish_reason"]) for row in rows] == [(1, "length"), (2, "length")]
    for row, length in zip(rows, lengths[1:], strict=True):
        ids = tokenizer(row["prompt"])["input_ids"]
        expected = text_of(tokenizer, ids + greedy(model, ids, min(12, 32 - length)))
        assert row["prompt"] + row["completion"] == expected
    with pytest.raises(ValueError, match="There is nothing to answer"):
        answer(model, tokenizer, [{"prompt": texts[0]}])


def test_the_first_space_of_an_answer_is_kept_and_half_a_character_is_not():
    pieces = ["▁a", "▁b", "<0xC3>"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    row = answers._row(tokenizer, Prompt({"prompt": "a"}, [0], 0), [1, 2], set(), room=2)
    assert row == {"prompt": "a", "completion": " b", "finish_reason": "length", "index": 0}


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "column", "prompt"),
    [
        ({"prompt": "a", "messages": [ASSISTANT]}, None, [USER]),
        ({"prompt": [USER, ASSISTANT, USER]}, None, [USER, ASSISTANT, USER]),
        ({"messages": [USER, ASSISTANT]}, None, [USER]),
        ({"messages": [USER, ASSISTANT, USER]}, None, [USER, ASSISTANT, USER]),
        ({"question": "a", "prompt": "b"}, "question", [USER]),
    ],
)
def test_prompts_come_from_the_usual_columns(row, column, prompt, base, caplog):
    tokenizer = load_tokenizer(BASE)
    tokenizer.chat_template = TEMPLATE
    (encoded,) = encode_prompts([{**row, **dict.fromkeys([column or next(iter(row))])}, row], tokenizer, column=column)
    assert (encoded.columns, encoded.index) == ({"prompt": prompt}, 1)
    assert "1 empty prompts are skipped" in caplog.text


def test_arguments_of_the_chat_template_are_applied_and_kept(base):
    model, _ = base
    tokenizer = load_tokenizer(BASE)
    tokenizer.chat_template = "{{ prefix }}" + TEMPLATE
    (row,) = answer(model, tokenizer, [{"prompt": "a", "chat_template_kwargs": {"prefix": TEXTS[0]}}], max_new_tokens=3)
    assert row["chat_template_kwargs"] == {"prefix": TEXTS[0]}
    (trained,) = prepare_dataset(Dataset.from_list([row]), tokenizer)
    assert tokenizer.decode(trained["prompt_ids"]).startswith(TEXTS[0])


@pytest.mark.parametrize(
    ("row", "template", "applied", "message"),
    [
        ({"prompt": [USER]}, None, True, "row 0 cannot be used: it is messages, but the tokenizer has no chat template"),
        ({"prompt": [USER]}, TEMPLATE, False, "which need the chat template; leave out --no-chat-template"),
        ({"question": "a"}, None, True, "has no column 'prompt', only question; name the column with --prompt-column"),
        ({"prompt": 3}, None, True, "'prompt' must be text or a list of messages, got int"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(row, template, applied, message):
    tokenizer = load_tokenizer(BASE)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        encode_prompts([row], tokenizer, chat_template=applied)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be >= 0, got -1.0"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_p": 0.9}, "top_p=0.9 has no effect on greedy decoding"),
        ({"seed": 1}, "seed=1 has no effect on greedy decoding"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AnswerSettings(**settings)


def test_samples_differ_by_seed_and_by_repetition(base):
    """Each of the repeated prompts is in a batch of its own. With almost no nucleus, samples are greedy."""
    model, tokenizer = base
    rows = [{"prompt": TEXTS[0]}] * 2
    settings = {"max_new_tokens": 24, "batch_size": 1, "temperature": 3.0}
    first, again = (answer(model, tokenizer, rows, seed=0, **settings) for _ in range(2))
    assert first == again
    other = answer(model, tokenizer, rows, seed=7, **settings)
    assert len({row["completion"] for row in first + other}) == 4
    nucleus = answer(model, tokenizer, rows, top_p=1e-6, **settings)
    assert [row["completion"] for row in nucleus] == [
        row["completion"] for row in answer(model, tokenizer, rows, max_new_tokens=24)
    ]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in TEXTS))
    return path


def generate(prompts, output, *options):
    options = ("--prompt-column", "question", "--max-new-tokens", "6", "--batch-size", "2", *options)
    return cli.main(["generate", str(BASE), str(prompts), "--output", str(output), *options])


def interrupted(*, after):
    """Return a `generate_answers` that is killed after some batches, and the list of the batches that it yields."""
    yielded = []

    def batches(*arguments, **options):
        for batch in generate_answers(*arguments, **options):
            if len(yielded) == after:
                raise KeyboardInterrupt
            yielded.append(batch)
            yield batch

    return batches, yielded


@pytest.mark.parametrize("options", [(), ("--temperature", "0.9")])
@pytest.mark.parametrize("torn", [b'{"prompt": "Question', b'{"prompt": "a", "index": 9}\n{"pro'])
def test_a_resumed_run_writes_the_file_of_an_uninterrupted_one(options, torn, prompts, tmp_path, monkeypatch, capsys):
    """A batch of which only a part was written is made again."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert generate(prompts, whole, *options) == 0
    batches, _ = interrupted(after=1)
    monkeypatch.setattr(answer_file, "generate_answers", batches)
    with pytest.raises(KeyboardInterrupt):
        generate(prompts, output, *options)
    assert not output.exists()
    with (tmp_path / "answers.jsonl.partial").open("ab") as file:
        file.write(torn)
    batches, yielded = interrupted(after=None)
    monkeypatch.setattr(answer_file, "generate_answers", batches)
    assert generate(prompts, output, *options) == 0
    assert [len(batch) for batch in yielded] == [2, 1]
    assert "Resuming after 2 answers." in capsys.readouterr().out
    assert output.read_bytes() == whole.read_bytes()
    assert [json.loads(line)["index"] for line in output.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.glob("answers*")) == ["answers.jsonl", "answers.jsonl.arguments"]


def test_files_made_with_other_arguments_are_never_changed(prompts, tmp_path, monkeypatch, capsys):
    output, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    batches, _ = interrupted(after=1)
    monkeypatch.setattr(answer_file, "generate_answers", batches)
    with pytest.raises(KeyboardInterrupt):
        generate(prompts, output)
    monkeypatch.undo()
    before = partial.read_bytes()
    assert generate(prompts, output, "--max-new-tokens", "7") == 2
    error = capsys.readouterr().err
    assert "answers.jsonl.partial was made with max_new_tokens=6 (now 7); repeat those arguments, choose another" in error
    assert partial.read_bytes() == before
    assert generate(prompts, output) == 0
    before = output.read_bytes()
    monkeypatch.setattr(answer_file, "load_causal_lm", None)  # from here on, nothing is decoded
    assert generate(prompts, output, "--limit", "4") == 2
    assert "answers.jsonl was made with prompts=" in capsys.readouterr().err
    assert generate(prompts, output) == 0
    assert "answers.jsonl is complete: it was made with the same arguments, and has 5 answers, 5" in capsys.readouterr().out
    (tmp_path / "answers.jsonl.arguments").unlink()
    assert generate(prompts, output) == 2
    assert "answers.jsonl.arguments, which would say how it was made, does not; choose another" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_a_run_that_failed_before_its_first_batch_can_be_repeated_with_other_arguments(prompts, tmp_path, monkeypatch):
    output = tmp_path / "answers.jsonl"
    monkeypatch.setattr(answer_file, "generate_answers", interrupted(after=0)[0])
    with pytest.raises(KeyboardInterrupt):
        generate(prompts, output)
    monkeypatch.undo()
    assert generate(prompts, output, "--batch-size", "1") == 0


def test_a_missing_model_is_named(prompts, tmp_path, capsys):
    assert cli.main(["generate", "no_such_folder", str(prompts), "--output", str(tmp_path / "answers.jsonl")]) == 2
    assert "There is no folder 'no_such_folder'" in capsys.readouterr().err
    assert not list(tmp_path.glob("answers*"))


def test_parquet_and_json_lines_give_the_same_answers(prompts, tmp_path):
    table = tmp_path / "prompts.parquet"
    Dataset.from_list([{"question": text} for text in TEXTS]).to_parquet(table)
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for source, output in zip((prompts, table), files, strict=True):
        assert generate(source, output, "--limit", "2") == 0
    assert files[0].read_bytes() == files[1].read_bytes()
