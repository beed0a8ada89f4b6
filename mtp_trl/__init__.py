"""Public API of mtp_trl. Each name is imported on first use, so that `import mtp_trl` stays fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .custom_generate.choice import ConfAdaptLogitsProcessor
    from .custom_generate.generate import attach_decoder
    from .custom_generate.output import MTPGenerateOutput
    from .modeling.mask_token import add_mask_token
    from .training.config import MTPDistillConfig
    from .training.trainer import MTPDistillTrainer

__version__ = "0.1.0"

__all__ = [
    "ConfAdaptLogitsProcessor",
    "MTPDistillConfig",
    "MTPDistillTrainer",
    "MTPGenerateOutput",
    "__version__",
    "add_mask_token",
    "attach_decoder",
]

_MODULES = {
    "ConfAdaptLogitsProcessor": "custom_generate.choice",
    "MTPDistillConfig": "training.config",
    "MTPDistillTrainer": "training.trainer",
    "MTPGenerateOutput": "custom_generate.output",
    "add_mask_token": "modeling.mask_token",
    "attach_decoder": "custom_generate.generate",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mtp_trl' has no attribute {name!r}; its public names are {', '.join(__all__)}.")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
