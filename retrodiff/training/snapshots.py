"""Keeps the averaged weights of earlier steps of a training."""

from __future__ import annotations

from torch import Tensor

from retrodiff.training.ema import NamedEMA


class Snapshots:
    """Averaged weights of earlier steps, kept through interruptions.

    Args:
        average: what is kept of.
        steps: when.
    """

    def __init__(self, average: NamedEMA, steps: set[int]) -> None:
        self.average, self.steps = average, steps
        self.taken: dict[int, dict[str, Tensor]] = {}

    def take(self, done: int) -> None:
        """Keeps the average, if this is one of the steps."""
        if done in self.steps:
            state = self.average.state()
            self.taken[done] = {name: tensor.clone() for name, tensor in state.items()}

    def state(self) -> dict[str, Tensor]:
        """All that was kept, by step and name."""
        return {
            f"{step}.{name}": tensor
            for step, state in self.taken.items()
            for name, tensor in state.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` returned."""
        for name, tensor in state.items():
            step, _, rest = name.partition(".")
            self.taken.setdefault(int(step), {})[rest] = tensor
