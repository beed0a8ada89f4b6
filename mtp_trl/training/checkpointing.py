"""Nothing of a run is lost: checkpoints appear whole or not at all, SIGTERM saves one more, NaN never reaches one."""

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
    """The base trainer with atomic checkpoints, a stop at SIGTERM, and an error in place of a step on NaN.

    Attributes:
        stopped_at: the step whose checkpoint was saved because of SIGTERM; None in a run that ended by itself.
    """

    stopped_at: int | None = None
    _saving = False
    _guarded: Any = None  # the DeepSpeed engine whose step is watched
    _published: Path | None = None  # the last checkpoint of this training
    _saved: tuple[str, int] | None = None  # the last folder, and the step

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream. SIGTERM, which schedulers send before they take a machine away, saves and ends the run."""
        self._published = self._saved = None  # trained once more, the same step has other weights
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
        """As upstream, into a folder beside the checkpoint's place that is renamed when all is written."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        place = Path(self._get_output_dir(trial)) / name
        partial = place.parent / PARTIAL
        if place == self._published:  # at a save interval or at SIGTERM, and again at the end: the weights are the same
            self._rewrite_state(place)
            return
        if self.is_local_process_zero():
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it saved
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(partial / name / TRAINER_STATE_NAME))
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
            if isinstance(error, torch.OutOfMemoryError):
                raise
            message = self._not_written(place, error)
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(message) from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            _publish(partial / name, place)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and (partial / name).is_dir():  # nodes that share no disk have a folder each
            _publish(partial / name, place)
        self.accelerator.wait_for_everyone()
        self._published = place
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))
        if self.args.should_save:
            rotate_checkpoints(str(place.parent), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False)

    def _rewrite_state(self, place: Path) -> None:
        """With what has been measured since the step was saved."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(place)
        if self.args.should_save:
            written = place / f".{TRAINER_STATE_NAME}"
            self.state.save_to_json(str(written))
            written.replace(place / TRAINER_STATE_NAME)

    def _not_written(self, place: Path, error: Exception) -> str:
        free = shutil.disk_usage(place.parent).free / 2**20
        last = get_last_checkpoint(place.parent)
        rest = f"{last} is whole: the same command goes on from there" if last else "there is no earlier one"
        return f"{place} could not be written ({error}; {free:,.0f} MB are free), so the run stops here; {rest}."

    # ---- NaN ----

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As upstream; DeepSpeed without ZeRO is kept from a step on gradients that are not finite."""
        wrapper = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        if wrapper is not None and self._guarded is not wrapper.engine and not self.args.fp16:
            self._guarded = wrapper.engine
            if wrapper.engine.zero_optimization_stage() == 0:
                wrapper.engine.step = functools.partial(self._step_if_finite, wrapper.engine, wrapper.engine.step)
        return super().training_step(*args, **kwargs)

    def _step_if_finite(self, engine: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed steps within backward. With ZeRO it leaves such a step out and reports an infinite norm by itself."""
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        if gradients and not bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all()):
            self._refuse("gradient norm")
        return step(*args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As upstream; called before the optimizer's step, under DeepSpeed after it. In fp16 the loss scale deals with it."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not self.args.fp16 and not math.isfinite(float(norm)):
            self._refuse("gradient norm")
        return norm

    def _refuse(self, what: str) -> None:
        """Raises FloatingPointError before a value that is not finite reaches weights or a checkpoint."""
        last = get_last_checkpoint(self.args.output_dir) if Path(self.args.output_dir).is_dir() else None
        raise FloatingPointError(
            f"The {what} of step {self.state.global_step + 1} is not finite. No checkpoint has seen it"
            + (f"; {last} is the last" if last else "")
            + f". Lower learning_rate={self.args.learning_rate:g}, or train in bf16 or float32 instead of fp16."
        )


def _publish(partial: Path, place: Path) -> None:
    """Give a folder its name once its files have reached the disk."""
    for path in [*partial.rglob("*"), partial]:
        if path.is_dir() and os.name == "nt":  # Windows opens no folders
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    replaced = place.with_name(f".replaced-{place.name}")
    if place.is_dir():  # of another run in the same folder
        shutil.rmtree(replaced, ignore_errors=True)
        place.rename(replaced)
    partial.rename(place)
    partial.parent.rmdir()
    shutil.rmtree(replaced, ignore_errors=True)


class _StopAtSigterm(TrainerCallback):
    def __init__(self, trainer: CheckpointingTrainer) -> None:
        self.trainer = trainer
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        try:
            before = signal.signal(signal.SIGTERM, self._ask)
        except ValueError:  # not the main thread, which alone may listen
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every process hears its own signal, at a moment of its own: all stop after the same step."""
        asked = torch.tensor(float(self.asked), device=self.trainer.accelerator.device)
        if self.trainer.accelerator.reduce(asked, "sum") > 0:
            control.should_save = control.should_training_stop = True
            self.trainer.stopped_at = state.global_step
