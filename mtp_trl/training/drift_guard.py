"""Monitors how far training moves single-token prediction away from the base, and acts when a limit is exceeded."""

from __future__ import annotations

from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback

logger = get_logger(__name__)

DRIFT_ACTIONS = ("warn", "stop", "raise_ntp_coef")
_FIRST_COEF, _LARGEST_COEF = 0.1, 10.0
_WARN_BELOW = 0.75  # share of the best verified tokens per pass so far


class DriftGuard(TrainerCallback):
    """Compares every measurement of drift with `drift_limit` and takes `drift_action` if the limit is exceeded.

    Drift is KL(base, student) in nats per token on clean text: on the evaluation set if there is one, else on the training
    batch before the step. The guard also warns when verified decoding slows down, since fewer drafts then match the
    model's greedy output.

    Args:
        held_out: whether drift is measured on an evaluation set.
    """

    def __init__(self, *, held_out: bool) -> None:
        self.prefix = "eval_" if held_out else ""
        self.best: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """In a resumed run, restore the `ntp_coef` that the guard had raised."""
        raised = [entry["guard/ntp_coef"] for entry in state.log_history if "guard/ntp_coef" in entry]
        args.ntp_coef = max([args.ntp_coef, *raised])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Check the logged drift. Logs are sums over all processes, so every process takes the same action."""
        logs = logs or {}
        for name, value in logs.items():
            if name.startswith("eval_decoding/verified_"):
                self._check_verified(state.global_step, name, value)
        drift = logs.get(f"{self.prefix}drift/kl")
        if args.drift_limit is None or drift is None or drift <= args.drift_limit:
            return
        message = (
            f"Step {state.global_step}: single-token prediction has drifted from the base by {drift:.4g} nats per token, above "
            f"drift_limit={args.drift_limit:g}; the greedy tokens agree at {logs[f'{self.prefix}drift/agreement']:.1%} "
            "of the positions."
        )
        if args.drift_action == "stop":
            logger.warning(f"{message} The run saves a checkpoint and stops.")
            control.should_save = control.should_training_stop = True
        elif args.drift_action == "raise_ntp_coef":
            args.ntp_coef = min(_LARGEST_COEF, max(_FIRST_COEF, 2 * args.ntp_coef))
            logger.warning(f"{message} ntp_coef is now {args.ntp_coef:g}.")
            state.log_history.append({"guard/ntp_coef": args.ntp_coef, "step": state.global_step})
        else:
            logger.warning(message)

    def _check_verified(self, step: int, name: str, value: float) -> None:
        best = self.best[name] = max(value, self.best.get(name, 0.0))
        if value < _WARN_BELOW * best:
            logger.warning(f"Step {step}: {name} has fallen from {best:.2f} to {value:.2f} tokens per pass.")
