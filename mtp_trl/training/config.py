"""The configuration of `MTPDistillTrainer`: what is trained, on which regions, and what is written with the model."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from trl import DistillationConfig

from ..custom_generate.mtp_config import LARGEST_BLOCK
from ..modeling.mask_token import MASK_TOKEN
from .drift_guard import DRIFT_ACTIONS
from .objective import OBJECTIVES


@dataclass
class MTPDistillConfig(DistillationConfig):
    r"""Configuration of [`MTPDistillTrainer`]; every field of [`~trl.DistillationConfig`] is there too.

    Parameters:
        k_min, k_max (`int`, *optional*, defaults to `2` and `16`):
            Block sizes are drawn uniformly from `[k_min, k_max]`; `k_max` is at most 1024. In the paper fixed sizes cost 12.5
            points on GSM8K.
        slots_per_row (`int`, *optional*, defaults to `128`):
            Mask slots behind every text; regions are drawn until they are full. More slots give more supervised places for
            each clean token that is read.
        objective (`str`, *optional*, defaults to `"hard"`):
            `"hard"`, `"soft"`, `"reward"`, `"reward_literal"` or `"ground_truth"`.
        ground_truth_warmup (`float`, *optional*, defaults to `0.0`):
            Share of the steps, at the start, that are supervised by the text itself: places far into a block learn little
            from a teacher that reads a rollout which is still noise. The teacher rests meanwhile, unless `ntp_coef` needs it.
        k_curriculum (`float`, *optional*, defaults to `0.0`):
            Share of the steps, at the start, over which the largest block drawn grows from `k_min` to `k_max`.
        place_decay (`float`, *optional*, defaults to `1.0`):
            Place j of a block counts `place_decay ** (j - 1)` in the loss: below 1 the places that are reached most often
            in decoding count most.
        completions_by (`str`, *optional*, defaults to `"student"`):
            Who completes prompts that come without a completion: `"student"` or `"teacher"`, one token at a time (in exact
            mode both are the base), or `"student_blocks"`: the student in blocks, kept as far as `confadapt` says. Then each
            block starts from the blocks before it, as in decoding, and a text takes fewer passes.
        reward_floor (`float`, *optional*, defaults to `-20.0`):
            Smallest teacher log-probability (nats) that `objective="reward"` uses.
        ntp_coef (`float`, *optional*, defaults to `0.0`):
            Weight of KL(teacher, student) on the completion's own tokens, which keeps single-token quality.
        drift_limit (`float`, *optional*):
            Largest KL(base, student) in nats per token that single-token prediction may reach, on the evaluation set where
            there is one. In exact mode there is no drift.
        drift_action (`str`, *optional*, defaults to `"warn"`):
            What happens beyond it: `"warn"`, `"stop"` (after a checkpoint) or `"raise_ntp_coef"` (to 0.1, then doubled).
        mask_token (`str`, *optional*, defaults to `"<|mtp|>"`):
            String of the mask token where one has to be added.
        max_length (`int`, *optional*, defaults to `1024`):
            Longest prompt + completion, in tokens. Completions are cut to it; rows whose prompt fills it are left out.
        column_map (`dict[str, str]`, *optional*):
            Renames dataset columns, e.g. `{"question": "prompt", "answer": "completion"}`.
        exact (`bool`, *optional*, defaults to `False`):
            Freeze the base and train an adapter that acts at mask slots alone: the text stays the base's own.
        exact_rank, exact_alpha (`int`, *optional*, default to `64` and `128`):
            Rank of the exact mode's adapter and its scale, alpha / rank.
        exact_target_modules (`list[str]`, *optional*):
            Last parts of the names of the linear layers it adapts; by default those of the attention and, in models
            without experts, of the MLP.
        adapter_only (`bool`, *optional*, defaults to `False`):
            Push the adapter and the decoder without the base's weights, and in exact mode save no more either; such a
            repository is used as `model.generate(..., custom_generate=repository, trust_remote_code=True)`, where the model
            is the base, with LoRA `PeftModel.from_pretrained(base, repository)`.
        confadapt, verify (`float` and `bool`, *optional*, default to `0.9` and to `exact`):
            Decoding defaults written into the model's `generation_config.json`.
        thresholds (`list[float]`, *optional*, defaults to `[0.9]`):
            ConfAdapt thresholds whose acceleration is logged.
        num_eval_prompts (`int`, *optional*, defaults to `8`):
            Held-out prompts decoded at each evaluation; 0 decodes none.
        logits_chunk_size (`int`, *optional*, defaults to `1024`):
            Places whose logits exist at one time; memory for logits is about this times the vocabulary.
        muon (`bool`, *optional*, defaults to `False`):
            Muon on the weight matrices, AdamW elsewhere.

    Differs from [`~trl.DistillationConfig`] in one default: `learning_rate` is `1e-5`, the paper's.
    """

    _VALID_DICT_FIELDS = [*DistillationConfig._VALID_DICT_FIELDS, "column_map"]

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate."})
    k_min: int = field(default=2, metadata={"help": "Smallest block size drawn."})
    k_max: int = field(default=16, metadata={"help": "Largest block size drawn."})
    slots_per_row: int = field(default=128, metadata={"help": "Mask slots behind every text."})
    objective: str = field(default="hard", metadata={"help": f"One of {', '.join(OBJECTIVES)}."})
    ground_truth_warmup: float = field(
        default=0.0, metadata={"help": "Share of the steps supervised by the text before the teacher takes over."}
    )
    k_curriculum: float = field(default=0.0, metadata={"help": "Share of the steps over which blocks grow to k_max."})
    place_decay: float = field(default=1.0, metadata={"help": "Weight of each place of a block against the one before."})
    completions_by: str = field(
        default="student", metadata={"help": "Who completes bare prompts: student, teacher or student_blocks."}
    )
    reward_floor: float = field(default=-20.0, metadata={"help": "Smallest teacher log-probability in nats."})
    ntp_coef: float = field(default=0.0, metadata={"help": "Weight of the KL to the teacher on clean positions."})
    drift_limit: float | None = field(default=None, metadata={"help": "Largest KL to the base in nats per clean token."})
    drift_action: str = field(default="warn", metadata={"help": f"Beyond it: one of {', '.join(DRIFT_ACTIONS)}."})
    mask_token: str = field(default=MASK_TOKEN, metadata={"help": "String of the mask token to add."})
    max_length: int = field(default=1024, metadata={"help": "Longest prompt + completion in tokens."})
    column_map: dict[str, Any] | str | None = field(default=None, metadata={"help": "Renames dataset columns."})
    confadapt: float = field(default=0.9, metadata={"help": "Default decoding threshold written with the model."})
    verify: bool | None = field(
        default=None, metadata={"help": "Whether the model's default decoding is verified; by default in exact mode."}
    )
    exact: bool = field(default=False, metadata={"help": "Train an adapter that acts at mask slots alone."})
    exact_rank: int = field(default=64, metadata={"help": "Rank of the exact mode's adapter."})
    exact_alpha: int = field(default=128, metadata={"help": "Its scale is alpha / rank."})
    exact_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Linear layers it adapts, by the last part of their names."}
    )
    adapter_only: bool = field(default=False, metadata={"help": "Publish the adapter without the base's weights."})
    thresholds: list[float] = field(
        default_factory=lambda: [0.9], metadata={"help": "ConfAdapt thresholds whose acceleration is logged."}
    )
    num_eval_prompts: int = field(default=8, metadata={"help": "Held-out prompts decoded at each evaluation."})
    logits_chunk_size: int = field(default=1024, metadata={"help": "Places whose logits exist at one time."})
    muon: bool = field(default=False, metadata={"help": "Muon on weight matrices, AdamW elsewhere."})

    def __post_init__(self) -> None:
        with warnings.catch_warnings():
            # TRL's own default, under a name that transformers has deprecated
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
            super().__post_init__()
        if self.k_min < 2 or self.k_max < self.k_min:
            raise ValueError(
                f"Block sizes need 2 <= k_min <= k_max, got k_min={self.k_min} and k_max={self.k_max}; "
                "for plain distillation use trl.DistillationTrainer."
            )
        if self.k_max > LARGEST_BLOCK:
            raise ValueError(f"k_max={self.k_max} is more than decoding takes in one block; set it to at most {LARGEST_BLOCK}.")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}.")
        if self.verify is None:
            self.verify = self.exact
        if self.exact and self.ntp_coef > 0:
            raise ValueError(
                f"exact mode leaves the text's own predictions to the frozen base, so ntp_coef={self.ntp_coef} has nothing "
                "to train; set it to 0."
            )
        if self.drift_action not in DRIFT_ACTIONS:
            raise ValueError(f"drift_action must be one of {', '.join(DRIFT_ACTIONS)}, got {self.drift_action!r}.")
        if self.drift_limit is not None and (self.exact or self.drift_limit < 0):
            raise ValueError(
                f"drift_limit={self.drift_limit} must be >= 0, and unset in exact mode, where the text is the base's own."
            )
        for name in ("slots_per_row", "logits_chunk_size", "max_length", "exact_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}.")
        if not 0 < self.exact_alpha < math.inf:
            raise ValueError(
                f"exact_alpha must be > 0, got {self.exact_alpha}: its scale is exact_alpha / exact_rank. 128 is usual."
            )
        if not -math.inf < self.reward_floor < 0:
            raise ValueError(f"reward_floor is a log-probability in nats, below 0, got {self.reward_floor}; -20 is usual.")
        if self.ntp_coef < 0 or self.num_eval_prompts < 0:
            raise ValueError(f"ntp_coef and num_eval_prompts must be >= 0, got {self.ntp_coef} and {self.num_eval_prompts}.")
        for name in ("ground_truth_warmup", "k_curriculum"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is a share of the steps in [0, 1], got {getattr(self, name)}.")
        if self.place_decay <= 0:
            raise ValueError(f"place_decay must be > 0, got {self.place_decay}; 1 counts all places alike.")
        if self.completions_by not in ("student", "teacher", "student_blocks"):
            raise ValueError(f"completions_by must be student, teacher or student_blocks, got {self.completions_by!r}.")
        by_student = self.completions_by == "student" or (self.completions_by == "teacher" and self.exact)  # both the base
        if self.use_vllm and not by_student:
            raise ValueError(
                f"completions_by={self.completions_by!r} needs this project's own generate: vLLM completes prompts with the "
                "student's weights, one token at a time; with use_vllm=True use 'student'."
            )
        for threshold in (self.confadapt, *self.thresholds):
            if not 0.0 <= threshold <= 1.0:
                raise ValueError(f"A ConfAdapt threshold is a probability in [0, 1], got {threshold}.")
