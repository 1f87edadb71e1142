"""What a loss is made of, step by step: kept in checkpoints, drawn as curves afterwards."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class LossParts:
    """Numbers of every step by name; grows during a training.

    Args:
        steps: of the training.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.curves: dict[str, Tensor] = {}
        """By name (steps,); NaN where a step has no such number."""

    def record(self, step: int, **numbers: Tensor | float) -> None:
        """Takes the numbers of a step."""
        for name, number in numbers.items():
            if name not in self.curves:
                self.curves[name] = torch.full((self.steps,), math.nan)
            self.curves[name][step] = float(number)

    def last(self, name: str, count: int = 50) -> float:
        """Mean of the last numbers of that name; NaN where there are none."""
        known = self.curves.get(name, torch.empty(0))
        known = known[known.isfinite()][-count:]
        return float(known.mean()) if len(known) else math.nan

    def state(self) -> dict[str, Tensor]:
        """Curves by name."""
        return dict(self.curves)

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` returned; a longer training has room for more."""
        for name, curve in state.items():
            self.curves[name] = torch.full((self.steps,), math.nan)
            kept = curve[: self.steps]
            self.curves[name][: len(kept)] = kept
