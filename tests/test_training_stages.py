"""First stages: what their training minimizes, how it is continued, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrodiff.networks import KLAutoencoder, VQAutoencoder
from retrodiff.networks.patch_discriminator import PatchDiscriminator
from retrodiff.training.stages.adversarial import Adversarial
from retrodiff.training.stages.first_stage import StageResult, fit_autoencoder

SMALL: dict[str, Any] = {"channels": 32, "multipliers": (1, 1), "blocks_per_level": 1}


def blobs(count: int = 24, side: int = 16, seed: int = 0) -> Tensor:
    """Colored disks on a colored ground (n, 3, side, side), in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.rand(count, 2, generator=generator) * side
    radius = (0.15 + 0.2 * torch.rand(count, 1, 1, generator=generator)) * side
    colors = torch.rand(2, count, 3, 1, 1, generator=generator) * 2 - 1
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    distance = ((y - at[:, 0, None, None]) ** 2 + (x - at[:, 1, None, None]) ** 2).sqrt()
    inside = (distance < radius).float()[:, None]
    return inside * colors[0] + (1 - inside) * colors[1]


IMAGES = blobs()


def kl(**more: Any) -> KLAutoencoder:
    torch.manual_seed(0)
    return KLAutoencoder(**SMALL, latent_channels=2, **more)


def vq(codes: int = 32, **more: Any) -> VQAutoencoder:
    torch.manual_seed(0)
    return VQAutoencoder(**SMALL, latent_channels=2, codes=codes, **more)


def critic(start: int = 2) -> Adversarial:
    torch.manual_seed(1)
    return Adversarial(PatchDiscriminator(channels=32, levels=1), start=start)


def trained(autoencoder: Any, steps: int = 6, **more: Any) -> StageResult:
    settings = {"batch_size": 4, "lr": 1e-3, "progress": False, "latent_noise": 0.05, **more}
    return fit_autoencoder(autoencoder, IMAGES, steps=steps, **settings)


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_at(step: int) -> Any:
    def after(done: int, *_: float) -> None:
        if done == step:
            raise Killed

    return after


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [kl, vq])
def test_a_killed_training_ends_with_the_same_bits(
    make: Any, precision: str, tmp_path: Path
) -> None:
    settings = {"precision": precision, "adversarial": critic(), "restart_after": 2}
    whole = trained(make(), **settings)
    keep = {"checkpoint": tmp_path / "state", "checkpoint_every": 1, "resume": True}
    for step in (1, 4):
        with pytest.raises(Killed):
            trained(make(), **settings, **keep, after=killed_at(step))
    again = trained(make(), **settings, **keep)
    assert torch.equal(whole.losses, again.losses)
    assert whole.parts.keys() == again.parts.keys()
    for name, curve in whole.parts.items():
        assert torch.equal(curve.nan_to_num(-1), again.parts[name].nan_to_num(-1)), name
    for name, weight in whole.autoencoder.state_dict().items():
        assert torch.equal(weight, again.autoencoder.state_dict()[name]), name
    assert whole.autoencoder.scale_factor == again.autoencoder.scale_factor
