"""What a sampling run has come to after a step: for those who watch images form."""

# pyright: strict

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from retrodiff.interfaces import Generator


@dataclass(frozen=True, eq=False)
class Estimate:
    """The images of a batch as a generator estimates them after a step.

    Args:
        rows: numbers of the images, in the request.
        step: steps made, from 1.
        steps: to be made in all.
        latents: (b, c, h, w), the clean estimate of these images.
        generator: makes images of latents.

    Examples:
        >>> def tell(estimate):
        ...     print(f"{estimate.step} of {estimate.steps}: {len(estimate.rows)} images")
        >>> model.sample(prompts=["a bell"], on_step=tell)  # doctest: +SKIP
        1 of 16: 1 images
        ...
    """

    rows: list[int]
    step: int
    steps: int
    latents: Tensor
    generator: Generator

    def images(self) -> Tensor:
        """The estimate decoded: (b, c, h, w) in [-1, 1] on the CPU; it costs a decoding."""
        return self.generator.decode(self.latents).float().cpu()


OnStep = Callable[[Estimate], object]
"""Told after each step; what it raises ends the sampling."""
