"""Fault tolerance: checkpoints are atomic, SIGTERM saves one before the run stops, and NaN never reaches one."""

from __future__ import annotations

import functools
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints
from trl import DistillationTrainer

PARTIAL = ".partial-checkpoint"


class CheckpointingTrainer(DistillationTrainer):
    """Trainer with atomic checkpoints that saves and stops at SIGTERM, and raises instead of stepping on NaN.

    Attributes:
        stopped_at: the step whose checkpoint was saved because of SIGTERM; None if the run was not stopped that way.
    """

    stopped_at: int | None = None
    _saving = False
    _checked_engine: Any = None  # the DeepSpeed engine whose `step` checks for non-finite gradients
    _published: Path | None = None  # the last checkpoint of the current `train` call
    _last_save: tuple[str, int] | None = None  # folder and step of the last saved model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as [`~transformers.Trainer.train`] does; at SIGTERM, save a checkpoint and stop.

        Schedulers send SIGTERM before they take a machine away.
        """
        # When `train` is called again, the same step number has different weights.
        self._published = self._last_save = None
        stop = _StopAtSigterm(self)
        self.add_callback(stop)
        try:
            with stop.listening():
                return super().train(*args, **kwargs)
        finally:
            self.remove_callback(stop)

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return str(Path(folder) / PARTIAL) if self._saving else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save into a temporary folder in the output folder, and rename it once everything is written."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        target = Path(self._get_output_dir(trial)) / name
        partial = target.parent / PARTIAL
        # A step that was saved on an interval or at SIGTERM can be saved again at the end of the epoch, with equal weights.
        if target == self._published:
            self._rewrite_state(target)
            return
        if self.is_local_process_zero():
            shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed while saving
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(target)
            if self.args.should_save:
                self.state.save_to_json(str(partial / name / TRAINER_STATE_NAME))
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise their own types on a full disk
            if isinstance(error, torch.OutOfMemoryError):
                raise
            message = self._write_failure(target, error)
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(message) from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            _publish(partial / name, target)
        self.accelerator.wait_for_everyone()
        # Without a shared disk, every node has its own temporary folder.
        if self.is_local_process_zero() and (partial / name).is_dir():
            _publish(partial / name, target)
        self.accelerator.wait_for_everyone()
        self._published = target
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self.args.should_save:
            rotate_checkpoints(
                str(target.parent), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False
            )

    def _rewrite_state(self, checkpoint: Path) -> None:
        """Update the trainer state of a saved checkpoint with the metrics logged since then."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(checkpoint)
        if self.args.should_save:
            temporary = checkpoint / f".{TRAINER_STATE_NAME}"
            self.state.save_to_json(str(temporary))
            temporary.replace(checkpoint / TRAINER_STATE_NAME)

    def _write_failure(self, checkpoint: Path, error: Exception) -> str:
        free = shutil.disk_usage(checkpoint.parent).free / 2**20
        last = get_last_checkpoint(checkpoint.parent)
        remedy = f"{last} is complete: resume from it" if last else "there is no earlier checkpoint"
        return f"{checkpoint} could not be written ({error}; {free:,.0f} MB are free), so the run stops here; {remedy}."

    # ---- NaN ----

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run one training step; DeepSpeed without ZeRO raises instead of stepping on non-finite gradients."""
        wrapper = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        if wrapper is not None and self._checked_engine is not wrapper.engine and not self.args.fp16:
            self._checked_engine = wrapper.engine
            if wrapper.engine.zero_optimization_stage() == 0:
                wrapper.engine.step = functools.partial(self._step_if_finite, wrapper.engine, wrapper.engine.step)
        return super().training_step(*args, **kwargs)

    def _step_if_finite(self, engine: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Raise FloatingPointError if a gradient is not finite, else step.

        DeepSpeed steps within backward, before `_get_grad_norm` is called. With ZeRO this check is not needed, because
        DeepSpeed skips such a step and reports an infinite norm.
        """
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        if gradients and not bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all()):
            self._raise_not_finite("gradient norm")
        return step(*args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the gradient norm; raise FloatingPointError if it is not finite.

        Trainer calls this before the optimizer's step, but after it under DeepSpeed. In fp16 nothing is raised, because the
        gradient scaler skips such steps.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not self.args.fp16 and not math.isfinite(float(norm)):
            self._raise_not_finite("gradient norm")
        return norm

    def _raise_not_finite(self, quantity: str) -> None:
        """Raise FloatingPointError before a non-finite value reaches the weights or a checkpoint."""
        last = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
        raise FloatingPointError(
            f"The {quantity} of step {self.state.global_step + 1} is not finite. No checkpoint contains it"
            + (f"; the last one is {last}" if last else "")
            + f". Lower learning_rate={self.args.learning_rate:g}, or train in bf16 or float32 instead of fp16."
        )


def _publish(partial: Path, target: Path) -> None:
    """Flush a folder's files to disk, then rename it to `target`."""
    for path in [*partial.rglob("*"), partial]:
        if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    replaced = target.with_name(f".replaced-{target.name}")
    if target.is_dir():  # saved by another run in the same folder
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    partial.rename(target)
    partial.parent.rmdir()
    shutil.rmtree(replaced, ignore_errors=True)


class _StopAtSigterm(TrainerCallback):
    def __init__(self, trainer: CheckpointingTrainer) -> None:
        self.trainer = trainer
        self.received = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        try:
            previous_handler = signal.signal(signal.SIGTERM, self._on_signal)
        except ValueError:  # only the main thread can set a signal handler
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous_handler)

    def _on_signal(self, *_: Any) -> None:
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if any process has received SIGTERM.

        Processes receive the signal at different moments, so they agree on the step after which all of them stop.
        """
        received = torch.tensor(float(self.received), device=self.trainer.accelerator.device)
        if self.trainer.accelerator.reduce(received, "sum") > 0:
            control.should_save = control.should_training_stop = True
            self.trainer.stopped_at = state.global_step
