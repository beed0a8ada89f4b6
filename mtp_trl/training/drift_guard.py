"""Watches what a run does to the model's own single-token text, and acts before much of it is lost."""

from __future__ import annotations

from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback

logger = get_logger(__name__)

DRIFT_ACTIONS = ("warn", "stop", "raise_ntp_coef")
_FIRST_COEF, _LARGEST_COEF = 0.1, 10.0
_FALL = 0.75  # of the best verified tokens per pass so far


class DriftGuard(TrainerCallback):
    """Compares every measurement of drift with `drift_limit` and does what `drift_action` says.

    Drift is KL(base, student) in nats per token on clean text: of the evaluation set where there is one, else of the text
    trained on, before the step. Verified decoding that loses speed is warned about as well: there the guesses stopped
    matching the model's own text.
    """

    def __init__(self, *, held_out: bool) -> None:
        self.prefix = "eval_" if held_out else ""
        self.best: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run goes on with the coefficient that its guard had raised."""
        raised = [entry["guard/ntp_coef"] for entry in state.log_history if "guard/ntp_coef" in entry]
        args.ntp_coef = max([args.ntp_coef, *raised])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The same on every process: logs are sums over all of them."""
        logs = logs or {}
        for name, value in logs.items():
            if name.startswith("eval_decoding/verified_"):
                self._watch_verified(state.global_step, name, value)
        drift = logs.get(f"{self.prefix}drift/kl")
        if args.drift_limit is None or drift is None or drift <= args.drift_limit:
            return
        message = (
            f"Step {state.global_step}: single-token text has drifted from the base by {drift:.4g} nats a token, more than "
            f"drift_limit={args.drift_limit:g}; the greedy token is the same at {logs[f'{self.prefix}drift/agreement']:.1%} "
            "of the places."
        )
        if args.drift_action == "stop":
            logger.warning(f"{message} The run stops here and saves.")
            control.should_save = control.should_training_stop = True
        elif args.drift_action == "raise_ntp_coef":
            args.ntp_coef = min(_LARGEST_COEF, max(_FIRST_COEF, 2 * args.ntp_coef))
            logger.warning(f"{message} ntp_coef is now {args.ntp_coef:g}.")
            state.log_history.append({"guard/ntp_coef": args.ntp_coef, "step": state.global_step})
        else:
            logger.warning(message)

    def _watch_verified(self, step: int, name: str, value: float) -> None:
        best = self.best[name] = max(value, self.best.get(name, 0.0))
        if value < _FALL * best:
            logger.warning(f"Step {step}: {name} has fallen from {best:.2f} to {value:.2f} tokens per pass.")
