"""Shares out the batches of a training among its processes and backward passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor

from retrodiff.interfaces import Neighbors, Query
from retrodiff.training.data import TrainingSet
from retrodiff.training.optimize import Part
from retrodiff.training.processes import Processes

Batch = tuple[Tensor, Query, Neighbors]
"""Images, queries and neighbors of as many rows."""


class Batches:
    """The images of each step, read in order; every part takes its rows of them.

    Args:
        data: what is read.
        k: neighbors of an image.
        steps: steps in all.
        batch_size: images per step, of all processes together.
        seed: of the training.
        workers: processes that read ahead.
        processes: those that train together.
    """

    def __init__(
        self,
        data: TrainingSet,
        k: int,
        steps: int,
        batch_size: int,
        seed: int,
        workers: int,
        processes: Processes,
    ) -> None:
        self.processes = processes
        share = (processes.index, processes.count)
        self._from = lambda done: data.batches(
            done, steps, batch_size=batch_size, seed=seed, part=share, k=k, workers=workers
        )
        self._iterator: Iterator[Batch] = iter(())
        self.step, self._batch = -1, cast("Batch", None)

    def begin(self, done: int) -> None:
        """Starts reading at the step after those that are done."""
        self._iterator = self._from(done)

    def part(self, part: Part) -> Batch:
        """Images, queries and neighbors of one part; steps must come in order."""
        if part.step != self.step:
            self.step, self._batch = part.step, next(self._iterator)
        images, query, neighbors = self._batch
        count = part.count // self.processes.count
        if count == 1:
            return self._batch
        each, index = len(images) // count, part.index % count
        rows = slice(index * each, (index + 1) * each)
        return images[rows], query.rows(rows), neighbors.rows(rows)

    def close(self) -> None:
        """Ends the processes that read ahead."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()
