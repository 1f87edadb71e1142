"""Several denoisers as one: the scores of models that were trained apart are added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrodiff.interfaces import Context, Denoiser, Schedule, member
from retrodiff.numbers import real


@dataclass(frozen=True, eq=False)
class Composed(Denoiser):
    """denoised = sum of weight * denoised of each model (Liu et al. 2022), one context for all.

    Args:
        denoisers: of the same latents, streams and vector; the first one's schedule is sampled.
        weights: of each; their sum is 1.

    Raises:
        ValueError: numbers of models and weights differ, the weights do not sum to 1, or the models
            take different latents or streams.

    Examples:
        >>> from retrodiff import presets
        >>> from retrodiff.diffusion import Composed
        >>> one, other = presets.ldm().denoiser, presets.ldm().denoiser
        >>> Composed((one, other), (0.5, 0.5)).shape
        (1, 8, 8)
    """

    denoisers: tuple[Denoiser, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.denoisers or len(self.denoisers) != len(self.weights):
            raise ValueError(
                f"{len(self.denoisers)} denoisers and {len(self.weights)} weights: give one for "
                "each, and at least one"
            )
        total = sum(real("weights", weight) for weight in self.weights)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the weights sum to {total:g}: make their sum 1")
        first = _takes(self.denoisers[0])
        for other in self.denoisers[1:]:
            if _takes(other) != first:
                raise ValueError(
                    f"a denoiser takes {_takes(other)}, but the first one {first}: compose models "
                    "of the same latents and streams"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of all of them."""
        return self.denoisers[0].shape

    @property
    def widths(self) -> dict[str, int]:
        """The streams that all of them take."""
        return self.denoisers[0].widths

    @property
    def vector_width(self) -> int | None:
        """Of the vector that all of them take."""
        return member(self.denoisers[0], Denoiser, "vector_width")

    @property
    def schedule(self) -> Schedule:
        """The first one's."""
        return self.denoisers[0].schedule

    @property
    def device(self) -> torch.device:
        """Where the first one is."""
        return member(self.denoisers[0], Denoiser, "device")

    @property
    def untrained(self) -> bool:  # type: ignore[override]
        """Whether one of them has fresh weights."""
        return any(member(one, Denoiser, "untrained") for one in self.denoisers)

    @property
    def takes_float64(self) -> bool:  # type: ignore[override]
        """Whether all of them do."""
        return all(member(one, Denoiser, "takes_float64") for one in self.denoisers)

    def prepare(self, context: Context) -> Any:
        """What each of them prepares."""
        return [one.prepare(context) for one in self.denoisers]

    def denoise(self, x: Tensor, sigma: Tensor, context: Any) -> Tensor:
        """The weighted sum; as many network calls as there are denoisers."""
        given = [context] * len(self.denoisers) if isinstance(context, Context) else context
        each = [
            weight * one.denoise(x, sigma, own)
            for one, weight, own in zip(self.denoisers, self.weights, given, strict=True)
        ]
        return torch.stack(each).sum(0)


def _takes(denoiser: Denoiser) -> str:
    """What a denoiser works on, in words."""
    vector = member(denoiser, Denoiser, "vector_width")
    return f"latents {tuple(denoiser.shape)}, streams {dict(denoiser.widths)}, vector {vector}"
