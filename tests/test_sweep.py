"""The sweep's records and table, with a scripted decoder, compared with counts by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mtp_trl.evaluation.sweep import Record, Sweep, aggregate, decoding_settings, evaluate_decoding
from mtp_trl.publishing.report import Estimate, Setting

EOS, PAD = 1, 0


class Letters:
    """A tokenizer with one id per character. Id 0 is the pad token, id 1 is EOS."""

    pad_token_id = PAD

    def __call__(self, texts, *, padding, padding_side, return_tensors):
        assert (padding, padding_side, return_tensors) == (True, "left", "pt")
        width = max(map(len, texts))
        rows = [[PAD] * (width - len(text)) + [ord(c) for c in text] for text in texts]
        ids = torch.tensor(rows)
        return Encoded(input_ids=ids, attention_mask=(ids != PAD).long())

    def decode(self, ids, *, skip_special_tokens):
        return "".join(chr(i) for i in ids if not (skip_special_tokens and i in (EOS, PAD)))


class Encoded(dict):
    def to(self, device):
        return self


class Scripted:
    """A decoder that answers `x` with the characters of `script[x]` and EOS, in blocks of `k` tokens, and records its calls."""

    device = torch.device("cpu")
    config = SimpleNamespace(mtp={"barred_token_ids": [7, 8], "k_max": 4})
    generation_config = SimpleNamespace(eos_token_id=[EOS, 2])

    def __init__(self, script, *, multi_token=True):
        self.script, self.multi_token, self.calls = script, multi_token, []

    def generate(self, *, input_ids, attention_mask, **kwargs):
        self.calls.append(kwargs)
        answers = [[*map(ord, self.script["".join(chr(i) for i in row if i != PAD)]), EOS] for row in input_ids.tolist()]
        width = max(map(len, answers))
        new = torch.tensor([answer + [PAD] * (width - len(answer)) for answer in answers])
        sequences = torch.cat([input_ids, new], dim=1)
        if not self.multi_token:
            return SimpleNamespace(sequences=sequences)
        k = kwargs.get("mtp_k") or 4
        blocks = [[min(k, len(a) - i) for i in range(0, len(a), k)] for a in answers]
        passes = torch.tensor([len(lengths) for lengths in blocks])
        return SimpleNamespace(sequences=sequences, block_lengths=blocks, forward_passes=passes)


SCRIPT = {"a": "1234567", "bb": "22", "ccc": "333"}
PROMPTS = list(SCRIPT)


def sweep(student=None, base=None, settings=None, **kwargs):
    arguments = {"batch_size": 2, "max_new_tokens": 16, "progress": False} | kwargs
    return evaluate_decoding(
        student or Scripted(SCRIPT),
        Letters(),
        PROMPTS,
        settings=settings or decoding_settings(ks=[2], confadapt=[0.9], verified=[0.5]),
        base=base or Scripted(SCRIPT | {"bb": "24"}, multi_token=False),
        **arguments,
    )


def test_records_hold_the_answers_in_the_order_of_the_prompts():
    for answers in sweep().records.values():
        assert [record.text for record in answers][0::2] == ["1234567", "333"]
        for record in answers:
            assert sum(record.blocks) == len(record.token_ids)
            assert record.passes == len(record.blocks)
            assert record.token_ids[-1] == EOS
            assert PAD not in record.token_ids


def test_the_base_counts_one_token_per_pass_including_eos():
    records = sweep().records[Setting("base")]
    assert [record.passes for record in records] == [8, 3, 4]
    assert all(set(record.blocks) == {1} for record in records)


def test_every_setting_passes_all_arguments_so_that_no_default_of_the_folder_applies():
    student, base = Scripted(SCRIPT), Scripted(SCRIPT, multi_token=False)
    settings = decoding_settings(ks=[2], confadapt=[0.9], verified=[0.5], trees=[(3, 0.5)])
    sweep(student, base, settings=settings, batch_size=3)
    names = ("mtp_k", "confadapt", "verify", "mtp_blocks")
    assert [tuple(call.get(name) for name in names) for call in student.calls] == [
        (1, 0.0, False, 1),
        (2, 0.0, False, 1),
        (4, 0.9, False, 1),
        (4, 0.5, True, 1),
        (4, 0.5, True, 3),
    ]
    (call,) = base.calls
    assert call["suppress_tokens"] == [7, 8]
    assert not set(names) & set(call)


def test_rows_equal_counts_by_hand():
    result = sweep(scorer=lambda i, text: text == ["1234567", "22", "no"][i])
    rows = {row.setting.label: row for row in result.rows}
    assert list(rows) == ["base, k=1", "student, k=1", "static k=2", "ConfAdapt 0.9", "verified 0.5"]
    base, static = rows["base, k=1"], rows["static k=2"]
    assert base.accuracy.value == pytest.approx(1 / 3)
    assert static.accuracy.value == pytest.approx(2 / 3)
    # One of three problems is gained against the base: the differences are 0, 1, 0.
    assert static.versus_base == Estimate(pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert static.versus_plain == Estimate(0.0, 0.0)
    assert static.same_as_base == pytest.approx(2 / 3)
    assert static.same_as_plain == 1.0
    assert static.tokens_per_pass == pytest.approx((8 + 3 + 4) / (4 + 2 + 2))
    assert base.tokens_per_pass == 1.0
    assert static.tokens_per_answer == 5.0
    assert static.problems == 3


def test_an_interrupted_evaluation_resumes_where_it_stopped(tmp_path):
    class Interrupted(Scripted):
        def generate(self, **kwargs):
            if len(self.calls) == 4:
                raise KeyboardInterrupt
            return super().generate(**kwargs)

    settings = decoding_settings(ks=[2], verified=[0.5], base=False)
    options = {"settings": settings, "batch_size": 1, "max_new_tokens": 8, "progress": False}
    whole = evaluate_decoding(Scripted(SCRIPT), Letters(), PROMPTS, **options)
    with pytest.raises(KeyboardInterrupt):
        evaluate_decoding(Interrupted(SCRIPT), Letters(), PROMPTS, parts=tmp_path / "parts", **options)
    again = Scripted(SCRIPT)
    resumed = evaluate_decoding(again, Letters(), PROMPTS, parts=tmp_path / "parts", **options)
    assert len(again.calls) == 6  # of nine: the first batch was finished in all three settings

    def timeless(sweep):
        return {setting: [replace(record, seconds=0.0) for record in part] for setting, part in sweep.records.items()}

    assert timeless(resumed) == timeless(whole)


def test_nearly_equal_thresholds_have_separate_rows(tmp_path):
    """Finished parts are identified by their labels, which must not round thresholds."""
    close = [0.9, 0.9999996, 0.9999998, (0.9999996, 0.5), (0.9999998, 0.5)]
    settings = decoding_settings(confadapt=close, base=False)
    assert [setting.label for setting in settings[1:3]] == ["ConfAdapt 0.9", "ConfAdapt 0.9999996"]
    student = Scripted(SCRIPT)
    sweep(student, settings=settings, batch_size=3, parts=tmp_path)
    assert [call.get("confadapt") for call in student.calls] == [0.0, *close]


def test_speed_is_that_of_the_median_batch():
    """The batches of two have 30 tokens in 3 s, 4 tokens in 40 s, and (with one row) 20 tokens in 1 s."""
    times = ((10, 1.0), (20, 2.0), (2, 20.0), (2, 20.0), (20, 1.0))
    records = {Setting("plain"): [Record("", (3,) * n, (n,), 1, s, None) for n, s in times]}
    (row,) = aggregate(records, batch_size=2)
    assert row.tokens_per_second == 10.0


def test_without_a_scorer_there_is_agreement_but_no_accuracy():
    (row, *_) = sweep(scorer=None).rows
    assert (row.accuracy, row.versus_base, row.versus_plain) == (None, None, None)
    assert row.same_as_plain == pytest.approx(2 / 3)


def test_batch_size_does_not_change_answers():
    def answers(result: Sweep):
        return {
            setting: [(r.text, r.token_ids, r.blocks, r.correct) for r in records]
            for setting, records in result.records.items()
        }

    def scorer(i, text):
        return len(text) > 2

    assert answers(sweep(batch_size=1, scorer=scorer)) == answers(sweep(batch_size=3, scorer=scorer))


@pytest.mark.parametrize(
    ("settings", "message"),
    [([Setting("base")], "k=1 is missing"), ([Setting("confadapt", threshold=0.9)], "k=1 is missing")],
)
def test_the_reference_setting_is_required(settings, message):
    with pytest.raises(ValueError, match=message):
        sweep(settings=settings)


def test_empty_input_and_a_missing_base_are_refused():
    arguments = {"settings": [Setting("plain")], "batch_size": 1, "max_new_tokens": 1, "progress": False}
    with pytest.raises(ValueError, match="prompts is empty"):
        evaluate_decoding(Scripted(SCRIPT), Letters(), [], **arguments)
    with pytest.raises(ValueError, match="base is None"):
        evaluate_decoding(Scripted(SCRIPT), Letters(), ["a"], **arguments | {"settings": decoding_settings()})
