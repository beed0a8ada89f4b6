"""Muon for weight matrices and AdamW for all other parameters, in one `torch.optim.Optimizer`."""

# Shapes: I columns of a weight matrix, O rows of a weight matrix, Y weight matrices of one shape

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

# Quintic Newton-Schulz coefficients of https://kellerjordan.github.io/posts/muon/. They maximise the slope at zero, so that
# five iterations bring every singular value near 1 (about 0.7 to 1.2).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


def orthogonalise(update_YOI: Tensor) -> Tensor:
    """Return a stack of matrices (O <= I) with all singular values replaced by about 1, in the same shape.

    On an accelerator it runs in bfloat16, as in the original. On the CPU it runs in float32, which is several times faster
    on CPUs without bfloat16 units. The result has the dtype in which it ran.
    """
    a, b, c = _NEWTON_SCHULZ
    x_YOI = update_YOI.float() if update_YOI.device.type == "cpu" else update_YOI.bfloat16()
    # The iteration converges for spectral norms up to 1; the Frobenius norm bounds the spectral norm.
    x_YOI = x_YOI / torch.linalg.matrix_norm(x_YOI, keepdim=True).clamp(min=1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram_YOO = x_YOI @ x_YOI.mT
        x_YOI = torch.baddbmm(x_YOI, torch.baddbmm(gram_YOO, gram_YOO, gram_YOO, beta=b, alpha=c), x_YOI, beta=a)
    return x_YOI


class MuonAdamW(Optimizer):
    """Muon (momentum orthogonalised by Newton-Schulz) on 2-D weights, AdamW on the rest.

    Muon's step is scaled by 0.2 sqrt(max(rows, columns)), so that its RMS matches AdamW's and both can share one learning
    rate and one schedule (arXiv 2502.16982). Weight decay is decoupled and applies to the matrices only. ZeRO-3 and FSDP
    shard or flatten parameters, which are then not matrices; use AdamW with them.

    Raises:
        ValueError: if `lr` or `momentum` is out of range, or a parameter in `matrices` is not 2-D.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if lr < 0:
            raise ValueError(f"lr must be >= 0, got {lr}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
        matrices = list(matrices)
        for parameter in matrices:
            if parameter.ndim != 2:
                raise ValueError(
                    f"Muon needs 2-D weights, got a parameter of shape {tuple(parameter.shape)}; pass it in `others`, "
                    "and use AdamW if the weights are sharded (ZeRO-3, FSDP 1)."
                )
        groups: list[dict[str, Any]] = [
            {"params": matrices, "muon": True, "weight_decay": weight_decay},
            {"params": list(others), "muon": False, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the closure's loss, or None without a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon_step(parameters, group)
            elif parameters:
                self._adamw_step(parameters, group)
        return loss

    def _muon_step(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        same_shape: defaultdict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            same_shape[parameter.shape].append(parameter)
        for (rows, columns), stack in same_shape.items():
            update_YOI = torch.stack([self._nesterov(parameter, group["momentum"]) for parameter in stack])
            tall = rows > columns
            update_YOI = orthogonalise(update_YOI.mT if tall else update_YOI)
            scale = 0.2 * max(rows, columns) ** 0.5
            for parameter, update in zip(stack, update_YOI.mT if tall else update_YOI, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)

    def _nesterov(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)

    def _adamw_step(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            list[Tensor](parameters),
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def muon_adamw(model: nn.Module, **options: Any) -> MuonAdamW:
    """Create `MuonAdamW` for a model's trainable parameters: Muon on every matrix except embeddings and the output head.

    Args:
        model: model whose trainable parameters are optimised.
        options: keyword arguments of `MuonAdamW`.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        embeddings.add(id(head.weight))
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim == 2 and id(p) not in embeddings]
    chosen = {id(p) for p in matrices}
    return MuonAdamW(matrices, [p for p in trainable if id(p) not in chosen], **options)
