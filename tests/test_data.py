"""`prepare_dataset`: TRL's conventions for ids, the supported columns, and errors for data that cannot be used."""

import logging

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from mtp_trl.training.data import column_names, format_columns, prepare_dataset, rename_columns

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(*, bos=True, template=None, adds_eos=False, merges=()):
    """Make a byte-level tokenizer. `merges` adds tokens of two characters, which can span prompt and completion."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>", *alphabet, *("".join(m) for m in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    frame = f"{'<bos> ' if bos else ''}$A{' <eos>' if adds_eos else ''}"
    backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("<bos>", 0), ("<eos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<|im_end|>" if template else "<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def texts(tokenizer, row):
    return tokenizer.decode(row["prompt_ids"]), tokenizer.decode(row["completion_ids"])


def rows(**columns):
    return Dataset.from_dict(columns)


def chat(user, assistant):
    return [{"role": "user", "content": user}], [{"role": "assistant", "content": assistant}]


def test_text_pairs_have_bos_once_and_end_in_eos():
    tokenizer = make_tokenizer()
    (row,) = prepare_dataset(rows(prompt=["Q: 1+1?"], completion=[" 2"]), tokenizer)
    assert texts(tokenizer, row) == ("<bos>Q: 1+1?", " 2<eos>")
    assert row["prompt"] == "Q: 1+1?"


@pytest.mark.parametrize("completion", [" 2", " 2<eos>"])
def test_an_existing_eos_is_not_doubled(completion):
    tokenizer = make_tokenizer()
    (row,) = prepare_dataset(rows(prompt=["a"], completion=[completion]), tokenizer)
    assert texts(tokenizer, row)[1] == " 2<eos>"


def test_the_eos_that_a_tokenizer_appends_to_the_prompt_is_removed():
    tokenizer = make_tokenizer(adds_eos=True)
    (row,) = prepare_dataset(rows(prompt=["a"], completion=["b"]), tokenizer)
    assert texts(tokenizer, row) == ("<bos>a", "b<eos>")


def test_no_token_spans_prompt_and_completion():
    tokenizer = make_tokenizer(merges=[("a", "b")])
    (row,) = prepare_dataset(rows(prompt=["xa"], completion=["bab"]), tokenizer)
    assert row["prompt_ids"] == tokenizer("xa")["input_ids"]
    assert row["completion_ids"] == tokenizer("bab", add_special_tokens=False)["input_ids"] + [1]


@pytest.mark.parametrize("template", [None, CHATML])
def test_ids_are_those_of_sft(template, tmp_path):
    """The ids are those that trl.SFTTrainer trains on, except for white space that it keeps after a turn's last token."""
    import transformers

    tokenizer = make_tokenizer(template=template)
    prompt, completion = chat("1+1?", "It is 2.") if template else ("1+1?", " It is 2.")
    dataset = rows(prompt=[prompt], completion=[completion])
    (ours,) = prepare_dataset(dataset, tokenizer)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    arguments = SFTConfig(tmp_path, use_cpu=True, bf16=False, report_to="none", activation_checkpointing=False)
    trainer = SFTTrainer(transformers.LlamaForCausalLM(config), arguments, None, dataset, processing_class=tokenizer)
    (theirs,) = trainer.train_dataset
    ids = ours["prompt_ids"] + ours["completion_ids"]
    assert theirs["input_ids"][: len(ids)] == ids
    assert tokenizer.decode(theirs["input_ids"][len(ids) :]).strip() == ""
    learned = sum(label != -100 for label in theirs["labels"])
    assert learned == len(theirs["input_ids"]) - len(ours["prompt_ids"])


def test_chat_template_is_applied_and_the_turn_ends_the_completion():
    tokenizer = make_tokenizer(template=CHATML)
    prompt, completion = chat("hi", "hello")
    (row,) = prepare_dataset(rows(prompt=[prompt], completion=[completion]), tokenizer)
    assert texts(tokenizer, row) == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "hello<|im_end|>")
    assert row["prompt"] == prompt


def test_a_template_that_ends_turns_without_a_token_gets_eos():
    tokenizer = make_tokenizer(template="{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}")
    prompt, completion = chat("hi", "hello")
    (row,) = prepare_dataset(rows(prompt=[prompt], completion=[completion]), tokenizer)
    assert texts(tokenizer, row) == ("u:hi\n", "a:hello\n<|im_end|>")


@pytest.mark.parametrize("reason", [None, "stop", "length"])
@pytest.mark.parametrize("adds_eos", [False, True])
def test_a_cut_text_has_no_end(reason, adds_eos):
    tokenizer = make_tokenizer(adds_eos=adds_eos)
    end = "" if reason == "length" else "<eos>"
    (row,) = prepare_dataset(rows(prompt=["a"], completion=["bc"], finish_reason=[reason]), tokenizer)
    assert texts(tokenizer, row) == ("<bos>a", f"bc{end}")
    (row,) = prepare_dataset(rows(text=["abc"], finish_reason=[reason]), tokenizer)
    assert texts(tokenizer, row) == ("<bos>", f"abc{end}")


# It trims messages, and opens the last answer with an empty thought unless it has one, as Qwen3's template does.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' and '</think>' not in "
    "m['content'] %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [CHATML, THINKING])
@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_a_cut_answer_continues_its_prompt_and_has_no_end(template, form):
    tokenizer = make_tokenizer(template=template)
    prompt, completion = chat("hi", "<think>\nA greeting, ")
    columns = {"messages": [prompt + completion]} if form == "messages" else {"prompt": [prompt], "completion": [completion]}
    (row,) = prepare_dataset(rows(**columns, finish_reason=["length"]), tokenizer)
    assert texts(tokenizer, row)[1] == "<think>\nA greeting, "
    (ended,) = prepare_dataset(rows(**columns, finish_reason=["stop"]), tokenizer)
    assert ended == prepare_dataset(rows(**columns), tokenizer)[0]
    assert texts(tokenizer, ended)[1].endswith("A greeting,<|im_end|>" if template == THINKING else "A greeting, <|im_end|>")


@pytest.mark.parametrize(
    ("message", "reason", "error"),
    [
        ({"content": "b"}, "content_filter", "finish_reason is 'content_filter', but must be 'stop' .* or 'length'"),
        ({"content": "b", "reasoning_content": "Hm"}, "length", "text in `content` alone, but it has 'reasoning_content'"),
        ({"content": [{"type": "text", "text": "b"}]}, "length", "text in `content` alone, but it has list"),
    ],
)
def test_a_finish_reason_that_cannot_be_honoured_is_refused(message, reason, error):
    prompt, _ = chat("a", "b")
    dataset = rows(prompt=[prompt], completion=[[{"role": "assistant", **message}]], finish_reason=[reason])
    with pytest.raises(ValueError, match=f"Row 0 of the train set: .*{error}"):
        prepare_dataset(dataset, make_tokenizer(template=CHATML))


def test_messages_are_the_same_as_prompt_and_completion():
    tokenizer = make_tokenizer(template=CHATML)
    prompt, completion = chat("hi", "hello")
    pair = prepare_dataset(rows(prompt=[prompt], completion=[completion]), tokenizer)
    assert prepare_dataset(rows(messages=[prompt + completion]), tokenizer).to_list() == pair.to_list()


@pytest.mark.parametrize(("bos", "first"), [(True, "<bos>"), (False, "o")])
def test_the_first_token_of_plain_text_is_the_prompt(bos, first):
    tokenizer = make_tokenizer(bos=bos)
    (row,) = prepare_dataset(rows(text=["once"]), tokenizer)
    assert texts(tokenizer, row) == (first, "once<eos>" if bos else "nce<eos>")
    assert row["prompt"] == first


def test_prompt_only_data_keeps_only_its_prompts():
    prepared = prepare_dataset(rows(prompt=["a", "b"], source=["x", "y"]), make_tokenizer())
    assert prepared.to_list() == [{"prompt": "a"}, {"prompt": "b"}]


def test_other_columns_are_dropped():
    prepared = prepare_dataset(rows(prompt=["a"], completion=["b"], id=[3]), make_tokenizer())
    assert prepared.column_names == ["prompt", "prompt_ids", "completion_ids"]


def test_column_map_renames():
    dataset = rows(question=["a"], answer=["b"])
    mapped = prepare_dataset(dataset, make_tokenizer(), column_map={"question": "prompt", "answer": "completion"})
    plain = prepare_dataset(rows(prompt=["a"], completion=["b"]), make_tokenizer())
    assert mapped.to_list() == plain.to_list()


@pytest.mark.parametrize(
    ("column_map", "message"),
    [
        ({"questions": "prompt"}, "has the columns 'question', 'answer'; did you mean 'question'"),
        ({"question": "answer"}, "has a column 'answer' already"),
    ],
)
def test_a_wrong_column_map_names_the_columns(column_map, message):
    with pytest.raises(ValueError, match=message):
        rename_columns(rows(question=["a"], answer=["b"]), column_map)


def test_unknown_columns_are_named():
    with pytest.raises(ValueError, match="columns 'question', 'answer', but needs"):
        prepare_dataset(rows(question=["a"], answer=["b"]), make_tokenizer())


def test_null_filled_columns_are_refused():
    with pytest.raises(ValueError, match="'completion' of the train set is null in 1 of the first 2 rows"):
        prepare_dataset(rows(prompt=["a", "b"], completion=["c", None]), make_tokenizer())


def test_the_mask_token_in_the_text_is_refused():
    with pytest.raises(ValueError, match=r"Row 1 of the train set: .*mask token '<\|mtp\|>'"):
        prepare_dataset(rows(prompt=["a", "b"], completion=["c", "d <|mtp|>"]), make_tokenizer(), mask_token="<|mtp|>")


def test_dropped_and_truncated_rows_are_counted(caplog):
    tokenizer = make_tokenizer()
    dataset = rows(prompt=["a", "b", "long prompt", "c"], completion=["x", " ", "y", "0123456789"])
    with caplog.at_level(logging.WARNING, logger="mtp_trl.training.encoding"):
        prepared = prepare_dataset(dataset, tokenizer, max_length=6)
    assert [texts(tokenizer, row) for row in prepared] == [("<bos>a", "x<eos>"), ("<bos>c", "0123")]
    assert "1 rows dropped for an empty completion" in caplog.text
    assert "1 rows dropped for a prompt of max_length=6 tokens or more" in caplog.text
    assert "1 rows truncated to max_length=6 tokens; 2 rows remain" in caplog.text


def test_a_dataset_without_usable_rows_is_refused():
    with pytest.raises(ValueError, match="No row of the eval set is left to train on: 2 rows dropped for an empty completion"):
        prepare_dataset(rows(prompt=["a", "b"], completion=["", "\n"]), make_tokenizer(), desc="eval")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"messages": [[{"role": "user", "content": "hi"}]]},
            r"end with the assistant's turn, got the roles \['user'\]",
        ),
        (
            {"prompt": ["a"], "completion": [[{"role": "assistant", "content": "b"}]]},
            "both must be text, or both messages",
        ),
        ({"prompt": [[{"role": "user", "content": "a"}]], "completion": ["b"]}, "both must be messages, or both text"),
    ],
)
def test_malformed_rows_are_refused_with_their_number(columns, message):
    with pytest.raises(ValueError, match=f"Row 0 of the train set: .*{message}"):
        prepare_dataset(rows(**columns), make_tokenizer(template=CHATML))


def test_conversations_need_a_chat_template():
    prompt, completion = chat("a", "b")
    with pytest.raises(ValueError, match="no chat template"):
        prepare_dataset(rows(prompt=[prompt], completion=[completion]), make_tokenizer())


def test_a_template_that_rewrites_the_prompt_is_refused():
    template = "{{ messages | length }}" + CHATML
    prompt, completion = chat("a", "b")
    with pytest.raises(ValueError, match="renders the prompt on its own differently"):
        prepare_dataset(rows(prompt=[prompt], completion=[completion]), make_tokenizer(template=template))


def test_an_empty_prompt_without_bos_is_refused():
    with pytest.raises(ValueError, match="adds no BOS"):
        prepare_dataset(rows(prompt=[""], completion=["b"]), make_tokenizer(bos=False))


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        prepare_dataset(rows(prompt=["a"], completion=["b"]), tokenizer)


def test_streamed_data_gives_the_same_rows():
    columns = {"prompt": ["a", "b"], "completion": ["c", "d"]}
    streamed = IterableDataset.from_generator(lambda: iter(rows(**columns)))
    assert column_names(streamed) == ["prompt", "completion"]
    prepared = prepare_dataset(streamed, make_tokenizer(), max_length=9)
    assert list(prepared) == prepare_dataset(rows(**columns), make_tokenizer()).to_list()


@pytest.mark.parametrize("first", [0, 100])
def test_a_few_rows_with_nulls_are_dropped_and_counted(caplog, first):
    with caplog.at_level(logging.WARNING, logger="mtp_trl.training.encoding"):
        prompts = ["a"] * first + [None, "b"] + ["a"] * (100 - first)
        dataset = rows(prompt=prompts, completion=["x"] * (first + 1) + [None] + ["x"] * (100 - first))
        formatted = format_columns(dataset, prompt_format="Q: {}", as_messages=True)
        prepared = prepare_dataset(formatted, make_tokenizer(template=CHATML))
    assert len(prepared) == 100
    assert "2 rows dropped for a null value; 100 rows remain" in caplog.text


def test_a_malformed_row_does_not_end_a_stream(caplog):
    """Unless it is the first row, since then all rows may be malformed."""
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    conversations = {"messages": [good, good[:1], good]}
    tokenizer = make_tokenizer(template=CHATML)
    with caplog.at_level(logging.WARNING, logger="mtp_trl.training.encoding"):
        assert len(list(prepare_dataset(rows(**conversations).to_iterable_dataset(), tokenizer))) == 2
    assert r"Row 1 of the train set is malformed and dropped (1 rows dropped as malformed): `messages` must" in caplog.text
    wrong = rows(messages=[good[:1], good]).to_iterable_dataset()
    with pytest.raises(ValueError, match="Row 0 of the train set"):
        list(prepare_dataset(wrong, tokenizer))


@pytest.mark.parametrize("conversational", [False, True])
def test_empty_and_too_long_prompts_are_dropped_and_counted(caplog, conversational):
    prompts = ["a", "", "long prompt" * 9, "b"]
    if conversational:
        prompts = [[{"role": "user", "content": text}] if text else [] for text in prompts]
    with caplog.at_level(logging.WARNING, logger="mtp_trl.training.encoding"):
        prepared = prepare_dataset(rows(prompt=prompts), make_tokenizer(template=CHATML), max_length=60)
    assert prepared["prompt"] == [prompts[0], prompts[3]]
    assert "1 rows dropped for an empty prompt, 1 rows dropped for a prompt of max_length=60 tokens or more" in caplog.text
    with pytest.raises(ValueError, match="mask token"):
        prepare_dataset(rows(prompt=["<|mtp|>"]), make_tokenizer(), mask_token="<|mtp|>")


def test_formats_accept_text_that_contains_braces():
    dataset = rows(prompt=["{x} + 1"], completion=["{y}"], id=[0])
    (row,) = format_columns(dataset, prompt_format="Question: {}\nAnswer:", completion_format=" {}")
    assert row == {"prompt": "Question: {x} + 1\nAnswer:", "completion": " {y}", "id": 0}


def test_text_becomes_messages_for_the_chat_template():
    (row,) = format_columns(rows(prompt=["a"], completion=["b"]), prompt_format="<{}>", as_messages=True)
    assert row == {
        "prompt": [{"role": "user", "content": "<a>"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }


def test_columns_are_formatted_under_their_own_names():
    (row,) = format_columns(
        rows(q=["a"], r=["b"]), column_map={"q": "prompt", "r": "completion"}, completion_format=" {}", as_messages=True
    )
    assert row == {"q": [{"role": "user", "content": "a"}], "r": [{"role": "assistant", "content": " b"}]}


def test_without_formats_the_dataset_is_returned_unchanged():
    dataset = rows(text=["a"])
    assert format_columns(dataset) is dataset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_format": "no braces"}, r"prompt_format must contain exactly one \{\}"),
        ({"completion_format": " {}"}, "formatted from 'completion', but the dataset has the columns 'prompt'"),
        ({"as_messages": True, "column_map": {"promt": "prompt"}}, "from 'promt'.*; did you mean 'prompt'"),
    ],
)
def test_invalid_formats_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        format_columns(rows(prompt=["a"]), **options)
