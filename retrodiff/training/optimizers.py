"""Optimizers by name: AdamW, or Muon for matrices with AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from retrodiff.precision import best_precision

Optimizers = Callable[[Mapping[str, nn.Parameter]], Sequence[torch.optim.Optimizer]]
"""Parameters by name -> the optimizers that share them out; each state entry is a tensor."""

OptimizerName = Literal["adamw", "muon"]

NARROWEST = 32
"""Matrices with a side below this (first and last layers, mostly) are left to AdamW."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz polynomial (Jordan et al. 2024)."""


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before each update (Jordan et al. 2024).

    Kernels of convolutions (out, in, h, w) are matrices (out, in * h * w). The update is scaled to
    the size that AdamW's usually has (0.2 * sqrt of the longer side, Liu et al. 2025), so learning
    rates of AdamW can be kept. Matrices of one shape are treated together.

    Args:
        parameters: of two or more dimensions.
        lr: learning rate.
        weight_decay: decoupled, as in AdamW.
        momentum: of Nesterov's momentum.
        iterations: of Newton-Schulz.
        dtype: of its products; None: bfloat16 where the processor multiplies it, else float32.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        iterations: int = 5,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        flat = [p for group in self.param_groups for p in group["params"] if p.ndim < 2]
        if flat:
            raise ValueError(
                f"Muon takes matrices, but one parameter has shape {tuple(flat[0].shape)}: leave "
                "it to AdamW"
            )
        self.iterations, self.dtype = iterations, dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every matrix that has a gradient."""
        del closure
        for group in self.param_groups:
            shapes: dict[tuple[Any, ...], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                gradient, mean = parameter.grad, state["momentum"]
                mean.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(mean, group["momentum"]).flatten(1)
                shapes[(*update.shape, update.device)].append((parameter, update))
            for (rows, columns, _), found in shapes.items():
                stacked = torch.stack([update for _, update in found])
                updates = orthogonal(stacked, self.iterations, self.dtype)
                lr = group["lr"]
                size = 0.2 * max(rows, columns) ** 0.5
                for (parameter, _), update in zip(found, updates, strict=True):
                    parameter.mul_(1 - lr * group["weight_decay"])
                    parameter.sub_(update.view(parameter.shape).to(parameter), alpha=lr * size)


def orthogonal(matrices: Tensor, iterations: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values come to lie in 0.7 to 1.2.

    Args:
        matrices: (n, rows, columns).
        iterations: of the Newton-Schulz polynomial of degree five.
        dtype: of the products; None: bfloat16 where the processor multiplies it, else float32.
    """
    if dtype is None:
        dtype = getattr(torch, best_precision(matrices.device))
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).float()
    x = (x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]).to(dtype)
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def get_optimizers(name: OptimizerName | Optimizers, weight_decay: float) -> Optimizers:
    """An optimizer by name.

    Args:
        name: ``"adamw"``; ``"muon"``: Muon for matrices and kernels with both sides of 32 or more,
            AdamW for the rest; or a function of one's own.
        weight_decay: of those by name.
    """

    def adamw(named: Mapping[str, nn.Parameter]) -> Sequence[torch.optim.Optimizer]:
        return [torch.optim.AdamW(named.values(), lr=0.0, weight_decay=weight_decay)]

    def muon(named: Mapping[str, nn.Parameter]) -> Sequence[torch.optim.Optimizer]:
        matrices = [
            p for p in named.values() if p.ndim > 1 and min(p.flatten(1).shape) >= NARROWEST
        ]
        chosen = {id(p) for p in matrices}
        rest = [p for p in named.values() if id(p) not in chosen]
        made: list[torch.optim.Optimizer] = []
        if matrices:
            made.append(Muon(matrices, lr=0.0, weight_decay=weight_decay))
        if rest:
            made.append(torch.optim.AdamW(rest, lr=0.0, weight_decay=weight_decay))
        return made

    if callable(name):
        return name
    known: dict[str, Optimizers] = {"adamw": adamw, "muon": muon}
    if name not in known:
        raise ValueError(f"optimizer={name!r} is unknown: give one of {', '.join(known)}")
    return known[name]
