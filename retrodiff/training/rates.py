"""Learning rates by step: a function of the step's number, made by `constant` or `cosine`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from retrodiff.numbers import is_real, real, whole

LearningRate = Callable[[int], float]
"""Step number -> learning rate."""

LARGEST = 1e6
"""Larger ones are mistakes, and overflow inside the optimizer."""


@dataclass(frozen=True)
class Constant:
    """Linear warm-up, then always the same; made by `constant`."""

    lr: float
    warmup: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, step: int) -> float:
        """The rate of a step."""
        return self.lr * _warm(step, self.warmup)


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine; made by `cosine`."""

    lr: float
    steps: int
    warmup: int = 0

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        _check(self)

    def __call__(self, step: int) -> float:
        """The rate of a step; zero from the last step on."""
        done = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * _warm(step, self.warmup) * (1 + math.cos(math.pi * min(done, 1))) / 2


def constant(lr: float, warmup: int = 0) -> Constant:
    """Linear warm-up, then the same learning rate (the paper: 1e-4 after 100 steps).

    Args:
        lr: learning rate after the warm-up.
        warmup: steps.
    """
    return Constant(lr, warmup)


def cosine(lr: float, steps: int, warmup: int = 0) -> Cosine:
    """Linear warm-up, then half a cosine down to zero (Loshchilov & Hutter 2017).

    Args:
        lr: highest learning rate.
        steps: at which it is zero, usually all steps of the training.
        warmup: steps.
    """
    return Cosine(lr, steps, warmup)


def learning_rate(lr: LearningRate | float) -> LearningRate:
    """A number as a constant learning rate; a function as it is."""
    if is_real(lr):
        return Constant(real("lr", lr, 0, LARGEST))
    if not callable(lr):
        raise ValueError(f"lr={lr!r}: give a number, constant(...), cosine(...) or a function")
    return lr


def described(lr: LearningRate) -> dict[str, Any] | None:
    """Kind and numbers of a learning rate; None for a function of the user's own."""
    if not isinstance(lr, (Constant, Cosine)):
        return None
    return {"kind": type(lr).__name__.lower(), **dataclasses.asdict(lr)}


def rate_disagreement(
    lr: LearningRate, kept: Tensor, description: dict[str, Any] | None, same_length: bool
) -> str | None:
    """How a learning rate differs from that of the steps done so far, in words; None: it does not.

    Args:
        lr: the present one.
        kept: the rates (done,) of the steps that were done.
        description: what `described` said about the earlier one.
        same_length: the training has as many steps as before. If not, the length of a cosine and
            of a warm-up may change with it.
    """
    now = described(lr)
    if now is not None and description is not None:
        free = () if same_length else ("steps", "warmup")
        old, new = ({k: v for k, v in d.items() if k not in free} for d in (description, now))
        name = next((k for k in {**old, **new} if old.get(k) != new.get(k)), None)
        if name is None:
            return None
        if name in ("kind", "lr"):
            return f"lr={_shown(description)}, but this one has lr={_shown(now)}"
        return f"{name}={old.get(name)} of the learning rate, but this one has {name}={new[name]}"
    for step, before in enumerate(kept.tolist()):
        if not math.isclose(before, lr(step), rel_tol=1e-9):
            return f"lr={before:g} at step {step}, but this one has lr={lr(step):g} there"
    return None


def _shown(description: dict[str, Any]) -> str:
    kind, lr = description["kind"], description["lr"]
    return f"{lr:g} ({kind})"


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / max(1, warmup))


def _check(rate: Constant | Cosine) -> None:
    object.__setattr__(rate, "lr", real("lr", rate.lr, 0, LARGEST))
    object.__setattr__(rate, "warmup", whole("warmup", rate.warmup, 0))
