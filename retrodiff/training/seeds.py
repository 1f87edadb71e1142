"""Derives independent randomness from a seed: one generator for each use and number."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def derived(seed: int, use: str, number: int) -> torch.Generator:
    """The generator of one step or epoch; hashed, so that neighboring seeds share nothing.

    Adding seed and number would make epoch 1 of seed 0 and epoch 0 of seed 1 the same. Numpy's
    ``SeedSequence`` mixes all bits into the 32 that torch's CPU generator keeps of a seed.

    Args:
        seed: of the whole, 0 or more.
        use: what is drawn, such as ``"epoch"``; each use has randomness of its own.
        number: of the step or epoch, 0 or more.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(use.encode()), number))
    return torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
