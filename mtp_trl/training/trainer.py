"""`MTPDistillTrainer`: online self-distillation of multi-token blocks on TRL's on-policy trainer.

This module overrides methods of the base class; the computation is in `regions`, `objective` and `step`.
"""

# Shapes: B rows of the batch, K positions of a block, N clean tokens of a row, R regions of a row

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..modeling.attention import check_attention_backend
from ..modeling.checks import can_pack, check_output_logits, check_positions
from ..modeling.exact import peft_flag_set
from ..modeling.gguf import dequantised
from ..modeling.logits import backbone
from ..modeling.lora import adapters_disabled, adapts_head, causal_lm, check_fits_base, check_publishable_lora, with_mask_row
from ..modeling.mask_token import add_mask_token, set_decoding_defaults
from ..modeling.parallelism import Parallelism
from ..publishing.card import PAPER, TAGS
from ..publishing.provenance import adapter_facts, provenance_of_run
from .config import MTPDistillConfig
from .data import check_one_step, has_completions, prepare_dataset
from .decoding import DecodingTrainer
from .drift_guard import DriftGuard
from .objective import block_metrics, position_weights
from .optimizer import muon_adamw
from .readers import ExactReader, Reader, WholeRowReader, check_layout
from .regions import Regions, compact_left_padding, drawn_positions, row_generator, sample_regions
from .step import Batch, PassOutput, Tokens, distillation_pass
from .student import frozen_teacher, load_tokenizer, make_exact, mask_token_of, model_loader

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = get_logger(__name__)


class MTPDistillTrainer(DecodingTrainer):
    """Trains a causal LM to predict blocks of tokens at mask tokens, with its own frozen copy as the teacher.

    Args:
        model: a Hub id or folder, a causal LM, or a PEFT model. Full fine-tuning keeps a frozen copy as the teacher. With
            adapters, the teacher is the same module with the adapters turned off, and the mask token's row is trained too.
        args: [`MTPDistillConfig`].
        train_dataset, eval_dataset: datasets with the columns `prompt` and `completion` (text or messages), `messages`,
            `text`, or only `prompt`, which the model completes on policy. `finish_reason` "length" marks a cut completion.
        processing_class: the tokenizer; by default, the one saved with the model.
        callbacks, optimizers, quantization_config, peft_config: as in [`~trl.DistillationTrainer`].

    Raises:
        ValueError: if the data is too small for one optimizer step, the model or its attention backend is not supported, or
            options contradict each other. If possible, the error is raised before weights load.
    """

    _tag_names = list(TAGS)
    _name = "MTP self-distillation"
    _paper = PAPER

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
                "adapter_only=True publishes only an adapter, but this run has none; set exact=True or pass peft_config."
            )
        if args.adapter_only and not args.exact and peft_config is not None:
            check_publishable_lora(peft_config)
        tokenizer = processing_class or load_tokenizer(name, args)
        mask_token = mask_token_of(model, tokenizer, args)
        train_dataset = _prepare_split(train_dataset, tokenizer, args, mask_token, "train")
        eval_dataset = _prepare_split(eval_dataset, tokenizer, args, mask_token, "eval")
        check_one_step(
            train_dataset,
            per_device=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=args.world_size,
        )
        self.parallelism = Parallelism.of(args)
        if not has_completions(train_dataset):
            self.parallelism.check_completions(gathers=args.ds3_gather_for_generation)

        load = model_loader(model, args, quantization_config) if isinstance(model, str) else None
        student = load() if load else model
        teacher = None
        causal = dequantised(causal_lm(student))
        check_attention_backend(causal, args.device)
        check_positions(causal, max_length=args.max_length, k_max=args.k_max)
        add_mask_token(causal, tokenizer, mask_token=args.mask_token, k_max=args.k_max, seed=args.seed)
        self.provenance = provenance_of_run(base_model=name, args=args, mask_token=causal.config.mtp["mask_token"])
        if args.exact:
            make_exact(student, peft_config, args)
            peft_config = None
        elif peft_config is not None:
            peft_config = with_mask_row(peft_config, causal, causal.config.mtp["mask_token_id"])
            self.parallelism.check_lora(causal, peft_config)
        elif not is_peft_model(student):
            teacher = frozen_teacher(student, load, tokenizer, args)
        set_decoding_defaults(causal, confadapt=args.confadapt, verify=args.verify)
        with peft_flag_set(student) if args.exact else nullcontext():
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
        self.provenance["adapter"] = adapter_facts(self.model)
        if args.adapter_only and not args.exact:
            check_fits_base(self.model)
        self._attach_decoders()
        self._tokens = self._make_tokens(causal)
        self._totals: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._last_pass: PassOutput | None = None
        if not self.parallelism.is_wrapped:
            check_output_logits(causal)
            check_layout(causal, causal.config.mtp["mask_token_id"])
        if args.torch_compile:
            self._compile()
        if not can_pack(causal):
            logger.info("Training uses one row per region, since several regions cannot share a row with this architecture.")

    def _make_tokens(self, model: PreTrainedModel) -> Tokens:
        device, mtp = self.accelerator.device, model.config.mtp
        return Tokens(
            mask_id=mtp["mask_token_id"],
            pad_id=self._tokenizer.pad_token_id,
            barred=torch.tensor(mtp["barred_token_ids"], device=device),
            eos=torch.tensor(self.eos_token_ids, device=device),
        )

    def _compile(self) -> None:
        """Compile the backbones: `_forward_redirection` bypasses `model.forward`, which is what accelerate compiles."""
        for model in (self.model, self.teacher_model):
            if model is not None:
                body = backbone(causal_lm(self.accelerator.unwrap_model(model)))
                body.compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)

    # ---- data ----

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt", "prompt_ids", "completion_ids"]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return texts of the dataset, or prompts completed by the model, together with regions drawn on them."""
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
        weight_K = position_weights(self.args.k_max, self.args.place_decay)
        weight_BRK = drawn_positions(regions.size_BR, self.args.k_max) * weight_K
        weight = weight_BRK[..., int(self.args.exact) :].sum()  # exact mode does not train position 1
        counts = torch.stack([weight.to(clean_BN.device), (lengths_B - prompt_lengths_B).sum()])
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

    def _largest_block(self) -> int:
        """Return the largest block size to draw at this step."""
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
        """Return one random generator per row.

        Its seed is (seed, optimizer step, row of the global batch) in training, and (seed, text) in evaluation.
        """
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
        # For mixed precision, accelerate wraps `model.forward`, which `_forward_redirection` bypasses by calling this method.
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
        """Return the configured objective, or `ground_truth` during its warm-up."""
        warm_up = self.args.ground_truth_warmup * self.state.max_steps
        return "ground_truth" if self.model.training and self.state.global_step < warm_up else self.args.objective

    def _reader(self, unwrapped_student: Any) -> Reader:
        """Return the reader of student and teacher for this configuration."""
        student = causal_lm(unwrapped_student)
        teacher = student if self.teacher_model is None else self.accelerator.unwrap_model(self.teacher_model)
        measures_drift = self.args.ntp_coef > 0 or (self.args.drift_limit is not None and self.args.eval_strategy == "no")
        with_teacher = measures_drift or self._objective() != "ground_truth" or not self.model.training
        if self.args.exact:
            return ExactReader(student, with_teacher=with_teacher)
        run_teacher = self._teacher_runner(unwrapped_student) if with_teacher else None
        shares_head = self.teacher_model is None and adapts_head(student)
        state = functools.partial(adapters_disabled, unwrapped_student) if shares_head else nullcontext
        return WholeRowReader(student, teacher, run_teacher, state)

    def _teacher_runner(self, unwrapped_student: Any) -> Callable[[Callable[[PreTrainedModel], Tensor]], Tensor]:
        def run(read: Callable[[PreTrainedModel], Tensor]) -> Tensor:
            with torch.no_grad():
                if self.teacher_model is None:
                    with adapters_disabled(unwrapped_student):
                        return read(causal_lm(unwrapped_student))
                self.teacher_model.eval()
                teacher = self.accelerator.unwrap_model(self.teacher_model)
                # Call the wrapper's forward, in which DeepSpeed and FSDP gather the sharded weights.
                hidden: Tensor = self._forward_redirection(self.teacher_model, teacher, read, teacher)
                return hidden

        return run

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Compute the loss, and sum the statistics of the pass over ranks, outside the wrapped forward.

        Raises:
            FloatingPointError: if the training loss is not finite on any rank; all ranks raise.
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
            self._raise_not_finite("loss")
        return loss

    def create_optimizer(self, model: Any = None) -> Any:
        """Create Muon with AdamW if `muon` is set, else the optimizer of the base class."""
        if self.args.muon and getattr(self, "optimizer", None) is None:
            self.optimizer = muon_adamw(
                self.model if model is None else model,
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
            )
        return super().create_optimizer(model)

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log metrics, including the block statistics since the last log."""
        if totals := self._totals["train" if self.model.training else "eval"]:
            prefix = "" if self.model.training else "eval_"
            metrics = block_metrics(totals, thresholds=self.args.thresholds)
            logs.update({prefix + name: round(value, 5) for name, value in metrics.items()})
            totals.clear()
        super().log(logs, start_time)


def _prepare_split(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, args: MTPDistillConfig, mask_token: str, split: str
) -> Any:
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: _prepare_split(part, tokenizer, args, mask_token, name) for name, part in dataset.items()}
    return prepare_dataset(
        dataset,
        tokenizer,
        column_map=cast("dict[str, str] | None", args.column_map),  # a string was parsed in `__post_init__`
        max_length=args.max_length,
        mask_token=mask_token,
        desc=split,
    )
