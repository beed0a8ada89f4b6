"""Decoding during training: completions of bare prompts, and held-out prompts at every evaluation."""

# Shapes: B rows of the batch

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from trl.models.utils import unwrap_model_for_generation

from ..custom_generate.generate import attach_decoder
from ..modeling.attention import dense_masks
from ..modeling.lora import adapters_disabled, causal_lm
from .samples import decode_samples, sample_table
from .saving import PublishingTrainer


class RowLength(StoppingCriteria):
    """End each row at `max_length` tokens, not counting the padding before its prompt.

    Prompts are padded to the longest one, rounded up to a multiple of `multiple`.
    """

    def __init__(self, prompt_lengths: Sequence[int], *, max_length: int, multiple: int) -> None:
        widest = -(-max(prompt_lengths) // multiple) * multiple
        self.columns_B = torch.tensor([max_length + widest - length for length in prompt_lengths])

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Return which rows have ended, bool [B]."""
        return input_ids.shape[1] >= self.columns_B.to(input_ids.device)


class DecodingTrainer(PublishingTrainer):
    """Trainer that completes bare prompts as `completions_by` specifies, and decodes held-out prompts at every evaluation.

    No text exceeds `max_length`, so every text fits into a table of learned positions (see `check_positions`).
    """

    model_wrapped: Any  # set by the base class

    def _attach_decoders(self) -> None:
        """Make student and teacher decode with this package's `generate`, which never emits the mask token."""
        for model in (self.model, self.teacher_model):
            if model is not None:
                attach_decoder(self.accelerator.unwrap_model(model))
        # Completions are decoded one token per pass, or in blocks of the student that ConfAdapt accepts.
        self.generation_config.mtp_k = 1
        if self.args.completions_by == "student_blocks":
            self.generation_config.mtp_k = self.args.k_max
            self.generation_config.confadapt = self.args.confadapt
            self.generation_config.verify = False

    @contextmanager
    def _eager_and_dense(self) -> Iterator[None]:
        """Run the block without compiled code and with dense attention masks.

        Decoding has new shapes in every pass, so compiled code would be recompiled each time; `generate` makes dense masks.
        """
        with ExitStack() as stack:
            if self.args.torch_compile:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for model in (self.model, self.teacher_model):
                if model is not None:
                    stack.enter_context(dense_masks(causal_lm(self.accelerator.unwrap_model(model))))
            yield

    def _max_new_tokens(self, prompt_length: int) -> int:
        """Return how many tokens may follow a prompt, which is shorter than `max_length`."""
        return int(max(1, min(self.max_completion_length, self.args.max_length - prompt_length)))

    @contextmanager
    def _rows_limited(self, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
        """Make the model that completes these prompts end each row at `max_length` tokens, within the block."""
        model = causal_lm(self.accelerator.unwrap_model(self.model_wrapped))
        multiple = self.args.pad_to_multiple_of or 1
        limit = RowLength(list(map(len, prompts)), max_length=self.args.max_length, multiple=multiple)
        generate, config = model.generate, self.generation_config
        before, config.max_new_tokens = config.max_new_tokens, self._max_new_tokens(min(map(len, prompts)))
        model.generate = functools.partial(generate, stopping_criteria=StoppingCriteriaList([limit]))
        try:
            yield
        finally:
            model.generate, config.max_new_tokens = generate, before

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Complete bare prompts with the student or its teacher."""
        by_teacher = self.args.completions_by == "teacher" and not self.args.exact
        shares_module = by_teacher and self.teacher_model is None
        student = self.model_wrapped
        if by_teacher and not shares_module:
            self.model_wrapped = self.teacher_model
        try:
            with (
                self._rows_limited(prompt_ids),
                self._eager_and_dense(),
                adapters_disabled(self.accelerator.unwrap_model(self.model)) if shares_module else nullcontext(),
            ):
                completions = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        finally:
            self.model_wrapped = student
        # A vLLM server ignores these limits and applies its own.
        limits = [max(1, self.args.max_length - len(prompt)) for prompt in prompt_ids]
        return [completion[:limit] for completion, limit in zip(completions, limits, strict=True)]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute the loss and statistics of training on the evaluation set, then decode a few of its prompts."""
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self.args.num_eval_prompts and self.args.thresholds and isinstance(self.eval_dataset, Dataset):
            decoded = self._decode_samples(
                self.eval_dataset.select(range(min(self.args.num_eval_prompts, len(self.eval_dataset))))
            )
            self.log(dict(decoded))
            metrics.update(decoded)
        return metrics

    @torch.no_grad()
    def _decode_samples(self, rows: Dataset) -> dict[str, float]:
        """Decode held-out prompts. Every rank decodes the same ones, so all ranks gather sharded weights in the same passes."""
        if "prompt_ids" in rows.column_names:
            prompts = list(rows["prompt_ids"])
        else:
            prompts, _, _ = self._tokenize_prompts(list(rows["prompt"]))
        inputs = self._tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
        inputs = inputs.to(self.accelerator.device)
        with (
            self._eager_and_dense(),
            unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, gather_deepspeed3_params=self.args.ds3_gather_for_generation
            ) as model,
        ):
            metrics, output = decode_samples(
                model, inputs, thresholds=self.args.thresholds, max_new_tokens=self._max_new_tokens(max(map(len, prompts)))
            )
        if self.accelerator.is_main_process:
            title = f"step {self.state.global_step}, ConfAdapt {self.args.thresholds[-1]}"
            Console().print(sample_table(self._tokenizer, output, inputs["input_ids"].shape[1], title=title))
        return metrics
