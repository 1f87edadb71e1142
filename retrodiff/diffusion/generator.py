"""Generates images from contexts by diffusion, with denoiser, guidance, sampler and decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrodiff.components import evaluating, where
from retrodiff.interfaces import (
    Autoencoder,
    Callback,
    Context,
    Denoiser,
    Generator,
    Guidance,
    Sampler,
    Schedule,
    member,
)
from retrodiff.numbers import real
from retrodiff.precision import full_precision
from retrodiff.randomness import normal

WIDEST = 16
"""Pixels beyond this are no normalized data of any kind."""


@dataclass(frozen=True, eq=False)
class Start:
    """Latents to start from in place of noise alone: edited images (SDEdit, Meng et al. 2022).

    The schedule's levels are those of a run from noise, of which the last ceil(strength * steps)
    steps are made: noise of the level before them is added to the latents first.

    Args:
        latents: (b, c, h, w), clean.
        strength: 0 gives the latents back, 1 forgets them.

    Examples:
        >>> import torch
        >>> from retrodiff.diffusion import Start
        >>> Start(torch.zeros(2, 4, 8, 8), strength=0.6).left(10)
        6
    """

    latents: Tensor
    strength: float

    def __post_init__(self) -> None:
        real("strength", self.strength, 0, 1)

    def left(self, steps: int) -> int:
        """How many of the steps are made."""
        return math.ceil(round(self.strength * steps, 9))

    def rows(self, rows: list[int]) -> Start:
        """Those of some images."""
        return replace(self, latents=self.latents[rows])


@dataclass(frozen=True, kw_only=True)
class DiffusionGenerator(Generator):
    """Runs a sampler on a guided denoiser.

    Networks compute in the type of their weights, everything between them in float64 where it can,
    float32 elsewhere: rounding then hardly depends on the batch size. Images are float32.

    Args:
        denoiser: ``(x, sigma, context) -> denoised``.
        guidance: how its branches combine.
        sampler: how noise becomes data.
        schedule: at which noise levels.
        autoencoder: from latents to images.

    Examples:
        >>> import torch
        >>> from retrodiff import Context, presets
        >>> generator = presets.ldm().diffusion()
        >>> empty, noise = Context({}), torch.randn(2, *generator.shape)
        >>> generator.decode(generator.generate(empty, empty, noise, steps=2)).shape
        torch.Size([2, 1, 8, 8])
    """

    denoiser: Denoiser
    guidance: Guidance
    sampler: Sampler
    schedule: Schedule
    autoencoder: Autoencoder

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the denoiser's latents."""
        return self.denoiser.shape

    @property
    def widths(self) -> dict[str, int]:
        """The streams that the denoiser takes."""
        return self.denoiser.widths

    @property
    def vector_width(self) -> int | None:
        """Of the vector that the denoiser takes."""
        return member(self.denoiser, Denoiser, "vector_width")

    @property
    def untrained(self) -> bool:
        """Whether the denoiser's weights are fresh ones, meant to be replaced."""
        return member(self.denoiser, Denoiser, "untrained")

    @property
    def device(self) -> torch.device:
        """Where the denoiser's weights are."""
        return member(self.denoiser, Denoiser, "device")

    @torch.no_grad()
    def generate(
        self,
        context: Context,
        null: Context,
        noise: Tensor,
        *,
        steps: int,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        start: Start | None = None,
        others: Mapping[str, Context] | None = None,
    ) -> Tensor:
        """Unit noise (b, c, h, w) -> latents (b, c, h, w); see `Generator.generate`.

        Args:
            context: as there.
            null: as there.
            noise: as there.
            steps: as there.
            generator: as there.
            callback: as there.
            start: latents that are edited; None: the images begin as noise.
            others: further conditions for the guidance, by name.
        """
        if start is not None and start.strength == 0:
            return start.latents.to(noise)
        with evaluating(self.denoiser):
            sigmas = self.schedule.sigmas(steps)
            branches = {**(others or {}), "cond": context, "null": null}
            denoise = self.guidance.guide(self.denoiser, branches)
            kind = noise.dtype
            if member(self.denoiser, Denoiser, "takes_float64") and noise.device.type != "mps":
                noise = noise.double()
            if start is None or start.strength == 1:
                x = self.schedule.start(noise, sigmas)
            else:
                sigmas = sigmas[steps - start.left(steps) :]
                x = start.latents.to(noise) + sigmas[0].to(noise) * noise
            x = self.sampler.sample(denoise, x, sigmas, generator, callback)
            return self.schedule.finish(x, sigmas).to(kind)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images (b, c, h, w), float32, clamped to [-1, 1]."""
        at = where(self.autoencoder)
        if at is not None:
            latents = latents.to(*at)
        with evaluating(self.autoencoder):
            return self.autoencoder.decode(latents).float().clamp(-1, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> latents on the denoiser's device, float32 at least.

        Raises:
            ValueError: the latents have another shape than the denoiser's, or the images are
                plainly not in [-1, 1].
        """
        if images.device.type == "cpu" and images.numel() and float(images.abs().max()) > WIDEST:
            raise ValueError(
                f"images hold values up to {float(images.abs().max()):g}, expected -1 to 1: divide "
                "0 to 255 by 127.5 and subtract 1"
            )
        device, kind = where(self.autoencoder) or (self.device, None)
        with torch.no_grad(), full_precision():
            x0 = self.autoencoder.encode(images.to(device, kind)).to(self.device)
        if tuple(x0.shape[1:]) != tuple(self.shape):
            raise ValueError(
                f"images {tuple(images.shape[1:])} have latents {tuple(x0.shape[1:])}, which do "
                f"not match the denoiser's shape={tuple(self.shape)}: resize the images or "
                "build the network for them"
            )
        return x0.to(torch.promote_types(x0.dtype, torch.float32))

    def loss(
        self,
        images: Tensor,
        context: Context,
        generator: torch.Generator | None = None,
        *,
        sigma: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The denoiser's training objective for each image (b,).

        Args:
            images: (b, c, h, w) in [-1, 1].
            context: of b rows.
            generator: of noise levels and noise, in that order.
            sigma: (b,) noise levels; None: drawn from the training distribution.
            noise: standard normal, of the latents' shape; None: drawn.

        Raises:
            ValueError: the denoiser has no loss, or the images make no latents that it takes.
        """
        denoiser = self.denoiser
        if not (hasattr(denoiser, "loss") and hasattr(denoiser, "draw_sigmas")):
            raise ValueError(
                f"{type(denoiser).__name__} has no loss and no draw_sigmas, so it cannot be "
                "trained: use one of retrodiff.diffusion's denoisers, or add the two methods"
            )
        x0 = self.encode(images)
        if sigma is None:
            sigma = denoiser.draw_sigmas(len(x0), generator)  # type: ignore[attr-defined]
        if noise is None:
            noise = normal(generator, x0.shape, x0.dtype)
        return denoiser.loss(  # type: ignore[attr-defined]
            x0, torch.as_tensor(sigma).to(x0.device), noise.to(x0), context.to(x0.device)
        )
