"""Looks at a training while it goes on: what is known after a step, and who is told.

A watcher reads and never changes. It draws from generators of its own, so that a training gives the
same weights with watchers and without.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
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

    Examples:
        >>> from retrodiff import presets
        >>> from retrodiff.training import Moment
        >>> moment = Moment(400, 400, 0.42, 1e-4, 12_800, 60.0, averaged=presets.ldm)
        >>> moment.last
        True
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

    Examples:
        >>> import torch
        >>> from retrodiff import presets
        >>> from retrodiff.training import TrainingSet, Watcher, fit
        >>> class Losses(Watcher):
        ...     def begin(self, done):
        ...         self.seen = []
        ...     def look(self, moment):
        ...         self.seen.append(moment.loss)
        ...     def state(self):
        ...         return {}
        ...     def load(self, state):
        ...         pass
        >>> watcher, data = Losses(), TrainingSet.alone(torch.rand(16, 1, 8, 8) * 2 - 1)
        >>> options = {"steps": 3, "batch_size": 8, "lr": 1e-3, "progress": False}
        >>> result = fit(presets.ldm(), data, watch=[watcher], **options)
        >>> len(watcher.seen)
        3
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


def is_due(done: int, steps: int, every: int) -> bool:
    """Whether something that happens every ``every`` steps, and after the last, happens now.

    Args:
        done: steps done.
        steps: steps in all.
        every: steps between two times; 0: never.
    """
    return every > 0 and (done % every == 0 or done == steps)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """A block whose random numbers and gradients leave no trace outside.

    Args:
        device: of the network, whose randomness is kept beside the CPU's.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        yield


@contextmanager
def forgiving(what: str) -> Iterator[None]:
    """A block whose failure to write is a warning: a training goes on without its pictures.

    Args:
        what: could not be written.
    """
    try:
        yield
    except OSError as error:
        warnings.warn(
            f"{what} could not be written ({error.strerror or error}); the training goes on",
            stacklevel=4,
        )
