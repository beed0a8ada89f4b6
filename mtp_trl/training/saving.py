"""Saving and publishing: models in the Hub's layout, in the output folder, in every checkpoint and on the Hub."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from transformers.trainer import TRAINING_ARGS_NAME, PushInProgress
from transformers.trainer_utils import HubStrategy

from ..modeling.exact import split_adapter
from ..modeling.files import public_name, write_atomically
from ..modeling.lora import causal_lm
from ..modeling.parallelism import Parallelism, loading_whole_weights
from ..publishing.calibration_file import CALIBRATION_FILE, use_calibrated_threshold
from ..publishing.card import RESULTS_FOLDER, write_card
from ..publishing.merging import save_merged, write_mask_row
from ..publishing.push import push, push_unchanged
from ..publishing.repository import load_adapter, write_decoder
from .checkpointing import CheckpointingTrainer

logger = get_logger(__name__)


class PublishingTrainer(CheckpointingTrainer):
    """Trainer that saves and pushes the decoder, the adapter, the provenance and a model card together with the weights.

    Attributes:
        provenance: base model, settings and versions of the run; saved with the model.
        parallelism: how the run distributes its weights.
    """

    provenance: dict[str, Any]
    parallelism: Parallelism
    _tokenizer: Any  # set by the base class
    push_in_progress: Any  # set by the base class, without a type

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = output_dir or self.args.output_dir
        unchanged = self._last_save == (folder, self.state.global_step)
        if self.args.should_save and not unchanged:
            _rename_outdated_measurements(Path(folder))
        adapter = None
        if self.args.exact and state_dict is not None:
            adapter, state_dict = split_adapter(causal_lm(self.model), state_dict)
        token, self.args.hub_token = self.args.hub_token, None  # training_args.bin is pushed and must not contain it
        try:
            if not (self.args.adapter_only and self.args.exact):
                self._save_weights(folder, state_dict)
            elif self.args.should_save:
                self._tokenizer.save_pretrained(folder)
                torch.save(self.args, Path(folder) / TRAINING_ARGS_NAME)
        finally:
            self.args.hub_token = token
        if self.args.should_save:
            write_decoder(folder, causal_lm(self.model), self.provenance, adapter=adapter)
            if is_peft_model(self.model):
                write_mask_row(Path(folder), self.model, self.provenance)
            if unchanged:
                use_calibrated_threshold(Path(folder))
            self._last_save = (folder, self.state.global_step)

    def _save_weights(self, folder: str, state_dict: dict[str, Any] | None) -> None:
        """Save the weights, and undo PEFT's change to README.md.

        PEFT writes a generic card next to adapters, which would later be mistaken for one that the author wrote.
        """
        card = Path(folder) / "README.md"
        previous_card = card.read_text(encoding="utf-8") if card.is_file() else None
        super()._save(folder, state_dict)
        if self.args.should_save and is_peft_model(self.model):
            card.unlink(missing_ok=True)
            if previous_card is not None:
                write_atomically(card, previous_card)

    def _load_best_model(self) -> None:
        if self.args.exact and not self.parallelism.is_wrapped:
            load_adapter(causal_lm(self.model), self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.args.exact and self.parallelism.fsdp_version is None:  # the frozen base is loaded already
            load_adapter(causal_lm(self.model), resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card, README.md, into the output folder."""
        if self.is_world_process_zero():
            write_card(
                self.args.output_dir,
                model_name=model_name or Path(self.args.output_dir).name,
                dataset_name=dataset_name,
                tags=[tags] if isinstance(tags, str) else tags or (),
                repo_id=self.hub_model_id,
                provenance=self.provenance,
            )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push the model in one commit; the arguments are those of [`~transformers.Trainer.push_to_hub`].

        LoRA adapters are merged first, so that the repository loads on its own. With `adapter_only` in the configuration, the
        repository contains the adapter and the decoder, but not the base's weights.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if dataset_name := kwargs.get("dataset_name"):
            self.provenance["dataset"] = public_name(dataset_name)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs.setdefault("model_name", self.hub_model_id.split("/")[-1])
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return self._push_folder(
            self.args.output_dir, commit_message, blocking=blocking, token=token, revision=revision, private=private,
            tags=kwargs.get("tags"),
        )  # fmt: skip

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint in the background.

        The base class would omit the decoder and the adapter, and upload `training_args.bin` with the Hub token in it.
        """
        if self._saving:  # the folder is about to be renamed; `_save_checkpoint` calls this method again afterwards
            return
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = [] if self.push_in_progress is None else [job for job in self.push_in_progress.jobs if not job.done()]
        if running and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = []
        try:
            jobs.append(self._push_folder(checkpoint_folder, message, blocking=False))
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                last = self.args.hub_strategy == HubStrategy.CHECKPOINT
                job = push_unchanged(
                    checkpoint_folder,
                    self.hub_model_id,
                    path_in_repo="last-checkpoint" if last else Path(checkpoint_folder).name,
                    token=self.args.hub_token,
                    revision=self.args.hub_revision,
                    commit_message=f"{message}, checkpoint",
                )
                jobs.append(job)
        except Exception as error:  # out of memory while merging, disk full, Hub unreachable: go on training
            logger.warning(_PUSH_FAILED.format(error=f"{type(error).__name__}: {error}"))
        for job in jobs:
            job.add_done_callback(_warn_if_failed)
        self.push_in_progress = PushInProgress([*running, *jobs])

    def _push_folder(
        self,
        folder: str,
        message: str | None,
        *,
        blocking: bool,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        tags: str | list[str] | None = None,
    ) -> Any:
        # If weights are sharded, `push` loads the base again and merges the adapters saved in the folder into it.
        merged = None
        if is_peft_model(self.model) and not self.args.adapter_only and not self.parallelism.is_sharded:
            merged = save_merged(self.model, self._tokenizer, Path(self.args.output_dir) / "merged", self.provenance)
        with loading_whole_weights():
            return push(
                folder,
                self.hub_model_id,
                private=self.args.hub_private_repo if private is None else private,
                token=token or self.args.hub_token,
                revision=revision or self.args.hub_revision,
                commit_message=message or "Upload model",
                adapter_only=self.args.adapter_only,
                tags=[tags] if isinstance(tags, str) else tags or (),
                merged=merged,
                blocking=blocking,
            )


_PUSH_FAILED = "A push during training failed; training goes on, and the next push uploads the model again: {error}"


def _warn_if_failed(job: Future[Any]) -> None:
    """Log a failed push instead of ending the training."""
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.warning(_PUSH_FAILED.format(error=error))


def _rename_outdated_measurements(folder: Path) -> None:
    """Rename the calibration and results of weights that are about to be replaced, to names that are never pushed."""
    for name in (CALIBRATION_FILE, RESULTS_FOLDER):
        measured, renamed = folder / name, folder / f"earlier_{name}"
        if measured.exists():
            if renamed.is_dir():
                shutil.rmtree(renamed)
            measured.replace(renamed)
            logger.warning(f"{measured} was measured on other weights; renamed it to {renamed.name}.")
