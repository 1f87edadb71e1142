"""The adversarial part of a first stage's loss (Esser et al. 2021, arXiv 2012.09841, eq. 6-7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from retrodiff.numbers import real, whole

LARGEST_WEIGHT = 1e4
"""Of the adaptive weight."""

DELTA = 1e-4
"""Added to a gradient's norm before it divides."""


@dataclass(frozen=True)
class Adversarial:
    """A discriminator and when it counts.

    Args:
        discriminator: images (b, c, h, w) -> numbers, above zero for real ones.
        start: step from which it is trained and counts; before, images are only blurred ones.
        weight: of the adaptive weight; Rombach et al. 2022 took 0.5 for KL, 0.75 to 1 for VQ.

    Examples:
        >>> from retrodiff.networks import PatchDiscriminator
        >>> from retrodiff.training import Adversarial
        >>> against = Adversarial(
        ...     PatchDiscriminator(channels=32, levels=1), start=2000, weight=0.5
        ... )
        >>> against.start
        2000
    """

    discriminator: nn.Module
    start: int
    weight: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", whole("start", self.start, 0))
        object.__setattr__(self, "weight", real("weight", self.weight, 0))


def generator_loss(discriminator: nn.Module, images: Tensor) -> Tensor:
    """What an autoencoder pays for images that are told from real ones.

    The gradient reaches the images and leaves the discriminator's weights alone.
    """
    frozen = {name: p.detach() for name, p in discriminator.named_parameters()}
    return -functional_call(discriminator, frozen, (images,)).mean()


def discriminator_loss(discriminator: nn.Module, real: Tensor, made: Tensor) -> Tensor:
    """Hinge loss: real images above 1, reconstructions below -1.

    Args:
        discriminator: what is trained by it.
        real: images (b, c, h, w).
        made: their reconstructions; no gradient reaches them.
    """
    on_real, on_made = discriminator(real.detach()), discriminator(made.detach())
    return (F.relu(1 - on_real).mean() + F.relu(1 + on_made).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """How the adversarial loss is scaled: to the gradient that the reconstruction has.

    The ratio of both losses' gradient norms at the weight of the decoder's last layer.

    Args:
        reconstruction: a loss.
        adversarial: another.
        last: weight that both depend on.

    Returns:
        A scalar without gradient, 0 to 10,000.
    """
    (one,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (other,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    ratio = one.float().norm() / (other.float().norm() + DELTA)
    return ratio.clamp(0, LARGEST_WEIGHT).detach()
