"""Measures how fast a training is, so that a time can be given in place of a number of steps."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from retrodiff.model import Model
from retrodiff.numbers import real, whole
from retrodiff.training.data import TrainingSet
from retrodiff.training.fit import fit
from retrodiff.training.watching import Moment

TRIED = 10
"""Steps that are measured, after the first ones."""
FIRST = 3


@dataclass(frozen=True)
class Pace:
    """What a step takes, and what a look at the model takes, in seconds.

    Args:
        step: of training.
        look: a held-out measurement and a sample grid; 0 where there are none.

    Examples:
        >>> from retrodiff.training import Pace
        >>> steps, looks = Pace(step=0.2, look=3.0).steps(minutes=10)
        >>> steps, looks
        (2850, 10)
    """

    step: float
    look: float = 0.0

    def steps(self, minutes: float, most: int = 10, share: float = 0.1) -> tuple[int, int]:
        """Steps that fit into a time, at least one, and how often there is time to look.

        Args:
            minutes: of training.
            most: looks, at most.
            share: of the time that looks may take; two are there in any case.
        """
        seconds = 60 * real("minutes", minutes, above=0)
        looks = most if not self.look else int(share * seconds / self.look)
        looks = min(max(looks, 2), whole("most", most, 2))
        return max(1, int((seconds - looks * self.look) / self.step)), looks


def measure_pace(
    model: Model,
    data: TrainingSet,
    *,
    looks: Sequence[Callable[[Model], Any]] = (),
    **options: Any,
) -> Pace:
    """Trains a copy of the model for some steps, and throws it away.

    Args:
        model: stays as it is.
        data: what it will be trained on.
        looks: what is done now and then with the model, such as ``held_out.measure``.
        options: of `fit`, but for steps, checkpoint and what belongs to it.
    """
    watch = _Stopwatch()
    fit(model, data, steps=FIRST + TRIED, watch=[watch], progress=False, **options)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fresh weights give noise: nobody sees it
        for look in looks:
            look(model)
    return Pace(statistics.median(watch.steps[FIRST:]), time.perf_counter() - start)


class _Stopwatch:
    """The duration of every step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._last = 0.0

    def begin(self, done: int) -> None:
        self._last = time.perf_counter()

    def look(self, moment: Moment) -> None:
        now = time.perf_counter()
        self.steps.append(now - self._last)
        self._last = now

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        pass
