"""From a context to images by diffusion: the one place where sampler, guidance and decoder meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from retrodiff.interfaces import Autoencoder, Context, Denoiser, Guidance, Sampler, Schedule


@dataclass(frozen=True, kw_only=True)
class DiffusionGenerator:
    """Runs a sampler on a guided denoiser.

    Args:
        denoiser: ``(x, sigma, context) -> denoised``.
        guidance: how its branches combine.
        sampler: how noise becomes data.
        schedule: at which noise levels.
        autoencoder: from latents to images.
    """

    denoiser: Denoiser
    guidance: Guidance
    sampler: Sampler
    schedule: Schedule
    autoencoder: Autoencoder

    @torch.no_grad()
    def latents(
        self,
        context: Context,
        null: Context,
        noise: Tensor,
        steps: int,
        generator: torch.Generator | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Unit noise (b, c, h, w) -> latents (b, c, h, w).

        Args:
            context: the condition, b rows.
            null: the unconditional branch's condition, b rows.
            noise: standard normal.
            steps: of the sampler.
            generator: randomness of stochastic samplers.
            callback: told ``(step, denoised)`` after each step.
        """
        sigmas = self.schedule.sigmas(steps)
        denoise = self.guidance.guide(self.denoiser, {"cond": context, "null": null})
        x = self.schedule.start(noise, sigmas)
        x = self.sampler.sample(denoise, x, sigmas, generator, callback)
        return self.schedule.finish(x, sigmas)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images (b, c, h, w), clamped to [-1, 1]."""
        return self.autoencoder.decode(latents).clamp(-1, 1)
