"""Looks at a training while it goes on: what is known after a step, and who is told.

A watcher reads and never changes. It draws from generators of its own, so that a training gives the
same weights with watchers and without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from retrodiff.model import Model


@dataclass(frozen=True)
class Moment:
    """What is known after a step.

    Args:
        done: steps done.
        steps: steps in all.
        loss: of this step.
        lr: learning rate of this step.
        images: images seen so far, over all sittings: steps done times images per step.
        seconds: of training in this sitting.
        averaged: makes a copy of the model with the averaged weights, in evaluation mode.
    """

    done: int
    steps: int
    loss: float
    lr: float
    images: int
    seconds: float
    averaged: Callable[[], Model]

    @property
    def last(self) -> bool:
        """Whether the training ends with this step."""
        return self.done == self.steps


class Watcher(Protocol):
    """Told of a training's start and of every step; `retrodiff.training.fit` takes some of them.

    Its state goes into checkpoints, so that curves go on after an interruption.
    """

    def begin(self, done: int) -> None:
        """Called once, before the first step of a sitting.

        Args:
            done: steps done already: 0, or more after a resume; `load` was called before.
        """
        ...

    def look(self, moment: Moment) -> None:
        """Called after every step; the watcher decides whether to act."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What checkpoints keep of it: tensors by name."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` returned; nothing, where an earlier sitting had no such watcher."""
        ...
