"""In which order images are seen: epochs of a shuffle, each step a function of its number."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from retrodiff.training.seeds import derived


def epoch_rows(count: int, step: int, batch_size: int, seed: int) -> Tensor:
    """The row numbers (b,) of a training step, whatever steps came before it.

    Args:
        count: of the images; each is seen once before one is seen again.
        step: from 0 on.
        batch_size: b.
        seed: of the shuffles.
    """
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // count
    rows = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        rows[here] = _shuffled(count, seed, epoch)[positions[here] % count]
    return rows


@lru_cache(2)  # a step looks at one epoch, or at two: nothing is shuffled twice
def _shuffled(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=derived(seed, "epoch", epoch))
