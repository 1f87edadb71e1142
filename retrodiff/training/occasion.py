"""Which images a training step uses, and the randomness of each of them.

Both are functions of seed and position, the number of an image in the sequence of all that a
training sees: they depend on no batch, no process and no worker, and on nothing that came before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from retrodiff.interfaces import Randomness
from retrodiff.numbers import whole
from retrodiff.training.seeds import derived


@dataclass(frozen=True)
class Occasion:
    """When some images are used, which decides what is drawn for each of them.

    Args:
        seed: of the training.
        positions: (b,) numbers of the images in the sequence of all that the training sees.

    Examples:
        >>> import torch
        >>> from retrodiff.randomness import uniform
        >>> from retrodiff.training import Occasion
        >>> occasion = Occasion(seed=0, positions=torch.tensor([3, 7]))
        >>> uniform(occasion.randomness("augment"), (2, 1)).shape
        torch.Size([2, 1])
    """

    seed: int
    positions: Tensor

    def randomness(self, use: str) -> Randomness:
        """Of each image, for one use, such as ``"augment"``."""
        return Randomness.of(self.seed, self.positions.tolist(), use)


@dataclass(frozen=True)
class Order:
    """Epochs of a shuffle, cut into steps, and each step into the parts of several processes.

    Args:
        count: images (or pairs) of an epoch.
        batch_size: images of a step, of all processes together.
        seed: of the shuffles.
        part: number of a process, and how many there are.

    Raises:
        ValueError: the processes cannot have equal parts.
    """

    count: int
    batch_size: int
    seed: int
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        index, parts = self.part
        whole("batch_size", self.batch_size)
        whole("seed", self.seed, 0)
        if whole("part", index, 0) >= whole("part", parts):
            raise ValueError(f"part={self.part}: give the number of a process, from 0, and all")
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size={self.batch_size} images cannot be shared equally by {parts} "
                f"processes: give a multiple of {parts}"
            )

    def rows(self, step: int) -> Tensor:
        """The rows (batch_size,) of a step, of all processes."""
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = positions // self.count
        rows = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            shuffled = _shuffled(self.count, self.seed, epoch)
            here = epochs == epoch
            rows[here] = shuffled[positions[here] % self.count]
        return rows

    def mine(self, rows: Tensor) -> Tensor:
        """Those of the rows of a step that are this process's."""
        index, parts = self.part
        share = self.batch_size // parts
        return rows[index * share : (index + 1) * share]

    def occasion(self, step: int) -> Occasion:
        """When the rows of this process are used."""
        first = step * self.batch_size
        return Occasion(self.seed, self.mine(torch.arange(first, first + self.batch_size)))


@lru_cache(2)  # a step looks at one epoch, or at two: nothing is shuffled twice
def _shuffled(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=derived(seed, "epoch", epoch))
