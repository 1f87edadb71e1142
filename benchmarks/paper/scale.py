"""How large the studies are: numbers of pictures, steps and samples. Three sizes by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Numbers that all studies share.

    Args:
        name: of the size; folders and csv files carry it.
        database: pictures of D, at most.
        trained: pictures of X.
        held_out: pictures that no training sees; half of them are the reference, half the null.
        steps: of a training.
        batch: pictures per step.
        channels: of a network of full width; half and quarter follow.
        codebook_steps: of the VQ-GAN whose latents are one of the encoders.
        samples: per point.
        sampler_steps: of every sample.
        phi: encoder of the conditions, ``lite0`` or ``pixels``.
        judge: features that quality is measured in, ``lite2`` or ``pixels``.
        groups: parts that samples are divided into to estimate the error of a score.
        compiled: whether networks go through ``torch.compile`` before they sample.
    """

    name: str
    database: int
    trained: int
    held_out: int
    steps: int
    batch: int
    channels: int
    codebook_steps: int
    samples: int
    sampler_steps: int
    phi: str = "lite0"
    judge: str = "lite2"
    groups: int = 4
    compiled: bool = True


SCALES = {
    scale.name: scale
    for scale in (
        Scale("small", 20_000, 20_000, 10_000, 1200, 64, 96, 2000, 2000, 16),
        Scale("full", 20_000, 20_000, 10_000, 60_000, 256, 192, 20_000, 5000, 32),
        Scale("toy", 96, 64, 240, 4, 8, 64, 4, 64, 2, "pixels", "pixels", 2, False),
    )
}
"""``small`` takes hours on two cores, ``full`` hours on a GPU; ``toy`` takes seconds, for tests."""
