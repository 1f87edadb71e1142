"""Distances of images in the feature maps of a frozen network, beside that of their pixels.

LPIPS (Zhang et al. 2018, arXiv 1801.03924) where its weights can be had; without them the same
distance, with equal weights, in the maps of any network that is at hand.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrodiff.encoders import TimmEncoder
from retrodiff.encoders.fingerprint import weights_hash
from retrodiff.encoders.preprocessing import Channels, Normalize
from retrodiff.interfaces import Encoder, member

EPS = 1e-10


class FeatureDistance:
    """Mean squared difference of feature maps whose channels are divided by their norm.

    The sum over the channels and the mean over positions and maps: LPIPS without learned weights
    of the channels.

    Args:
        maps: images (b, c, h, w) in [-1, 1] -> feature maps (b, c', h', w'), one or several;
            differentiable. A module is copied and frozen.
        name: what a resumed training compares; of a module, its weights are compared as well.

    Examples:
        >>> import torch
        >>> from retrodiff.training import FeatureDistance
        >>> distance = FeatureDistance(torch.nn.Conv2d(3, 8, 3))
        >>> distance(torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16)).shape
        torch.Size([2])
    """

    def __init__(
        self, maps: Callable[[Tensor], Tensor | Sequence[Tensor]], name: str = "features"
    ) -> None:
        self.name, self.maps = name, maps
        if isinstance(maps, nn.Module):
            self.maps = copy.deepcopy(maps).eval().requires_grad_(False)
            self.name = f"{name} {weights_hash(maps.state_dict())}"

    @classmethod
    def of(cls, encoder: TimmEncoder, layers: Sequence[int] | None = None) -> FeatureDistance:
        """The distance in the maps of an encoder's network.

        Images keep their size: of the encoder's preprocessing only mean and deviation are used.

        Args:
            encoder: a convolutional one takes images of any size.
            layers: numbers of the maps, from fine to coarse; None: all that the network gives.

        Raises:
            ValueError: the encoder's network gives no feature maps.
        """
        if not isinstance(encoder, TimmEncoder) or not hasattr(
            encoder.network, "forward_intermediates"
        ):
            raise ValueError(
                f"{type(encoder).__name__} gives no feature maps: take a TimmEncoder, or pass a "
                "function of your own to FeatureDistance(maps)"
            )
        name = member(encoder, Encoder, "identity").encoder
        return cls(_TimmMaps(encoder, layers), f"{name} {list(layers) if layers else 'all'}")

    def __call__(self, one: Tensor, other: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] and as many others -> distances (b,)."""
        mine = _several(self.maps(one))
        with torch.no_grad():
            theirs = _several(self.maps(other))
        total = one.new_zeros(len(one))
        for a, b in zip(mine, theirs, strict=True):
            difference = (_unit(a) - _unit(b)).square().sum(1)
            total = total + difference.flatten(1).mean(1)
        return total / len(mine)

    def describe(self) -> str:
        """What must be the same when a training is continued."""
        return self.name


def lpips_distance(
    network: Literal["alex", "vgg", "squeeze"] = "vgg", device: torch.device | str = "cpu"
) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS of the lpips package: images (b, 3, h, w) in [-1, 1] and as many others -> (b,).

    The package holds the learned weights of the channels only. Those of the network that they
    belong to come from torchvision: from its cache, else they are downloaded.

    Args:
        network: vgg (528 MB) is what first stages are usually trained with; alex 233 MB; squeeze
            5 MB.
        device: where it is computed.

    Raises:
        ImportError: the lpips package is not installed.
        OSError: torchvision's weights are neither in the cache nor can be downloaded.
    """
    try:
        import lpips
    except ImportError as error:
        raise ImportError(
            'LPIPS needs the lpips package: pip install "retrodiff[train]", or leave it out '
            "(--perceptual none)"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision: the package uses its older arguments
        try:
            made: Any = lpips.LPIPS(net=network, verbose=False)
        except (OSError, RuntimeError) as error:  # no network, or a broken file in the cache
            reason = " ".join(str(error).split())[:200]
            raise OSError(
                f"the {network} weights that LPIPS needs cannot be had ({reason}): go online once "
                "so that torchvision caches them, take a network that is at hand "
                "(perceptual=FeatureDistance.of(encoder)), or leave it out"
            ) from error
    made = made.to(device).eval().requires_grad_(False)

    def distance(one: Tensor, other: Tensor) -> Tensor:
        return made(one, other).flatten()

    distance.__qualname__ = f"lpips {network}"
    return distance


class _TimmMaps(nn.Module):
    """Images in [-1, 1] -> the intermediate maps of a timm network."""

    def __init__(self, encoder: TimmEncoder, layers: Sequence[int] | None) -> None:
        super().__init__()
        self.network = encoder.network
        self.layers = None if layers is None else list(layers)
        steps = encoder.preprocessing.steps
        self.steps = [step for step in steps if isinstance(step, (Channels, Normalize))]

    def forward(self, images: Tensor) -> list[Tensor]:
        for step in self.steps:
            images = step.apply(images)
        found = self.network.forward_intermediates(
            images, indices=self.layers, intermediates_only=True
        )
        return [part for part in found if part.ndim == 4]


def _several(maps: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [maps] if isinstance(maps, Tensor) else maps


def _unit(maps: Tensor) -> Tensor:
    """Feature maps whose channels have norm 1 at every position, in float32."""
    return F.normalize(maps.float(), dim=1, eps=EPS)
