"""The convolutional blocks that the published UNet and both first stages are made of.

Residual block, halving and doubling of the resolution, and the timestep embedding of Ho et al. 2020
in the graph of Rombach et al. 2022 (arXiv 2112.10752). Everything takes and returns (b, c, h, w).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from retrodiff.networks.normalization import GroupNorm

GROUPS = 32
"""Groups of every GroupNorm in the published models."""

FOLD_FROM = 256
"""Positions of a feature map from which adding up the kernel's taps pays for itself on a CPU."""


class ResBlock(nn.Module):
    """Two normalized 3x3 convolutions beside a skip path; the timestep enters between them.

    Args:
        channels: channels that come in.
        out_channels: channels that go out.
        time_width: width of the time embedding; None for a block without one.
        eps: of both norms: 1e-5 in the UNet, 1e-6 in the first stages.
        dropout: probability before the last convolution.
        groups: of both norms.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        time_width: int | None = None,
        eps: float = 1e-5,
        dropout: float = 0.0,
        groups: int = GROUPS,
    ):
        super().__init__()
        self.norm1 = GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time = None if time_width is None else nn.Linear(time_width, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Maps x (b, c, h, w) and the activated time embedding (b, t) to (b, out, h, w)."""
        h = self.conv1(_activated(self.norm1(x)))
        if self.time is not None and time is not None:
            h = _sum(h, self.time(time)[:, :, None, None])
        h = self.conv2(self.dropout(_activated(self.norm2(h))))
        return _sum(h, x if self.skip is None else self.skip(x))


class Downsample(nn.Module):
    """Half the resolution by a strided convolution.

    Args:
        channels: in and out.
        one_sided: pad right and bottom only (the first stages) instead of all around (the UNet).
    """

    def __init__(self, channels: int, *, one_sided: bool = False):
        super().__init__()
        self.one_sided = one_sided
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if one_sided else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h/2, w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.one_sided else x)


class Upsample(nn.Module):
    """Twice the resolution: every pixel repeated, then a 3x3 convolution.

    Args:
        channels: in and out.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def prepare(self, positions: int) -> Tensor | None:
        """The kernel that `forward` folds for an x of so many positions; None: it folds none."""
        if self.conv.weight.device.type != "cpu" or positions < FOLD_FROM:
            return None
        return folded(self.conv.weight)

    def forward(self, x: Tensor, kernel: Tensor | None = None) -> Tensor:
        """(b, c, h, w) -> (b, c, 2h, 2w).

        Args:
            x: (b, c, h, w).
            kernel: what `prepare` returned, of the weights as they are now; None: made here.
        """
        positions = x.shape[2] * x.shape[3]
        if positions < FOLD_FROM or x.device.type != "cpu":
            return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        kernel = self.prepare(positions) if kernel is None else kernel
        assert kernel is not None
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


def folded(kernel: Tensor) -> Tensor:
    """The kernel of a transposed convolution that repeats pixels and convolves 3x3, in one.

    Repeated pixels meet several taps of the kernel, so these can be added first: 16 products per
    input pixel and channel pair instead of 36.

    Args:
        kernel: (out, in, 3, 3).

    Returns:
        (in, out, 4, 4), for stride 2 and padding 1.
    """
    taps = kernel.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    both = torch.kron(taps, taps)
    summed = both @ rearrange(kernel, "o i y x -> i (y x) o")
    return rearrange(summed, "i (y x) o -> i o y x", y=4)


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of the timestep at ``width // 2`` frequencies from 1 down to 1e-4.

    Args:
        timesteps: (b,) integer or fractional.
        width: even.

    Returns:
        (b, width), float32: in half precision timesteps near 1000 would fall together.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(steps * (-math.log(10_000) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def check_channels(channels: int, groups: int = GROUPS) -> None:
    """Raises a ValueError where the norms' groups do not divide the channels of a first level."""
    if channels < 1 or channels % groups:
        raise ValueError(
            f"channels={channels} is not a multiple of {groups}, the groups of every norm: choose "
            "one that is"
        )


def _activated(h: Tensor) -> Tensor:
    """SiLU of a tensor that nothing else needs, in its own memory where no gradient is wanted."""
    return F.silu(h, inplace=not torch.is_grad_enabled())


def _sum(h: Tensor, more: Tensor) -> Tensor:
    """The sum, in the memory of h, which nothing else needs, where no gradient is wanted."""
    if torch.is_grad_enabled() or h.dtype != more.dtype:
        return h + more
    return h.add_(more)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all its weights set to zero, so that a new block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
