"""Neighbor cross-attention with the projections absorbed into two thin tables: exact, and faster.

With few neighbors that stay the same, the query and output projections need not run over thousands
of positions: for each head, y W_q (n W_k)ᵀ / √e = y M with M (c, k), and the weighted values times
W_o are the weights times U (k, c). LayerNorm's gain goes into M and its shift into an offset of the
scores; rows are centered before the product, never after, because the folded form cancels where the
mean of a row is large. The mask is in the offset, too (-inf). `AttentionTables` is what one sampling
run computes once and reuses at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from retrodiff.attention.reference import (
    Neighborhood,
    Weights,
    join_regions,
    split_regions,
)
from retrodiff.interfaces import Tokens


@dataclass(frozen=True, kw_only=True)
class AttentionTables:
    """Everything about the neighbors that all evaluations share; immutable.

    Holds neither weights nor a way back to them: after the weights change, prepare anew.

    Args:
        m: (b, r, j, c) with j = (h k): scores = centered x · mᵀ / std + offset.
        offset: (b, r, j), at least float32; -inf where a token is masked.
        u: (b, r, j, c): the block adds softmax(scores) · u.
        hidden: (b, r, k) or None, True where the caller's mask hid a token.
        heads: h.
        null_rows: rows at the end of the batch that are null, beside the b.
    """

    m: Tensor
    offset: Tensor
    u: Tensor
    hidden: Tensor | None
    heads: int
    null_rows: int

    @property
    def batch(self) -> int:
        """Rows of x that these tables belong to."""
        return self.m.shape[0] + self.null_rows

    @property
    def regions(self) -> int:
        """Regions of the positions, each with its own neighbors."""
        return self.m.shape[1]

    @property
    def k(self) -> int:
        """Neighbors per region."""
        return self.m.shape[2] // self.heads


def absorb(tokens: Tokens | Tensor, weights: Weights) -> AttentionTables:
    """Neighbors (b, k, d) or (b, r, k, d) and weights -> tables; differentiable in both."""
    near = Neighborhood.of(tokens, weights.key.shape[1])
    h = weights.heads
    b, r, k, _ = near.values.shape
    exact = torch.promote_types(weights.query.dtype, torch.float32)
    scale = math.sqrt(h / weights.query.shape[0])
    keys = rearrange(F.linear(near.values, weights.key), "b r k (h e) -> h (b r k) e", h=h)
    values = rearrange(F.linear(near.values, weights.value), "b r k (h e) -> h (b r k) e", h=h)
    query = (weights.query.to(exact) * (weights.gain.to(exact) * scale)).to(weights.query.dtype)
    m = keys @ rearrange(query, "(h e) c -> h e c", h=h)
    u = values @ rearrange(weights.out, "c (h e) -> h e c", h=h)
    shift = (weights.query.to(exact) @ weights.shift.to(exact)) * scale
    shift = rearrange(shift, "(h e) -> h 1 e", h=h)
    offset = rearrange((keys.to(exact) * shift).sum(-1), "h (b r k) -> b r h k", b=b, r=r)
    if near.mask is not None:
        offset = offset.masked_fill(~rearrange(near.mask, "b r k -> b r 1 k"), -torch.inf)
    return AttentionTables(
        m=rearrange(m, "h (b r k) c -> b r (h k) c", b=b, r=r).contiguous(),
        offset=rearrange(offset, "b r h k -> b r (h k)"),
        u=rearrange(u, "h (b r k) c -> b r (h k) c", b=b, r=r).contiguous(),
        hidden=near.hidden,
        heads=h,
        null_rows=near.null_rows,
    )


def absorbed_attention(
    x: Tensor,
    tables: AttentionTables,
    bias: Tensor,
    eps: float = 1e-5,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """x + softmax per head(normalized x · mᵀ + offset) · u + b_o in PyTorch operations.

    Args:
        x: (b, n, c).
        tables: of these b rows.
        bias: b_o (c,).
        eps: of the LayerNorm.
        shape: see `split_regions`.

    Returns:
        (b, n, c).
    """
    live = tables.m.shape[0]
    out = x + bias.to(x.dtype)
    if live == 0:
        return out
    attention = _attention(x[:live], tables, eps, shape)
    attention = rearrange(attention, "b r h k n -> (b r) (h k) n")
    u = rearrange(tables.u, "b r j c -> (b r) j c")
    added = torch.bmm(attention.mT, u.to(attention.dtype))
    added = join_regions(rearrange(added, "(b r) n c -> b r n c", r=tables.regions), shape)
    if tables.null_rows:
        return torch.cat([out[:live] + added, out[live:]])
    return out + added


def absorbed_weights(
    x: Tensor,
    tables: AttentionTables,
    eps: float = 1e-5,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """How much each position takes from each neighbor, (b, h, n, k); zero where it is null."""
    live = tables.m.shape[0]
    attention = _attention(x[:live], tables, eps, shape)
    if tables.hidden is not None:
        hidden = rearrange(tables.hidden, "b r k -> b r 1 k 1")
        attention = attention.masked_fill(hidden, 0)
    flat = rearrange(attention, "b r h k n -> b r n (h k)")
    weights = rearrange(join_regions(flat, shape), "b n (h k) -> b h n k", h=tables.heads)
    return F.pad(weights, (0, 0, 0, 0, 0, 0, 0, tables.null_rows))


def _attention(
    x: Tensor, tables: AttentionTables, eps: float, shape: tuple[int, int] | None
) -> Tensor:
    # Positions are the last axis, so that the softmax over few neighbors runs along whole vectors.
    y = split_regions(F.layer_norm(x, x.shape[-1:], eps=eps), tables.regions, shape)
    m = rearrange(tables.m, "b r j c -> (b r) j c")
    scores = torch.bmm(m, rearrange(y, "b r n c -> (b r) c n").to(m.dtype))
    offset = rearrange(tables.offset, "b r j -> (b r) j 1")
    scores = rearrange(
        scores + offset, "(b r) (h k) n -> b r h k n", r=tables.regions, h=tables.heads
    )
    return scores.softmax(3).to(m.dtype)
