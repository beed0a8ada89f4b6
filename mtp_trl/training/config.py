"""Configuration of `MTPDistillTrainer`."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trl import DistillationConfig

from ..custom_generate.mtp_config import LARGEST_BLOCK
from ..modeling.mask_token import MASK_TOKEN
from .drift_guard import DRIFT_ACTIONS
from .objective import OBJECTIVES


def described_once(cls: type) -> type:
    """Class decorator that sets the command-line help of each field to its entry in the docstring's "Parameters".

    Fields inherited from a base class are left unchanged.

    Raises:
        ValueError: if a field that the class itself defines has no entry.
    """
    if cls.__doc__ is None:  # python -OO
        return cls
    doc = inspect.cleandoc(cls.__doc__) + "\n"
    entries = re.findall(r"^ {4}(\w+(?:, \w+)*) \(.*\):\n((?: {8}.*\n)+)", doc, re.MULTILINE)
    help_of = {name: " ".join(text.split()).replace("%", "%%") for names, text in entries for name in names.split(", ")}
    defined_here = inspect.get_annotations(cls)
    for config_field in fields(cls):
        if config_field.name in defined_here:
            if config_field.name not in help_of:
                raise ValueError(f"{cls.__name__}.{config_field.name} has no entry in its docstring's Parameters; add one.")
            config_field.metadata = MappingProxyType({"help": help_of[config_field.name]})
    return cls


@described_once
@dataclass
class MTPDistillConfig(DistillationConfig):
    r"""Configuration of [`MTPDistillTrainer`]; it has every field of [`~trl.DistillationConfig`] as well.

    Parameters:
        k_min, k_max (`int`, *optional*, defaults to `2` and `16`):
            Block sizes are drawn uniformly from `[k_min, k_max]`; `k_max` is at most 1024. In the paper, fixed sizes cost
            12.5 points on GSM8K.
        slots_per_row (`int`, *optional*, defaults to `128`):
            Mask slots appended to every text; regions are drawn until the slots are full. More slots give more supervised
            positions for each clean token that is read.
        objective (`str`, *optional*, defaults to `"hard"`):
            Loss of a position: `"hard"` (cross-entropy with the teacher's most probable token), `"soft"` (KL(teacher,
            student)), `"reward"` (minus the teacher's log-probability, in expectation over the student's predictions),
            `"reward_literal"` (minus the log-probability of the student's own token, weighted with the probability that the
            teacher gives it) or `"ground_truth"` (cross-entropy with the text).
        ground_truth_warmup (`float`, *optional*, defaults to `0.0`):
            Share of the steps, at the start, that are supervised by the text instead of the teacher: late positions of a
            block learn little from a teacher that reads a rollout which is still noise. During these steps the teacher runs
            only if `ntp_coef` needs it.
        k_curriculum (`float`, *optional*, defaults to `0.0`):
            Share of the steps, at the start, over which the largest block drawn grows from `k_min` to `k_max`.
        place_decay (`float`, *optional*, defaults to `1.0`):
            Weight of each position of a block in the loss, relative to the position before it: position j counts
            `place_decay ** (j - 1)`. Below 1, the positions that decoding reaches most often count most.
        completions_by (`str`, *optional*, defaults to `"student"`):
            Who completes prompts that come without a completion. `"student"` and `"teacher"` generate one token at a time
            (in exact mode both are the base). `"student_blocks"` is the student decoding in blocks, accepted by the
            threshold `confadapt`: each block then starts from earlier blocks, as in decoding, and a text takes fewer passes.
        reward_floor (`float`, *optional*, defaults to `-20.0`):
            Smallest teacher log-probability (nats) that `objective="reward"` uses.
        ntp_coef (`float`, *optional*, defaults to `0.0`):
            Weight of KL(teacher, student) on the completion's own tokens, which preserves the quality of single-token
            prediction.
        drift_limit (`float`, *optional*):
            Largest KL(base, student), in nats per token, that single-token prediction may reach, measured on the evaluation
            set if there is one. Exact mode does not drift.
        drift_action (`str`, *optional*, defaults to `"warn"`):
            What happens when the limit is exceeded: `"warn"`, `"stop"` (after a checkpoint) or `"raise_ntp_coef"` (to 0.1,
            then doubled).
        gguf_file (`str`, *optional*):
            A GGUF file in the base's folder or repository. Tokenizer, config and weights are read from it, and the weights are
            dequantised. It needs the extra `gguf`.
        mask_token (`str`, *optional*, defaults to `"<|mtp|>"`):
            String of the mask token, if the tokenizer needs a new one.
        max_length (`int`, *optional*, defaults to `1024`):
            Longest prompt + completion, in tokens. Completions are cut to it; rows whose prompt fills it are dropped.
        column_map (`dict[str, str]`, *optional*):
            Renames dataset columns, e.g. `{"question": "prompt", "answer": "completion"}`.
        exact (`bool`, *optional*, defaults to `False`):
            Exact mode: freeze the base and train an adapter that acts at mask slots only, so that verified decoding returns
            the base's own text.
        exact_rank, exact_alpha (`int`, *optional*, default to `64` and `128`):
            Rank of exact mode's adapter, and the alpha of its scale alpha / rank.
        exact_target_modules (`list[str]`, *optional*):
            Linear layers that exact mode adapts, by the last part of their names. The default is those of the attention
            and, in models without experts, of the MLP.
        adapter_only (`bool`, *optional*, defaults to `False`):
            Push the adapter and the decoder without the base's weights; in exact mode they are not saved either. Such a
            repository is used as `model.generate(..., custom_generate=repository, trust_remote_code=True)`, where the model
            is the base (with LoRA: `PeftModel.from_pretrained(base, repository)`).
        confadapt, verify (`float` and `bool`, *optional*, default to `0.9` and to `exact`):
            Decoding defaults written into the model's `generation_config.json`.
        thresholds (`list[float]`, *optional*, defaults to `[0.9]`):
            ConfAdapt thresholds for which tokens per pass are logged.
        num_eval_prompts (`int`, *optional*, defaults to `8`):
            Held-out prompts decoded at each evaluation; 0 decodes none.
        logits_chunk_size (`int`, *optional*, defaults to `1024`):
            Positions whose logits are in memory at one time; they take about this times the size of the vocabulary.
        muon (`bool`, *optional*, defaults to `False`):
            Muon on the weight matrices, AdamW on everything else.
        learning_rate (`float`, *optional*, defaults to `1e-5`):
            Initial learning rate. The default is the paper's, unlike that of [`~trl.DistillationConfig`].
    """

    _VALID_DICT_FIELDS = [*DistillationConfig._VALID_DICT_FIELDS, "column_map"]

    learning_rate: float = 1e-5
    k_min: int = 2
    k_max: int = 16
    slots_per_row: int = 128
    objective: str = "hard"
    ground_truth_warmup: float = 0.0
    k_curriculum: float = 0.0
    place_decay: float = 1.0
    completions_by: str = "student"
    reward_floor: float = -20.0
    ntp_coef: float = 0.0
    drift_limit: float | None = None
    drift_action: str = "warn"
    gguf_file: str | None = None
    mask_token: str = MASK_TOKEN
    max_length: int = 1024
    column_map: dict[str, Any] | str | None = None
    confadapt: float = 0.9
    verify: bool | None = None
    exact: bool = False
    exact_rank: int = 64
    exact_alpha: int = 128
    exact_target_modules: list[str] | None = None
    adapter_only: bool = False
    thresholds: list[float] = field(default_factory=lambda: [0.9])
    num_eval_prompts: int = 8
    logits_chunk_size: int = 1024
    muon: bool = False

    def __post_init__(self) -> None:
        with warnings.catch_warnings():
            # TRL itself sets this option, which transformers has deprecated
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
            super().__post_init__()
        if self.k_min < 2 or self.k_max < self.k_min:
            raise ValueError(
                f"Block sizes need 2 <= k_min <= k_max, got k_min={self.k_min} and k_max={self.k_max}; "
                "for plain distillation use trl.DistillationTrainer."
            )
        if self.k_max > LARGEST_BLOCK:
            raise ValueError(
                f"k_max={self.k_max} exceeds the largest supported block, {LARGEST_BLOCK}; set it to at most {LARGEST_BLOCK}."
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}.")
        if "gguf_file" in (self.model_init_kwargs or {}):
            raise ValueError(
                "model_init_kwargs has gguf_file, which the tokenizer, the config and a published adapter need too; set the "
                "field gguf_file instead."
            )
        if self.gguf_file is not None and Path(self.gguf_file).is_absolute():
            raise ValueError(
                f"gguf_file={self.gguf_file!r} is a path, but must be the name of a file in the base's folder; pass "
                f"{Path(self.gguf_file).name!r}, and its folder as the model."
            )
        if self.verify is None:
            self.verify = self.exact
        if self.exact and self.ntp_coef > 0:
            raise ValueError(
                f"ntp_coef={self.ntp_coef} has no effect in exact mode, which does not change single-token prediction; "
                "set it to 0."
            )
        if self.drift_action not in DRIFT_ACTIONS:
            raise ValueError(f"drift_action must be one of {', '.join(DRIFT_ACTIONS)}, got {self.drift_action!r}.")
        if self.drift_limit is not None and (self.exact or self.drift_limit < 0):
            raise ValueError(f"drift_limit={self.drift_limit} must be >= 0, and unset in exact mode, which does not drift.")
        for name in ("slots_per_row", "logits_chunk_size", "max_length", "exact_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}.")
        if not 0 < self.exact_alpha < math.inf:
            raise ValueError(
                f"exact_alpha must be > 0, got {self.exact_alpha}; its scale is exact_alpha / exact_rank, and 128 is usual."
            )
        if not -math.inf < self.reward_floor < 0:
            raise ValueError(
                f"reward_floor must be a finite log-probability below 0 (nats), got {self.reward_floor}; -20 is usual."
            )
        if self.ntp_coef < 0 or self.num_eval_prompts < 0:
            raise ValueError(f"ntp_coef and num_eval_prompts must be >= 0, got {self.ntp_coef} and {self.num_eval_prompts}.")
        for name in ("ground_truth_warmup", "k_curriculum"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a share of the steps in [0, 1], got {getattr(self, name)}.")
        if self.place_decay <= 0:
            raise ValueError(f"place_decay must be > 0, got {self.place_decay}; 1 weights all positions equally.")
        if self.completions_by not in ("student", "teacher", "student_blocks"):
            raise ValueError(f"completions_by must be student, teacher or student_blocks, got {self.completions_by!r}.")
        # In exact mode, student and teacher both complete with the base.
        by_student = self.completions_by == "student" or (self.completions_by == "teacher" and self.exact)
        if self.use_vllm and not by_student:
            raise ValueError(
                f"completions_by={self.completions_by!r} is not available with use_vllm=True: vLLM completes prompts with the "
                "student's weights, one token at a time; use completions_by='student', or set use_vllm=False."
            )
        for threshold in (self.confadapt, *self.thresholds):
            if not 0.0 <= threshold <= 1.0:
                raise ValueError(f"A ConfAdapt threshold is a probability in [0, 1], got {threshold}.")
