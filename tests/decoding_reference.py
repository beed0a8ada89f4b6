"""Naive references for the tests of the decoder: a loop without a cache, and transformers' own greedy decoding."""

import itertools
from collections import Counter

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GenerationMixin,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)

from mtp_trl.custom_generate.choice import accept_confident_prefix
from mtp_trl.custom_generate.generate import generate
from mtp_trl.custom_generate.output import MTPGenerateOutput
from mtp_trl.modeling.exact import add_gated_adapter

PAD, EOS, MASK, BARRED = 0, 1, 60, [60, 61, 62, 63]
NEW = 24
CACHED = [
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "cohere",
    "granite",
    "phi3",
    "olmo2",
    "gpt2",
    "deepseek_v3",
]
RECURRENT = ["falcon_h1", "granitemoehybrid", "qwen3_next", "qwen3_5_text", "bamba", "lfm2", "mamba2"]
# In this order: windows by column, states that start over in each pass, no attention mask, ALiBi, keys selected by an indexer.
UNCACHED = ["gpt_neo", "jamba", "rwkv", "bloom", "deepseek_v32"]


def prompts(rows: int = 4, *, seed: int = 1) -> list[list[int]]:
    """Ragged prompts of 9, 6, 4, 1, 9, 6, ... tokens."""
    lengths = list(itertools.islice(itertools.cycle([9, 6, 4, 1]), rows))
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 60, (length,), generator=rng).tolist() for length in lengths]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Input ids and attention mask, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def decode(model, rows: list[list[int]], **kwargs) -> MTPGenerateOutput:
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    return generate(**padded(rows), model=model, **options)


def texts(output: MTPGenerateOutput, rows: list[list[int]]) -> list[list[int]]:
    """Generated tokens of each row without the padding after its end."""
    width = max(map(len, rows))
    lengths = [sum(blocks) for blocks in output.block_lengths]
    return [ids[width : width + n] for ids, n in zip(output.sequences.tolist(), lengths, strict=True)]


def greedy(model, rows: list[list[int]], **kwargs) -> torch.Tensor:
    """transformers' greedy decoding with the barred ids suppressed."""
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": BARRED, **kwargs}
    return GenerationMixin.generate(model, **padded(rows), **options)


@torch.no_grad()
def block_logits(model, ids: list[int], k: int) -> torch.Tensor:
    """Predictions of a block [K, V], from one forward pass over the whole text, without a cache."""
    fed = torch.tensor([ids + [MASK] * (k - 1)])
    logits = model(input_ids=fed, attention_mask=torch.ones_like(fed), use_cache=False).logits[0, -k:].float()
    logits[:, BARRED] = -torch.inf
    return logits


def naive_loop(model, prompt: list[int], *, k: int, threshold, new: int = NEW, eos=(EOS,), processors=()):
    """Decode as the method is defined. Return (generated tokens, block lengths).

    The last one of a list of thresholds holds for all later positions.
    """
    thresholds = threshold if isinstance(threshold, list) else [threshold]
    ids, blocks = list(prompt), []
    while True:
        logits = block_logits(model, ids, k)
        block, accepting = [], True
        for position in range(k):
            scores = logits[position][None].clone()
            for processor in processors:
                scores = processor(torch.tensor([ids + block]), scores)
            token = int(scores.argmax())
            confident = logits[position].softmax(-1)[token] >= thresholds[min(position, len(thresholds) - 1)]
            if position > 0 and not (accepting and confident):
                break
            accepting = accepting and bool(confident)
            block.append(token)
        for length, token in enumerate(block, start=1):
            if token in eos or len(ids) - len(prompt) + length == new:
                break
        ids += block[:length]
        blocks.append(length)
        if ids[-1] in eos or len(ids) - len(prompt) == new:
            return ids[len(prompt) :], blocks


@torch.no_grad()
def naive_verified_loop(model, prompt: list[int], *, k: int, threshold, new: int, branches: int = 1):
    """Decode as verified decoding is defined. Return (generated tokens, number of tokens that each step confirms).

    `branches` is the number of rejection points with a block of masks: a step gets new drafts if it rejects fewer drafts.
    """
    ids, drafts, blocks = list(prompt), [], []
    while len(ids) - len(prompt) < new and ids[-1] != EOS:
        before = len(ids)
        while drafts and int(block_logits(model, ids, 1).argmax()) == drafts[0]:
            ids.append(drafts.pop(0))
        logits = block_logits(model, ids, k if len(drafts) < branches else 1)
        block = logits.argmax(-1).tolist()
        accepted = int(accept_confident_prefix(logits.softmax(-1).amax(-1)[None], threshold=threshold))
        ids, drafts = [*ids, block[0]], block[1:accepted]
        ids = ids[: len(prompt) + new]
        if EOS in ids[before:]:
            ids, drafts = ids[: ids.index(EOS, before) + 1], []
        if EOS in drafts:
            drafts = drafts[: drafts.index(EOS)]
        blocks.append(len(ids) - before)
    return ids[len(prompt) :], blocks


def lengths_of(output: MTPGenerateOutput) -> Counter:
    return Counter(length for blocks in output.block_lengths for length in blocks)


def with_random_adapter(model):
    """Add an exact-mode adapter that changes the predictions at masks."""
    adapter = add_gated_adapter(model, rank=2, alpha=4)
    noise = torch.Generator().manual_seed(5)
    for update in adapter.updates:
        torch.nn.init.normal_(update.lora_B, std=0.3, generator=noise)
    torch.nn.init.normal_(adapter.mask_row.weight, generator=noise)
    return model


class StopsAtMultiple(StoppingCriteria):
    """Reads the last token only, as transformers' criteria do, and records the shapes of its inputs."""

    def __init__(self, divisor: int) -> None:
        self.divisor, self.shapes = divisor, []

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.append(tuple(input_ids.shape))
        return input_ids[:, -1] % self.divisor == 0


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """64 tokens of one to three letters, joined without spaces."""
    words = ["<pad>", "<eos>"] + ["".join(chr(97 + (i * j) % 26) for j in range(1, 2 + i % 3)) + str(i) for i in range(2, 64)]
    words[MASK], words[59] = "<|mtp|>", "abcdef"  # transformers' StopStringCriteria asks every tokenizer for "abcdef"
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
