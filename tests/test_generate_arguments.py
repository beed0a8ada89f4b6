"""Arguments of `generate`: defaults, refusals, random combinations, streamers, dtypes and offloading."""

import copy
import math
import os
import random
import re
from collections import Counter

import pytest
import torch
from decoding_reference import (
    BARRED,
    EOS,
    MASK,
    NEW,
    PAD,
    decode,
    greedy,
    padded,
    prompts,
    texts,
    tiny_tokenizer,
    with_random_adapter,
)
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
)
from transformers.cache_utils import StaticLayer

from mtp_trl.custom_generate.adapter_file import adapter_from, by_file_name, metadata_of
from mtp_trl.custom_generate.generate import attach_decoder, generate
from mtp_trl.custom_generate.mtp_config import mask_ids_by_name


def test_defaults_come_from_the_generation_config(tiny_model):
    model, rows = tiny_model("llama"), prompts()
    model.generation_config.update(confadapt=0.4, mtp_k=5, allow_custom_entries=True)
    explicit = decode(tiny_model("llama"), rows, confadapt=0.4, mtp_k=5).block_lengths
    assert decode(model, rows).block_lengths == explicit
    assert decode(model, rows, confadapt=0.0, eos_token_id=None, max_new_tokens=10).block_lengths == [[5, 5]] * 4
    model.generation_config.update(verify=True, allow_custom_entries=True)
    assert torch.equal(decode(model, rows).sequences, greedy(model, rows))
    assert decode(model, rows, verify=False).block_lengths == explicit
    request = GenerationConfig(confadapt=0.0, mtp_k=2, verify=False, max_new_tokens=6, do_sample=False, eos_token_id=59)
    output = generate(**padded(rows), model=model, generation_config=request, return_dict_in_generate=True)
    assert output.block_lengths == [[2, 2, 2]] * 4


def test_the_default_block_is_the_one_trained(tiny_model):
    model = tiny_model("llama")
    assert decode(model, prompts(1), eos_token_id=None, max_new_tokens=16).block_lengths == [[8, 8]]
    with pytest.warns(UserWarning, match="exceeds the trained block size, 8"):
        decode(model, prompts(1), mtp_k=9)


class QuantoLike(DynamicCache):
    """A cache with unsupported layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [StaticLayer(8)]


REFUSED = {
    "confadapt=True": ({"confadapt": True}, r"\[0, 1\], got True"),
    "confadapt=1.5": ({"confadapt": 1.5}, r"\[0, 1\], got 1.5"),
    "confadapt=nan": ({"confadapt": math.nan}, "got nan"),
    "confadapt='0.9'": ({"confadapt": "0.9"}, "got '0.9'"),
    "mtp_k=0": ({"mtp_k": 0}, "mtp_k must be a whole number from 1 to 1024, or 'auto', got 0"),
    "mtp_k=True": ({"mtp_k": True}, "got True"),
    "mtp_k=2.5": ({"mtp_k": 2.5}, "got 2.5"),
    "mtp_blocks=0": ({"mtp_blocks": 0, "verify": True}, "mtp_blocks must be a whole number >= 1, got 0"),
    "mtp_blocks=True": ({"mtp_blocks": True, "verify": True}, "mtp_blocks must be a whole number >= 1, got True"),
    "mtp_blocks without verify": ({"mtp_blocks": 2}, "pass verify=True"),
    "cache_implementation": ({"cache_implementation": "offloaded"}, "has its own cache"),
    "paged cache": ({"cache_implementation": "paged"}, "has its own cache"),
    "verify=1": ({"verify": 1}, "verify must be True or False, got 1"),
    "mtp_token_id": ({"mtp_token_id": 5}, "contradicts config.mtp"),
    "num_beams": ({"num_beams": 2, "verify": True}, "num_beams=2 .*GenerationMixin.generate"),
    "prompt_lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
    "guidance_scale": ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
    "use_cache": ({"use_cache": False}, "use_cache=False"),
    "output_attentions": ({"output_attentions": True}, "output_attentions=True"),
    "auto without verify": ({"mtp_k": "auto"}, "chooses block sizes by measured times, and only verified text"),
    "auto with synced_gpus": ({"mtp_k": "auto", "verify": True, "synced_gpus": True}, "must use the same sizes"),
    "assistant_model": ({"assistant_model": object()}, "assistant_model="),
    "past_key_values": ({"past_key_values": QuantoLike()}, "must be a DynamicCache, got QuantoLike"),
    "inputs_embeds": ({"inputs_embeds": torch.zeros(1, 1, 32)}, "inputs_embeds="),
    "custom_generate": ({"custom_generate": "somewhere"}, "custom_generate="),
    "typo": ({"confadpat": 0.9}, "confadpat"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_unsupported_arguments_are_refused(tiny_model, name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        decode(tiny_model("llama"), prompts(1), **options)


@pytest.mark.parametrize(
    "hostile",
    [
        {"k_max": 10**9}, {"k_max": "8"}, {"k_max": 0}, {"mask_token_id": -5}, {"mask_token_id": "x"}, {"mask_token_id": 10**9},
        {"barred_token_ids": [10**9]}, {"barred_token_ids": "abc"}, {"barred_token_ids": [-1]},
        {"barred_token_ids": list(range(64))},
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_config_is_refused(tiny_model, hostile):
    model = tiny_model("llama")
    model.config.mtp |= hostile
    with pytest.raises(ValueError, match=f"config.mtp has {next(iter(hostile))}="):
        decode(model, prompts(1))


def test_a_streamer_takes_one_row(tiny_model):
    with pytest.raises(ValueError, match="one row, got 4"):
        decode(tiny_model("llama"), prompts(), streamer=Collect())


def test_flash_attention_is_refused_with_the_remedy(tiny_model):
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="set_attn_implementation\\('sdpa'\\)"):
        decode(model, prompts(1))


def test_an_empty_row_is_refused(tiny_model):
    batch = padded(prompts(2))
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="Row 1 of the batch has no tokens"):
        generate(**batch, model=tiny_model("llama"), max_new_tokens=2)


def test_padding_may_be_anywhere(tiny_model):
    """The prompt consists of the columns that the attention mask marks: padding on the right or inside changes nothing."""
    model, (row, *_) = tiny_model("llama"), prompts()
    ids = torch.tensor([[PAD, *row[:4], PAD, *row[4:], PAD]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]])
    output = generate(ids, attention_mask=mask, model=model, max_new_tokens=NEW, do_sample=False)
    assert output[0, 12:].tolist() == texts(decode(model, [row]), [row])[0]


def test_a_checkpoint_without_config_mtp_needs_the_mask_token_as_an_argument(tiny_model):
    model, rows = tiny_model("llama"), prompts()
    expected = decode(model, rows, suppress_tokens=BARRED).sequences
    model = tiny_model("llama")
    del model.config.mtp
    with pytest.raises(ValueError, match=r"no mask token.*mtp_token_id="):
        decode(model, rows)
    assert torch.equal(decode(model, rows, mtp_k=1, suppress_tokens=BARRED).sequences, greedy(model, rows))
    options = {"mtp_k": 8, "suppress_tokens": BARRED}
    assert torch.equal(decode(model, rows, mtp_token_id=MASK, **options).sequences, expected)
    assert torch.equal(decode(model, rows, tokenizer=tiny_tokenizer(), **options).sequences, expected)
    with pytest.raises(ValueError, match="0 to 63, got 64"):
        decode(model, rows, mtp_token_id=64)


def test_the_papers_token_names_are_known():
    words = {"<pad>": 0, "<eos>": 1, "<|mtp_special_token_1|>": 5, "<|mtp_special_token_0|>": 9}
    named = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")))
    assert mask_ids_by_name(named) == [9, 5]


@pytest.mark.parametrize("training", [True, False])
def test_every_modules_mode_is_restored(tiny_model, training):
    model, rows = tiny_model("llama"), prompts()
    expected = decode(model, rows).sequences
    model.train(training)
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert torch.equal(decode(model, rows).sequences, expected)
    with pytest.raises(ValueError, match="mtp_k"):
        decode(model, rows, mtp_k=0)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_half_precision_decodes(tiny_model, architecture, dtype):
    output = decode(tiny_model(architecture).to(dtype), prompts(), confadapt=0.5)
    assert all(0 < len(text) <= NEW for text in texts(output, prompts()))


class Collect:
    """A streamer that records its input."""

    def __init__(self) -> None:
        self.values, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("verify", [False, True])
def test_the_streamer_gets_each_block_once(tiny_model, verify):
    model, (row, *_) = tiny_model("llama", context=0.3), prompts()
    streamer = Collect()
    output = decode(model, [row], verify=verify, streamer=streamer)
    prompt, *blocks = streamer.values
    assert prompt.tolist() == [row]
    assert [len(block) for block in blocks] == output.block_lengths[0]
    assert torch.cat(blocks).tolist() == texts(output, [row])[0]
    assert streamer.ended


def test_transformers_text_streamer_prints_the_text(tiny_model):
    model, (row, *_), tokenizer = tiny_model("llama"), prompts(), tiny_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    output = decode(model, [row], streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(texts(output, [row])[0])


def test_attached_decoder_is_the_models_generate(tiny_model):
    model, rows = tiny_model("llama"), prompts()
    expected = decode(model, rows, confadapt=0.4).sequences
    assert attach_decoder(model) is model
    assert torch.equal(model.generate(**padded(rows), confadapt=0.4, max_new_tokens=NEW, do_sample=False), expected)
    twin = copy.deepcopy(model)
    assert twin.generate.keywords["model"] is twin


def test_a_peft_model_decodes_with_its_adapter(tiny_model):
    peft = pytest.importorskip("peft")
    model, rows = tiny_model("llama"), prompts()
    plain = decode(model, rows, confadapt=0.4).sequences
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    wrapped = attach_decoder(wrapped.eval())
    options = {"max_new_tokens": NEW, "do_sample": False}
    adapted = wrapped.generate(**padded(rows), confadapt=0.4, **options)
    assert not torch.equal(adapted, plain)
    assert torch.equal(wrapped.generate(**padded(rows), verify=True, **options), greedy(model, rows))
    with wrapped.disable_adapter():
        assert torch.equal(wrapped.generate(**padded(rows), confadapt=0.4, **options), plain)


VALUES = {
    "confadapt": [0.0, 0.3, 0.9, 1.0, 1, -0.1, 2, "0.5", True],
    "mtp_k": [1, 2, 3, 8, 8, "auto", 0, -1, "8", 10**6],
    "verify": [True, True, False, 1],
    "mtp_blocks": [1, 2, 3, 100, 0],
    "max_new_tokens": [1, 2, 5, 9, 9, 0, -3],
    "min_new_tokens": [1, 4, 20],
    "do_sample": [True, False],
    "temperature": [0.3, 1.0, 3.0, 0.0, -1.0],
    "top_k": [0, 1, 5, 200],
    "top_p": [0.1, 0.9, 1.0, 1.5],
    "min_p": [0.1, 2.0],
    "repetition_penalty": [1.0, 1.5, -1.0],
    "no_repeat_ngram_size": [0, 2],
    "bad_words_ids": [[[5], [6, 7]], [[]]],
    "suppress_tokens": [[4, 5, 6], [*BARRED, 2], list(range(2, 64))],
    "eos_token_id": [1, [30, 31], [*range(40, 60)], [], -1],
    "pad_token_id": [0, 30, None],
    "num_return_sequences": [1, 2, 3],
    "num_beams": [1, 1, 1, 2],
    "use_cache": [True, True, True, False],
    "cache_implementation": ["static", "dynamic", "dynamic", "quantized"],
    "return_dict_in_generate": [True, False],
    "output_scores": [True, False],
    "output_logits": [True, False],
    "max_time": [0.0, 10.0],
    "max_length": [3, 20],
    "stop_strings": ["b", ["ab", "zz"]],
    "tokenizer": [tiny_tokenizer(), tiny_tokenizer(), None],
    "guidance_scale": [1.0, 1.5],
    "mtp_token_id": [MASK, MASK, 3, -5],
    "forced_eos_token_id": [1],
    "typical_p": [0.5, 1.0],
    # Not exponential_decay_length_penalty: transformers itself fails on it without an EOS token.
    "sequence_bias": [{(5,): 3.0, (6, 7): -2.0}],
    "renormalize_logits": [True],
    "encoder_no_repeat_ngram_size": [2],
}


@pytest.mark.parametrize("part", range(4))
@pytest.mark.filterwarnings("ignore")
def test_any_arguments_give_clean_text_or_a_clear_error(tiny_model, part):
    """MTP_FUZZ=2500 runs 10,000 calls."""
    rng = random.Random(part)
    tried, decoded, refused = int(os.environ.get("MTP_FUZZ", "150")), 0, Counter()
    compared = 0
    for number in range(tried):
        if number % 50 == 0:
            model = tiny_model(["llama", "mistral", "qwen3_next", "gpt_oss"][part], seed=number, context=0.3)
        names = rng.sample(list(VALUES), rng.randint(1, 7))
        options = {name: rng.choice(VALUES[name]) for name in names}
        batch = padded(prompts(rng.choice([1, 1, 2, 3]), seed=number))
        try:
            output = generate(**batch, model=model, **{"max_new_tokens": 9, **options})
        except ValueError as error:
            refused[re.sub(r"[\d.]+", "N", str(error))[:40]] += 1
            continue
        except Exception as error:
            raise AssertionError(f"{options} with rows of {batch['attention_mask'].sum(1).tolist()}") from error
        ids = output if torch.is_tensor(output) else output.sequences
        pads = {options.get("pad_token_id"), PAD, EOS}
        new = set(ids[:, batch["input_ids"].shape[1] :].flatten().tolist()) - pads
        assert not new & set(BARRED), options
        assert ids.shape[1] <= batch["input_ids"].shape[1] + max(1, options.get("max_new_tokens", 9)), options
        decoded += 1
        if options.get("verify") is True and not options.get("do_sample"):
            plain = {name: value for name, value in options.items() if name not in ("mtp_k", "mtp_blocks", "max_time")}
            if "max_time" not in options:
                again = generate(**batch, model=model, **{"max_new_tokens": 9, **plain, "mtp_k": 1})
                assert torch.equal(ids, again if torch.is_tensor(again) else again.sequences), options
                compared += 1
    assert decoded > tried / 5
    assert compared > 0
    assert len(refused) > 10
    assert not [m for m in refused if re.match(r"zip\(|expected sequence|too many dim|not enough values", m)], refused


LAYERS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("offloaded", [[], ["model.layers.1"], ["model.embed_tokens", "model.layers.0", "lm_head"]])
def test_a_device_map_with_layers_on_disk_decodes_alike(tiny_model, tmp_path, offloaded, exact):
    model, rows = tiny_model("llama", context=0.3), prompts(3)
    model.save_pretrained(tmp_path / "model")
    device_map = {layer: "disk" if layer in offloaded else "cpu" for layer in LAYERS} if offloaded else "auto"
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )  # fmt: skip
    assert any(weight.is_meta for weight in spread.parameters()) == bool(offloaded)
    if exact:
        adapter = with_random_adapter(model).mtp_adapter
        adapter_from(by_file_name(adapter), metadata_of(adapter)).attach(spread)
    for options in ({"confadapt": 0.3}, {"verify": True}, {"mtp_k": 1}):
        expected, output = decode(model, rows, **options), decode(spread, rows, **options)
        assert torch.equal(output.sequences, expected.sequences)
        assert output.block_lengths == expected.block_lengths
