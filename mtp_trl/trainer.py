"""`MTPDistillTrainer`: online self-distillation of multi-token blocks on TRL's on-policy trainer.

Only the seams of the base class are here; the arithmetic is in `regions`, `objective` and `self_distillation`.
"""

# B rows of the local generation batch, N tokens of the longest text

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models.utils import unwrap_model_for_generation

from . import hub
from .card import PAPER, TAGS
from .config import MTPDistillConfig
from .custom_generate.generate import attach_decoder
from .data import column_names, prepare_dataset
from .evaluation.show import block_texts, coloured
from .forward import (
    backbone,
    can_pack,
    check_attention_backend,
    check_layout,
    check_output_logits,
    check_positions,
    dense_masks,
)
from .gated_adapter import MaskGated, declared_adapted
from .guard import DriftGuard
from .lora import check_alone, check_fits_base
from .mask_token import add_mask_token
from .models import adapters_off, causal_lm, frozen_teacher, make_exact, mask_token_of, model_loader, with_mask_row
from .objective import block_metrics, place_weights
from .optimizer import muon_adamw
from .regions import Regions, compact_left_padding, drawn_places, row_generator, sample_regions
from .saving import HubLayout
from .self_distillation import Batch, PassOutput, Reader, Tokens, WholeRows, distillation_pass

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = get_logger(__name__)


class MTPDistillTrainer(HubLayout):
    """Trains a causal LM to predict blocks of tokens at mask tokens, with its own frozen copy as the teacher.

    Args:
        model: a Hub id or folder, a causal LM, or a PEFT model. Full fine-tuning keeps a frozen copy as the teacher; with
            adapters the teacher is the same module with the adapters off, and the mask token's row is trained beside them.
        args: [`MTPDistillConfig`].
        train_dataset, eval_dataset: columns `prompt` and `completion` (text or messages), `messages`, `text`, or `prompt`
            alone: then the model writes the completions itself, on policy.
        processing_class: the tokenizer; loaded with the model when it is given by name.
        callbacks, optimizers, quantization_config, peft_config: as in [`~trl.DistillationTrainer`].

    Raises:
        ValueError: for data that cannot make one optimizer step, unsupported attention backends and the like, before any
            weights load wherever that can be known.
    """

    _tag_names = list(TAGS)
    _name = "MTP self-distillation"
    _paper = PAPER
    model_wrapped: Any  # upstream's

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: MTPDistillConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        name = model if isinstance(model, str) else model.config._name_or_path
        args = args or MTPDistillConfig(f"{Path(name or 'model').name}-MTP")
        has_adapter = args.exact or peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
        if args.adapter_only and not has_adapter:
            raise ValueError(
                "adapter_only=True publishes an adapter alone, and there is none; set exact=True or pass peft_config."
            )
        if args.adapter_only and not args.exact and peft_config is not None:
            check_alone(peft_config)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(
            name, padding_side="left", trust_remote_code=args.trust_remote_code
        )
        mask_token = mask_token_of(model, tokenizer, args)
        train_dataset = _prepared(train_dataset, tokenizer, args, mask_token, "train")
        eval_dataset = _prepared(eval_dataset, tokenizer, args, mask_token, "eval")
        _check_one_step(train_dataset, args)
        _check_generation(train_dataset, args)

        load = model_loader(model, args, quantization_config) if isinstance(model, str) else None
        student = load() if load else model
        teacher = None
        causal = causal_lm(student)
        check_attention_backend(causal)
        check_positions(causal, max_length=args.max_length, k_max=args.k_max)
        add_mask_token(causal, tokenizer, mask_token=args.mask_token, k_max=args.k_max, seed=args.seed)
        self.provenance = hub.provenance(base_model=name, args=args, mask_token=causal.config.mtp["mask_token"])
        if args.exact:
            make_exact(student, peft_config, args)
            peft_config = None
        elif peft_config is not None:
            peft_config = with_mask_row(peft_config, causal, causal.config.mtp["mask_token_id"])
        elif not is_peft_model(student):
            teacher = frozen_teacher(student, load, tokenizer, args)
        hub.set_decoding_defaults(causal, confadapt=args.confadapt, verify=args.verify)
        with declared_adapted(student) if args.exact else nullcontext():
            super().__init__(
                model=student,
                teacher_model=teacher,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                callbacks=[DriftGuard(held_out=args.eval_strategy != "no"), *(callbacks or [])],
                optimizers=optimizers,
                peft_config=peft_config,
            )
        self.provenance["adapter"] = hub.adapter_facts(self.model)
        if args.adapter_only and not args.exact:
            check_fits_base(self.model)
        self._decode_completions()
        attach_decoder(self.model)
        if self.teacher_model is not None:  # its decoder never samples the mask token
            attach_decoder(self.accelerator.unwrap_model(self.teacher_model))
        self._tokens = self._known_tokens(causal)
        self._totals: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._last_pass: PassOutput | None = None
        if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
            check_output_logits(causal)
            check_layout(causal, causal.config.mtp["mask_token_id"])
        if args.torch_compile:
            self._compile()
        if not can_pack(causal):
            logger.info("This architecture takes one row per region (it has layers that cannot skip tokens).")

    def _known_tokens(self, model: PreTrainedModel) -> Tokens:
        device, mtp = self.accelerator.device, model.config.mtp
        return Tokens(
            mask_id=mtp["mask_token_id"],
            pad_id=self._tokenizer.pad_token_id,
            barred=torch.tensor(mtp["barred_token_ids"], device=device),
            eos=torch.tensor(self.eos_token_ids, device=device),
        )

    def _compile(self) -> None:
        """Compiles what a pass calls: accelerate compiles `model.forward`, which the redirection to the loss goes around."""
        for model in (self.model, self.teacher_model):
            if model is not None:
                body = backbone(causal_lm(self.accelerator.unwrap_model(model)))
                body.compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)

    @contextmanager
    def _decoding_as_it_is(self) -> Iterator[None]:
        """Decoding has shapes of its own at every pass, and would be compiled for each; its masks are dense ones."""
        with ExitStack() as stack:
            if self.args.torch_compile:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for model in (self.model, self.teacher_model):
                if model is not None:
                    stack.enter_context(dense_masks(causal_lm(self.accelerator.unwrap_model(model))))
            yield

    def _decode_completions(self) -> None:
        """How bare prompts are completed: one token per pass, or in the student's own blocks, as ConfAdapt takes them."""
        self.generation_config.mtp_k = 1
        if self.args.completions_by == "student_blocks":
            self.generation_config.mtp_k = self.args.k_max
            self.generation_config.confadapt = self.args.confadapt
            self.generation_config.verify = False

    # ---- data ----

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt", "prompt_ids", "completion_ids"]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Texts of the dataset, or completions sampled from the model, with the regions drawn on them."""
        if "completion_ids" in inputs[0]:
            clean_BN, prompt_lengths_B, lengths_B = self._collate(inputs)
        else:
            sampled = super()._generate_and_score_completions(inputs)
            clean_BN, lengths_B = compact_left_padding(
                torch.cat([sampled["prompt_ids"], sampled["completion_ids"]], 1),
                torch.cat([sampled["prompt_mask"], sampled["completion_mask"]], 1),
                pad_token_id=self._tokens.pad_id,
            )
            prompt_lengths_B = sampled["prompt_mask"].sum(1)
        regions = sample_regions(
            (prompt_lengths_B - 1).tolist(),
            (lengths_B - 2).tolist(),
            k_min=self.args.k_min,
            k_max=self._largest_block(),
            slots=self.args.slots_per_row,
            generators=self._row_generators(clean_BN, lengths_B),
        )
        weight_BRK = drawn_places(regions.size_BR, self.args.k_max) * place_weights(self.args.k_max, self.args.place_decay)
        places = weight_BRK[..., int(self.args.exact) :].sum()  # in exact mode place 1 is not trained
        counts = torch.stack([places.to(clean_BN.device), (lengths_B - prompt_lengths_B).sum()])
        drawn, clean = self.accelerator.reduce(counts.float(), "sum")
        return {
            "clean_ids": clean_BN,
            "prompt_lengths": prompt_lengths_B,
            "lengths": lengths_B,
            "anchors": regions.anchor_BR.to(clean_BN.device),
            "sizes": regions.size_BR.to(clean_BN.device),
            "num_items_in_batch": drawn,
            "num_clean_in_batch": clean,
        }

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Completions of bare prompts, by the student or by its teacher."""
        by_teacher = self.args.completions_by == "teacher" and not self.args.exact
        switched_off = by_teacher and self.teacher_model is None
        student = self.model_wrapped
        if by_teacher and not switched_off:
            self.model_wrapped = self.teacher_model
        try:
            with (
                self._decoding_as_it_is(),
                adapters_off(self.accelerator.unwrap_model(self.model)) if switched_off else nullcontext(),
            ):
                return super()._generate_single_turn(*args, **kwargs)
        finally:
            self.model_wrapped = student

    def _largest_block(self) -> int:
        """Of the regions drawn at this step."""
        steps = self.args.k_curriculum * self.state.max_steps
        share = min(1.0, self.state.global_step / steps) if self.model.training and steps else 1.0
        return int(self.args.k_min + round(share * (self.args.k_max - self.args.k_min)))

    def _collate(self, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
        texts = [torch.tensor(row["prompt_ids"] + row["completion_ids"]) for row in rows]
        clean_BN = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self._tokens.pad_id)
        prompt_lengths_B = torch.tensor([len(row["prompt_ids"]) for row in rows])
        lengths_B = torch.tensor([len(text) for text in texts])
        device = self.accelerator.device
        return clean_BN.to(device), prompt_lengths_B.to(device), lengths_B.to(device)

    def _row_generators(self, clean_BN: Tensor, lengths_B: Tensor) -> list[np.random.Generator]:
        """By (seed, optimizer step, row of the global batch) in training; by (seed, text) in evaluation."""
        rows = len(clean_BN)
        if self.model.training:
            first = self.accelerator.process_index * rows
            return [row_generator(self.args.seed, self.state.global_step, first + row) for row in range(rows)]
        texts = [ids[:length].tolist() for ids, length in zip(clean_BN, lengths_B, strict=True)]
        return [np.random.default_rng([self.args.seed, *ids]) for ids in texts]

    # ---- loss ----

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = Batch(
            inputs["clean_ids"],
            inputs["prompt_lengths"],
            inputs["lengths"],
            Regions(inputs["anchors"], inputs["sizes"]),
        )
        # What accelerate wraps for mixed precision is `model.forward`, which the redirection to this method goes around.
        with self.accelerator.autocast():
            output = distillation_pass(
                self._reader(unwrapped_student), batch, self._tokens, self.args, objective=self._objective()
            )
        self._last_pass = output
        drawn = output.sums["drawn"]
        if num_items_in_batch is None:  # evaluation: the local mean
            loss = output.loss / output.weight.clamp(min=1e-9)
            clean = (batch.lengths_B - batch.prompt_lengths_B).sum()
        else:
            loss = output.loss / num_items_in_batch
            clean = inputs["num_clean_in_batch"] / self.accelerator.num_processes
        if self.args.ntp_coef > 0:
            loss = loss + self.args.ntp_coef * output.prefix_kl / clean.clamp(min=1)
        return loss, output.sums["entropy"], drawn.long()

    def _objective(self) -> str:
        """The configured one, after a warm-up on the text itself."""
        warm_up = self.args.ground_truth_warmup * self.state.max_steps
        return "ground_truth" if self.model.training and self.state.global_step < warm_up else self.args.objective

    def _reader(self, unwrapped_student: Any) -> Reader:
        """How student and teacher read a layout under this configuration."""
        student = causal_lm(unwrapped_student)
        teacher = student if self.teacher_model is None else self.accelerator.unwrap_model(self.teacher_model)
        watched = self.args.ntp_coef > 0 or (self.args.drift_limit is not None and self.args.eval_strategy == "no")
        with_teacher = watched or self._objective() != "ground_truth" or not self.model.training
        if self.args.exact:
            return MaskGated(student, with_teacher=with_teacher)
        return WholeRows(student, teacher, self._teacher_runner(unwrapped_student) if with_teacher else None)

    def _teacher_runner(self, unwrapped_student: Any) -> Callable[[Callable[[PreTrainedModel], Tensor]], Tensor]:
        def run(read: Callable[[PreTrainedModel], Tensor]) -> Tensor:
            with torch.no_grad():
                if self.teacher_model is None:
                    with adapters_off(unwrapped_student):
                        return read(causal_lm(unwrapped_student))
                self.teacher_model.eval()
                teacher = self.accelerator.unwrap_model(self.teacher_model)
                # through the wrapper's forward, where DeepSpeed and FSDP gather the sharded weights
                hidden: Tensor = self._forward_redirection(self.teacher_model, teacher, read, teacher)
                return hidden

        return run

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """As upstream; the statistics of the pass are summed over ranks outside the wrapped forward.

        Raises:
            FloatingPointError: the loss is not finite, on all ranks when it is on one.
        """
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert self._last_pass is not None
        output, self._last_pass = self._last_pass, None
        not_finite = 1.0 - (output.loss + output.prefix_kl).detach().isfinite().float()
        sums = {**output.sums, "not_finite": not_finite}
        flat = self.accelerator.reduce(torch.cat([value.detach().reshape(-1) for value in sums.values()]), "sum").cpu()
        totals = self._totals["train" if self.model.training else "eval"]
        for (name, value), part in zip(sums.items(), flat.split([v.numel() for v in sums.values()]), strict=True):
            totals[name] = totals.get(name, 0.0) + part.view(value.shape)
        if totals.pop("not_finite") and self.model.training:
            self._refuse("loss")
        if not torch.is_grad_enabled():
            self._rest_adapter()
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As upstream; after backward, which recomputes layers, an exact mode's adapter rests again."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self._rest_adapter()
        return loss

    def _rest_adapter(self) -> None:
        if self.args.exact:
            causal_lm(self.accelerator.unwrap_model(self.model)).mtp_adapter.gate = 0

    def create_optimizer(self, model: Any = None) -> Any:
        """Muon with AdamW where the configuration says so."""
        if self.args.muon and getattr(self, "optimizer", None) is None:
            self.optimizer = muon_adamw(
                self.model if model is None else model, lr=self.args.learning_rate, weight_decay=self.args.weight_decay
            )
        return super().create_optimizer(model)

    # ---- logs and evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the block statistics since the last log."""
        mode = "train" if self.model.training else "eval"
        if totals := self._totals[mode]:
            prefix = "eval_" if mode == "eval" else ""
            metrics = block_metrics(totals, thresholds=self.args.thresholds)
            logs.update({prefix + name: round(value, 5) for name, value in metrics.items()})
            totals.clear()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Teacher-forced statistics as in training, then a few held-out prompts decoded for real."""
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
        """Every process decodes the same prompts, so sharded weights are gathered in step on all of them."""
        if "prompt_ids" in rows.column_names:
            prompts = rows["prompt_ids"]
        else:
            prompts, _, _ = self._tokenize_prompts(rows["prompt"])
        inputs = self._tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
        inputs = inputs.to(self.accelerator.device)
        metrics: dict[str, float] = {}
        with (
            self._decoding_as_it_is(),
            unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, gather_deepspeed3_params=self.args.ds3_gather_for_generation
            ) as model,
        ):
            for verify, name in ((True, "verified"), (False, "acceleration")):
                for threshold in self.args.thresholds:
                    output = model.generate(
                        **inputs,
                        confadapt=threshold,
                        verify=verify,
                        max_new_tokens=self.max_completion_length,
                        do_sample=False,
                        return_dict_in_generate=True,
                    )
                    metrics[f"eval_decoding/{name}_{threshold}"] = float(output.acceleration)
        if self.accelerator.is_main_process:
            Console().print(self._sample_blocks(output, inputs["input_ids"].shape[1]))
        return metrics

    def _sample_blocks(self, output: Any, start: int) -> Table:
        """The answers of the last threshold, a colour for each forward pass."""
        table = Table(title=f"step {self.state.global_step}, ConfAdapt {self.args.thresholds[-1]}", show_lines=True)
        table.add_column("tokens per pass", justify="right")
        table.add_column("answer, a block per pass")
        for ids, lengths in zip(output.sequences[:, start:].tolist(), output.block_lengths, strict=True):
            tokens = sum(lengths)
            mean = tokens / max(1, len(lengths))
            table.add_row(f"{mean:.2f}", coloured(block_texts(self._tokenizer, ids[:tokens], lengths)))
        return table


def _prepared(dataset: Any, tokenizer: PreTrainedTokenizerBase, args: MTPDistillConfig, mask_token: str, split: str) -> Any:
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: _prepared(part, tokenizer, args, mask_token, name) for name, part in dataset.items()}
    return prepare_dataset(
        dataset,
        tokenizer,
        column_map=cast("dict[str, str] | None", args.column_map),  # text has been parsed by now
        max_length=args.max_length,
        mask_token=mask_token,
        desc=split,
    )


def _check_one_step(dataset: Any, args: MTPDistillConfig) -> None:
    """TRL's sampler drops what does not fill a global batch; with less than one it would train zero steps in silence."""
    if dataset is None or isinstance(dataset, IterableDataset):
        return
    needed = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if len(dataset) < needed:
        raise ValueError(
            f"The training set has {len(dataset)} usable rows, fewer than the {needed} of one optimizer step "
            f"({args.per_device_train_batch_size} a device x {args.gradient_accumulation_steps} accumulation steps x "
            f"{args.world_size} processes); lower one of these or bring more data."
        )


def _check_generation(dataset: Any, args: MTPDistillConfig) -> None:
    """Ranks whose texts end at different times would wait for each other's layers without end."""
    completed = dataset is None or "completion_ids" in column_names(dataset)
    if not completed and is_deepspeed_zero3_enabled() and not args.ds3_gather_for_generation:
        raise ValueError(
            "ds3_gather_for_generation=False cannot complete bare prompts under ZeRO-3; set it to true, or bring completions."
        )
