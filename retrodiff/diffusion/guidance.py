"""Guidance: combines the conditional and the null branch of a denoiser.

Branches are joined along the batch and prepared once, so a step is one network call, and what the
branches have in common (x itself) is handed over once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from retrodiff.interfaces import Context, Denoise, Denoiser, Guidance
from retrodiff.numbers import real

SAME = 1e-5
"""Relative difference below which two noise levels are the same one in another precision."""


@dataclass(frozen=True)
class Unguided(Guidance):
    """The conditional branch alone."""

    def guide(self, denoiser: Denoiser, branches: Mapping[str, Context]) -> Denoise:
        """One network call per step at the batch's own size."""
        prepared = denoiser.prepare(branches["cond"])

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return denoiser.denoise(x, sigma, prepared)

        return denoise


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """denoised = null + scale (cond - null) (Ho & Salimans 2022).

    Args:
        scale: 1 is the conditional branch alone, 0 the null branch, above 1 extrapolates.
    """

    scale: float

    def __post_init__(self) -> None:
        real("scale", self.scale)

    def guide(self, denoiser: Denoiser, branches: Mapping[str, Context]) -> Denoise:
        """One network call per step on both branches at once."""
        if self.scale == 1:
            return Unguided().guide(denoiser, branches)
        prepared = denoiser.prepare(Context.cat([branches["cond"], branches["null"]]))

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            cond, null = denoiser.denoise(x, sigma, prepared).chunk(2)
            return null + self.scale * (cond - null)

        return denoise


@dataclass(frozen=True)
class Interval(Guidance):
    """Guidance at noise levels within [low, high] only (Kynkäänniemi et al. 2024).

    Args:
        guidance: what acts inside the interval; outside, the conditional branch alone.
        low: smallest sigma that is guided; a level of the schedule that equals it is guided, too.
        high: largest sigma that is guided, likewise; infinity for no limit.
    """

    guidance: Guidance
    low: float
    high: float

    def __post_init__(self) -> None:
        real("low", self.low, 0)
        real("high", self.high, self.low, infinite=True)

    def guide(self, denoiser: Denoiser, branches: Mapping[str, Context]) -> Denoise:
        """As many calls as the inner guidance makes."""
        inside = self.guidance.guide(denoiser, branches)
        outside = Unguided().guide(denoiser, branches)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            level = float(sigma[0])
            guided = self.low * (1 - SAME) <= level <= self.high * (1 + SAME)
            return (inside if guided else outside)(x, sigma)

        return denoise
