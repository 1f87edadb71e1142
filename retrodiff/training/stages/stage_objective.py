"""The loss of a first stage as one module, so that DDP and FSDP can wrap what is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from retrodiff.networks import KLAutoencoder, VQAutoencoder
from retrodiff.training.stages.adversarial import (
    Adversarial,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from retrodiff.training.stages.codebook import CodeUse, restart_dead

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Two batches of images (b, c, h, w) in [-1, 1] -> distances, of any shape; their mean counts."""

LOG_VARIANCE = (-30.0, 20.0)
"""Where the posterior's log-variance is clamped, as in Rombach et al. 2022."""


@dataclass(frozen=True)
class Weights:
    """How the parts of the loss count beside the mean absolute error of the pixels.

    Args:
        kl: KL divergence of the posterior to the standard normal, in nats per number of an image.
        codebook: squared distance of codes to latents and, times ``commitment``, the reverse.
        commitment: how much latents move towards their codes.
        noise: standard deviation of noise on the latents, as a share of their own.
        perceptual: perceptual distance.
        restart_after: steps without use after which a code is moved to a latent; 0: never.
        decoder_only: nothing regularizes the latents, and no gradient reaches them.
    """

    kl: float
    codebook: float
    commitment: float
    noise: float
    perceptual: float
    restart_after: int
    decoder_only: bool = False


class StageObjective(nn.Module):
    """Reconstruction, regularization and discriminator of a KL or VQ autoencoder in one loss.

    Args:
        autoencoder: what is trained.
        weights: of the parts.
        perceptual: a distance of images beside that of pixels.
        adversarial: a discriminator; its parameters are trained with the autoencoder's.
    """

    age: Tensor
    """(codes,) steps since each was used. A buffer: checkpoints keep it, and notice its changes."""
    perceptual: Perceptual | None
    adversarial: Adversarial | None

    def __init__(
        self,
        autoencoder: KLAutoencoder | VQAutoencoder,
        weights: Weights,
        perceptual: Perceptual | None = None,
        adversarial: Adversarial | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder, self.weights = autoencoder, weights
        self.discriminator = None if adversarial is None else adversarial.discriminator
        # Frozen, and no part of what is trained or kept: therefore not registered as a module.
        self.__dict__["perceptual"] = perceptual
        self.__dict__["adversarial"] = adversarial
        if isinstance(autoencoder, VQAutoencoder):
            codes = len(autoencoder.codebook.weight)
            self.register_buffer("age", torch.zeros(codes, dtype=torch.int64))

    def trained(self) -> list[nn.Module]:
        """The parts whose weights change."""
        whole = self.autoencoder
        parts: list[nn.Module] = [whole]
        if self.weights.decoder_only:
            parts = [whole.from_latent, whole.decoder]
        return parts if self.discriminator is None else [*parts, self.discriminator]

    def forward(
        self, images: Tensor, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Images (b, c, h, w) in [-1, 1] -> loss and its parts."""
        if self.weights.decoder_only:
            made, regularization, parts = self._decoded(images, generator)
        elif isinstance(self.autoencoder, VQAutoencoder):
            made, regularization, parts = self._quantized(self.autoencoder, images, generator)
        else:
            made, regularization, parts = self._gaussian(self.autoencoder, images, generator)
        reconstruction = (made - images).abs().mean()
        parts["l1"] = reconstruction.detach()
        if self.perceptual is not None and self.weights.perceptual:
            distance = self.perceptual(made, images).float().mean()
            parts["perceptual"] = distance.detach()
            reconstruction = reconstruction + self.weights.perceptual * distance
        loss = reconstruction + regularization
        if self.adversarial is not None and step >= self.adversarial.start:
            added, more = self._adversarial(self.adversarial, images, made, reconstruction)
            loss, parts = loss + added, {**parts, **more}
        return loss, parts

    def _decoded(
        self, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        whole, none = self.autoencoder, images.new_zeros(())
        with torch.no_grad():
            latents = whole.encode(images)
            if not isinstance(whole, VQAutoencoder):
                latents = self._noisy(latents, generator)
            else:
                codes = whole.codebook(whole.nearest(latents))
                latents = self._noisy(rearrange(codes, "b h w c -> b c h w").float(), generator)
        decode = whole.decode_vectors if isinstance(whole, VQAutoencoder) else whole.decode
        return decode(latents), none, {}

    def _gaussian(
        self, autoencoder: KLAutoencoder, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        mean, log_variance = autoencoder.moments(images)
        if not self.weights.kl:
            latents = self._noisy(mean, generator)
            return autoencoder.decode(latents * autoencoder.scale_factor), mean.new_zeros(()), {}
        log_variance = log_variance.clamp(*LOG_VARIANCE)
        latents = mean + (log_variance / 2).exp() * _noise(mean, generator)
        # Of one image, in nats, divided by as many numbers as the pixels' error is: the weights of
        # the literature, which sums both, stay what they are.
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2 / images.numel()
        made = autoencoder.decode(self._noisy(latents, generator) * autoencoder.scale_factor)
        return made, self.weights.kl * kl, {"kl": kl.detach()}

    def _quantized(
        self, autoencoder: VQAutoencoder, images: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        scaled = autoencoder.encode(images)
        latents = scaled / autoencoder.scale_factor
        rows = rearrange(latents.detach(), "b c h w -> (b h w) c")
        moved = 0
        if self.weights.restart_after and self.training:
            book, patience = autoencoder.codebook.weight, self.weights.restart_after
            moved = restart_dead(book, self.age, rows, patience, generator)
        codes = autoencoder.nearest(scaled.detach())
        counts = torch.bincount(codes.flatten(), minlength=len(self.age))
        if self.training:
            self.age.add_(1).masked_fill_(counts > 0, 0)
        vectors = rearrange(autoencoder.codebook(codes), "b h w c -> b c h w").float()
        towards = F.mse_loss(vectors, latents.detach())
        commitment = F.mse_loss(latents, vectors.detach())
        distance = towards + self.weights.commitment * commitment
        straight = latents + (vectors - latents).detach()
        made = autoencoder.decode_vectors(self._noisy(straight, generator))
        use = CodeUse.of(counts.cpu())
        parts = {"codebook": distance.detach(), "perplexity": use.perplexity, "restarted": moved}
        return made, self.weights.codebook * distance, parts

    def _adversarial(
        self, adversarial: Adversarial, images: Tensor, made: Tensor, reconstruction: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        fooling = generator_loss(adversarial.discriminator, made)
        last = self.autoencoder.decoder.conv_out.weight
        weight = adaptive_weight(reconstruction, fooling, last) * adversarial.weight
        telling = discriminator_loss(adversarial.discriminator, images, made)
        parts = {
            "fooling": fooling.detach(),
            "telling": telling.detach(),
            "adversarial_weight": weight,
        }
        return weight * fooling + telling, parts

    def _noisy(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        if not self.weights.noise:
            return latents
        size = self.weights.noise * latents.detach().std()
        return latents + size * _noise(latents, generator)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)
