"""Encoder and decoder of the published first stages, shared by the VQ and the KL autoencoder.

The convolutional halves of Esser et al. 2021 (arXiv 2012.09841), as published with Rombach et al.
2022: residual blocks without timestep, one-headed attention in the middle and at chosen levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from retrodiff.attention.dot_product import dot_product_attention
from retrodiff.networks.blocks import GROUPS, Downsample, ResBlock, Upsample, check_channels
from retrodiff.networks.normalization import GroupNorm
from retrodiff.networks.placed import check_floating

EPS = 1e-6


class PixelAttention(nn.Module):
    """``x + attention(norm(x))`` over all positions of a feature map, with one head.

    Args:
        channels: c.
        groups: of the norm.
    """

    def __init__(self, channels: int, groups: int = GROUPS):
        super().__init__()
        self.norm = GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        y = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")
        y = dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + rearrange(self.to_out(y), "b 1 (h w) c -> b c h w", h=x.shape[-2])


class Resolution(nn.Module):
    """The blocks of one resolution, each with or without attention, and the way to the next.

    Args:
        widths: channels before the first and after each block.
        attends: attention after every block.
        resize: `Downsample` or `Upsample`; None at the end.
        groups: of every norm.
    """

    def __init__(
        self,
        widths: Sequence[int],
        attends: bool,
        resize: nn.Module | None,
        groups: int = GROUPS,
    ):
        super().__init__()
        pairs = list(pairwise(widths))
        self.blocks = nn.ModuleList([ResBlock(a, b, eps=EPS, groups=groups) for a, b in pairs])
        self.attentions = nn.ModuleList(
            [PixelAttention(b, groups) for _, b in pairs] if attends else []
        )
        self.resize = resize

    def forward(self, h: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, out, h', w')."""
        for i, block in enumerate(self.blocks):
            h = block(h)
            if self.attentions:
                h = self.attentions[i](h)
        return h if self.resize is None else self.resize(h)


def middle(channels: int, groups: int = GROUPS) -> nn.Sequential:
    """Residual block, attention, residual block."""
    return nn.Sequential(
        ResBlock(channels, channels, eps=EPS, groups=groups),
        PixelAttention(channels, groups),
        ResBlock(channels, channels, eps=EPS, groups=groups),
    )


class Encoder(nn.Module):
    """Images (b, in, h, w) -> features (b, out, h/f, w/f), f = 2 ** (levels - 1).

    Args:
        in_channels: of an image.
        out_channels: of the features.
        channels: of the first level.
        multipliers: channels of each level as a multiple of ``channels``.
        blocks_per_level: residual blocks of each level.
        attention_factors: downsampling factors with attention; the middle always has it.
        groups: of every norm.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        channels: int,
        multipliers: Sequence[int],
        blocks_per_level: int,
        attention_factors: Sequence[int],
        groups: int = GROUPS,
    ):
        super().__init__()
        check_channels(channels, groups)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        width, last = channels, len(multipliers) - 1
        self.levels = nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            widths = [width, *[multiplier * channels] * blocks_per_level]
            width = widths[-1]
            shrink = None if level == last else Downsample(width, one_sided=True)
            self.levels.append(Resolution(widths, 2**level in attention_factors, shrink, groups))
        self.middle = middle(width, groups)
        self.norm_out = GroupNorm(groups, width, EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, h, w) -> (b, out, h/f, w/f)."""
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """Features (b, in, h, w) -> images (b, out, f*h, f*w), f = 2 ** (levels - 1).

    Args:
        in_channels: of the features.
        out_channels: of an image.
        channels: of the last level.
        multipliers: as the encoder's; run from the last to the first.
        blocks_per_level: as the encoder's; the decoder has one more.
        attention_factors: downsampling factors with attention; the middle always has it.
        groups: of every norm.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        channels: int,
        multipliers: Sequence[int],
        blocks_per_level: int,
        attention_factors: Sequence[int],
        groups: int = GROUPS,
    ):
        super().__init__()
        width = multipliers[-1] * channels
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.middle = middle(width, groups)
        self.levels = nn.ModuleList()
        for level in reversed(range(len(multipliers))):
            widths = [width, *[multipliers[level] * channels] * (blocks_per_level + 1)]
            width = widths[-1]
            grow = Upsample(width) if level else None
            self.levels.append(Resolution(widths, 2**level in attention_factors, grow, groups))
        self.norm_out = GroupNorm(groups, width, EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, h, w) -> (b, out, f*h, f*w)."""
        h = self.middle(self.conv_in(x.contiguous(memory_format=torch.channels_last)))
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def check_images(images: Tensor, channels: int, factor: int) -> None:
    """Raise a ValueError where images (b, c, h, w) don't fit an encoder."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, the autoencoder takes (b, {channels}, h, w)"
        )
    check_floating(images, "images", "numbers in [-1, 1]: pixels / 127.5 - 1")
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"images of {height}x{width} do not divide by the autoencoder's factor {factor}: crop "
            f"or resize them to multiples of {factor}"
        )


def check_latents(latents: Tensor, channels: int) -> None:
    """Raise a ValueError where latents (b, c, h, w) don't fit a decoder."""
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}, the autoencoder takes "
            f"(b, {channels}, h, w)"
        )
    check_floating(latents, "latents", "numbers, as encode returns them")
