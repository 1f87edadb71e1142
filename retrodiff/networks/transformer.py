"""Transformer blocks of the UNet: self-attention, attention to neighbors, feed-forward.

The spatial transformer of Rombach et al. 2022 (arXiv 2112.10752); neighbors enter by
cross-attention as a set, without positions or a projection (Blattmann et al. 2022, section 3). Each
part holds its own LayerNorm and residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrodiff.attention import NeighborAttention
from retrodiff.attention.dot_product import dot_product_attention
from retrodiff.networks.blocks import GROUPS, zeroed
from retrodiff.networks.linear import Linear
from retrodiff.networks.normalization import GroupNorm


class SelfAttention(nn.Module):
    """``x + attention(norm(x))`` over all positions.

    Args:
        width: c.
        heads: number of heads; must divide the width.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(width, width, bias=False)
        self.to_v = Linear(width, width, bias=False)
        self.to_out = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c) -> (b, n, c)."""
        y = self.norm(x)
        q, k, v = (
            project(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        h = dot_product_attention(q, k, v)  # (b, heads, n, e)
        return x + self.to_out(h.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """``x + W2(a * gelu(g))`` with (a, g) = W1(norm(x)): the gated unit of Shazeer 2020.

    Args:
        width: c; the hidden layer has four times as many.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = Linear(width, 8 * width)
        self.reduce = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c) -> (b, n, c)."""
        h, gate = self.expand(self.norm(x)).chunk(2, dim=-1)
        gate = F.gelu(gate)
        # Where no gradient is wanted, the memory that is at hand is taken again.
        return x + self.reduce(h * gate if torch.is_grad_enabled() else gate.mul_(h))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the neighbors, feed-forward.

    Args:
        width: c.
        context_width: d of the tokens; None leaves the cross-attention out.
        heads: number of heads.
    """

    def __init__(self, width: int, context_width: int | None, heads: int):
        super().__init__()
        self.self_attention = SelfAttention(width, heads)
        self.cross_attention = (
            None if context_width is None else NeighborAttention(width, context_width, heads)
        )
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, prepared: Any, rows: int, shape: tuple[int, int]) -> Tensor:
        """Positions (b, n, c) of a latent (h, w) -> (rows, n, c).

        Args:
            x: what the network holds at this place.
            prepared: what `NeighborAttention.prepare` returned.
            rows: of the context; where they are more than b, x is repeated.
            shape: (h, w) with n = h*w.
        """
        x = self.self_attention(x)
        if self.cross_attention is not None:
            x = self.cross_attention(repeated(x, rows), prepared, shape)
        return self.feed_forward(x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, beside a skip path.

    Args:
        channels: c.
        context_width: d of the tokens; None leaves the cross-attention out.
        channels_per_head: must divide the channels where ``heads`` is None.
        heads: must divide the channels; None: as many as ``channels_per_head`` gives.
        depth: number of blocks.
    """

    def __init__(
        self,
        channels: int,
        *,
        context_width: int | None,
        channels_per_head: int = 32,
        heads: int | None = None,
        depth: int = 1,
    ):
        super().__init__()
        name = "heads" if heads is not None else "channels_per_head"
        divisor = channels_per_head if heads is None else heads
        if divisor < 1 or channels % divisor:
            raise ValueError(
                f"{name}={divisor} does not divide {channels} channels: choose a divisor of every "
                "level's channels"
            )
        heads = channels // channels_per_head if heads is None else heads
        self.norm = GroupNorm(GROUPS, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels)
        self.blocks = nn.ModuleList(
            [TransformerBlock(channels, context_width, heads) for _ in range(depth)]
        )
        self.proj_out = zeroed(Linear(channels, channels))

    def forward(self, x: Tensor, prepared: Sequence[Any], rows: int) -> Tensor:
        """(b, c, h, w), one prepared context per block, rows of the context -> (rows, c, h, w)."""
        height, width = x.shape[-2:]
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (b, h w, c)
        for block, mine in zip(self.blocks, prepared, strict=True):
            h = block(h, mine, rows, (height, width))
        h = self.proj_out(h).transpose(1, 2).unflatten(2, (height, width))
        return repeated(x, len(h)) + h

    def cross_attentions(self) -> list[NeighborAttention]:
        """Of all blocks, in the order of the forward pass."""
        return [m for m in self.modules() if isinstance(m, NeighborAttention)]


def repeated(x: Tensor, rows: int) -> Tensor:
    """The batch repeated until it has ``rows`` rows: 1, 2, 1, 2, ..."""
    # torch.cat keeps the memory layout, Tensor.repeat doesn't.
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))
