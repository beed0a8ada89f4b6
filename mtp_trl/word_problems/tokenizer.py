"""Train the benchmark's tokenizer: byte-level BPE with one token per digit. Run this file to write the tokenizer's files.

All 256 bytes are in the vocabulary, so every UTF-8 text can be encoded and other data sets work too. A space before a number
is a separate token and so is every digit, as in Qwen's tokenizers: arithmetic is learned digit by digit.
"""

import argparse
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .generator import train_problems

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
# Two of the 768 rows of the embedding matrix stay free, so that a mask token needs no resize.
VOCABULARY = 766
# Words with their leading space, single digits, runs of punctuation, line breaks, other whitespace.
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], *, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train a fast tokenizer of `vocabulary` tokens on texts. It puts BOS before a text and nothing after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Train on 20,000 problems of the training stream 0 and write the tokenizer's files to a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", help="folder for tokenizer.json and tokenizer_config.json")
    folder = parser.parse_args().folder
    problems = train_problems(20_000, seed=0)
    train_tokenizer(problem.prompt + problem.completion for problem in problems).save_pretrained(folder)


if __name__ == "__main__":
    main()
