"""What may look at a training while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from retrodiff.model import Model


@dataclass(frozen=True)
class Moment:
    """What is known after a step."""

    done: int
    steps: int
    loss: float
    lr: float
    images: int
    seconds: float
    averaged: Callable[[], Model]


class Watcher(Protocol):
    """Looks at a training and changes nothing."""

    def begin(self, done: int) -> None:
        """Before the first step of this sitting."""
        ...

    def look(self, moment: Moment) -> None:
        """After each step."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What belongs into a checkpoint."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` returned."""
        ...
