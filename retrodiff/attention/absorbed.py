"""Neighbor cross-attention with the projections absorbed into two thin tables: exact, and faster.

With few neighbors that stay the same, the query and output projections need not run over thousands
of positions: for each head, y W_q (n W_k)ᵀ / √e = y M with M (c, k), and the weighted values times
W_o are the weights times U (k, c). LayerNorm's gain goes into M and its shift into an offset of the
scores; rows are centered before the product, never after, because the folded form cancels where the
mean of a row is large. The mask is in the offset, too (-inf). `AttentionTables` is what one
sampling run computes once and reuses at every step; a single neighbor needs no attention at all,
because the softmax of one score is 1 (`OneNeighbor`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from retrodiff.attention.reference import (
    Neighborhood,
    Weights,
    join_regions,
    nothing,
    split_regions,
)
from retrodiff.interfaces import Tokens
from retrodiff.precision import no_autocast

TILE = 8 << 20
"""Bytes of x per thread that a CPU takes at a time: a tile gets the memory of the one before it,
which costs less than fresh pages."""


@dataclass(frozen=True, kw_only=True)
class AttentionTables:
    """Precomputed tables of the absorbed attention, shared by all evaluations; immutable.

    Holds neither weights nor a way back to them: after the weights change, prepare anew.

    Args:
        m: (b, r, j, c) with j = (h k): scores = centered x · mᵀ / std + offset.
        offset: (b, r, j), at least float32; -inf where a token is masked.
        u: (b, r, j, c): the block adds softmax(scores) · u.
        hidden: (b, r, k) or None, True where the caller's mask hid a token.
        heads: h.
        null_rows: rows at the end of the batch that are null, beside the b.

    Examples:
        >>> import torch
        >>> from retrodiff.attention import NeighborAttention
        >>> block = NeighborAttention(width=64, context_width=32, heads=2, path="absorbed")
        >>> with torch.no_grad():
        ...     tables = block.prepare(torch.randn(2, 4, 32), positions=256)
        >>> type(tables).__name__, tables.m.shape
        ('AttentionTables', torch.Size([2, 1, 8, 64]))
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


@dataclass(frozen=True, kw_only=True)
class OneNeighbor:
    """The vector that a single neighbor adds to every position alike (k = 1); immutable.

    Args:
        added: (b, r, c); zero in null rows and where the mask hides the neighbor.
        hidden: (b, r, 1) or None, True where the caller's mask hid the neighbor.
        null_rows: rows at the end of the batch that are null, among the b.

    Examples:
        >>> import torch
        >>> from retrodiff.attention import NeighborAttention
        >>> block = NeighborAttention(width=64, context_width=32, heads=2)
        >>> with torch.no_grad():
        ...     prepared = block.prepare(torch.randn(2, 1, 32), positions=256)
        >>> type(prepared).__name__, prepared.added.shape
        ('OneNeighbor', torch.Size([2, 1, 64]))
    """

    added: Tensor
    hidden: Tensor | None
    null_rows: int

    @property
    def batch(self) -> int:
        """Rows of x that this belongs to."""
        return self.added.shape[0]

    @property
    def regions(self) -> int:
        """Regions of the positions, each with its own neighbor."""
        return self.added.shape[1]


def one_neighbor(tokens: Tokens | Tensor, weights: Weights) -> OneNeighbor:
    """Computes what single neighbors (b, 1, d) or (b, r, 1, d) add to a position: n W_v W_o."""
    near = Neighborhood.of(tokens, weights.key.shape[1])
    if near.values.shape[2] != 1:
        raise ValueError(f"k={near.values.shape[2]}: only a single neighbor needs no attention")
    added = F.linear(F.linear(near.values[:, :, 0], weights.value), weights.out)
    added = F.pad(added, (0, 0, 0, 0, 0, near.null_rows))
    return OneNeighbor(added=added, hidden=near.hidden, null_rows=near.null_rows)


def one_neighbor_attention(
    x: Tensor, one: OneNeighbor, bias: Tensor, shape: tuple[int, int] | None = None
) -> Tensor:
    """The block where k = 1: one addition; (b, n, c) -> (b, n, c)."""
    wide = torch.promote_types(one.added.dtype, x.dtype)  # null rows get the bias unrounded
    added = rearrange(one.added.to(wide) + bias.to(wide), "b r c -> b r 1 c").to(x.dtype)
    return join_regions(split_regions(x, one.regions, shape) + added, shape)


def one_neighbor_weights(
    x: Tensor, one: OneNeighbor, heads: int, shape: tuple[int, int] | None = None
) -> Tensor:
    """Attention weights (b, h, n, 1) where k = 1: one; zero on the null and where it is hidden."""
    b, n, _ = x.shape
    seen = x.new_ones(b, one.regions, 1)
    if one.hidden is not None:
        seen[: len(one.hidden)].masked_fill_(one.hidden, 0)
    seen[b - one.null_rows :] = 0
    spread = rearrange(seen, "b r 1 -> b r 1 1").expand(-1, -1, n // one.regions, heads)
    return rearrange(join_regions(spread, shape), "b n h -> b h n 1")


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
    with no_autocast(near.values.device):  # it would narrow the product
        shift = torch.mv(weights.query.to(exact), weights.shift.to(exact)) * scale
    shift = rearrange(shift, "(h e) -> h 1 e", h=h)
    offset = rearrange((keys.to(exact) * shift).sum(-1), "h (b r k) -> b r h k", b=b, r=r, k=k)
    if near.mask is not None:
        offset = offset.masked_fill(~rearrange(near.mask, "b r k -> b r 1 k"), -torch.inf)
    return AttentionTables(
        m=rearrange(m, "h (b r k) c -> b r (h k) c", b=b, r=r, k=k).contiguous(),
        offset=rearrange(offset, "b r h k -> b r (h k)"),
        u=rearrange(u, "h (b r k) c -> b r (h k) c", b=b, r=r, k=k).contiguous(),
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
    """The block in PyTorch operations: x + softmax_h(normalized x · mᵀ + offset) · u + b_o.

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
    if live and tables.regions == 1 and _inference(x):
        return _in_tiles(x, tables, bias, eps)
    if live == 0:
        empty = nothing(tables.m, tables.offset, tables.u)
        return x + bias.to(x.dtype) + empty.to(x.dtype)
    attention = rearrange(_attention(x[:live], tables, eps, shape), "b r h k n -> (b r) (h k) n")
    u = rearrange(tables.u, "b r j c -> (b r) j c")
    added = _added(attention.mT, u, bias, x.dtype)
    added = rearrange(added, "(b r) n c -> b r n c", r=tables.regions)
    out = x[:live] + join_regions(added, shape)
    if tables.null_rows:
        return torch.cat([out, x[live:] + bias.to(x.dtype)])
    return out


def absorbed_weights(
    x: Tensor,
    tables: AttentionTables,
    eps: float = 1e-5,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """Attention weights (b, h, n, k) of positions on neighbors, from tables; zero on the null."""
    live = tables.m.shape[0]
    if live == 0:
        return x.new_zeros(x.shape[0], tables.heads, x.shape[1], tables.k)
    attention = _attention(x[:live], tables, eps, shape)
    if tables.hidden is not None:
        hidden = rearrange(tables.hidden, "b r k -> b r 1 k 1")
        attention = attention.masked_fill(hidden, 0)
    flat = rearrange(attention, "b r h k n -> b r n (h k)")
    weights = rearrange(join_regions(flat, shape), "b n (h k) -> b h n k", h=tables.heads)
    return F.pad(weights, (0, 0, 0, 0, 0, 0, 0, tables.null_rows))


def _inference(x: Tensor) -> bool:
    """Whether a CPU computes here and now: no gradient is recorded and no graph is traced."""
    recording = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return x.device.type == "cpu" and not recording


def _in_tiles(x: Tensor, tables: AttentionTables, bias: Tensor, eps: float) -> Tensor:
    """`absorbed_attention` of one region on a CPU, a tile of positions after the other."""
    live, n = tables.m.shape[0], x.shape[1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.add(x[live:], bias.to(x.dtype), out=out[live:])
    positions = max(1, TILE * torch.get_num_threads() // (x.shape[2] * x.element_size()))
    for start in range(0, live, max(1, positions // n)):
        some = slice(start, min(start + max(1, positions // n), live))
        mine = replace(tables, m=tables.m[some], offset=tables.offset[some], u=tables.u[some])
        u = mine.u[:, 0]
        tiles = zip(x[some].split(positions, 1), out[some].split(positions, 1), strict=True)
        for tile, result in tiles:
            attention = _attention(tile, mine, eps, None)
            attention = rearrange(attention, "b 1 h k n -> b n (h k)")
            torch.add(tile, _added(attention, u, bias, x.dtype), out=result)
    return out


def _added(attention: Tensor, u: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to x of a dtype: (b, n, j) · (b, j, c) + bias.

    Not summed onto x itself: each partial sum would be rounded to the size of x.
    """
    if u.dtype == dtype:
        return torch.baddbmm(bias.to(dtype), attention, u)
    return torch.bmm(attention, u).to(dtype) + bias.to(dtype)


def _attention(
    x: Tensor, tables: AttentionTables, eps: float, shape: tuple[int, int] | None
) -> Tensor:
    # Positions are the last axis, so that the softmax over few neighbors runs along whole vectors.
    y = split_regions(F.layer_norm(x, x.shape[-1:], eps=eps), tables.regions, shape)
    m = rearrange(tables.m, "b r j c -> (b r) j c")
    y = rearrange(y, "b r n c -> (b r) c n").to(m.dtype)
    offset = rearrange(tables.offset, "b r j -> (b r) j 1")
    if offset.dtype == m.dtype:
        scores = torch.baddbmm(offset, m, y)
    else:
        scores = torch.bmm(m, y) + offset
    scores = rearrange(scores, "(b r) (h k) n -> b r h k n", r=tables.regions, h=tables.heads)
    if _inference(x) and scores.dtype.itemsize >= 4:
        torch.softmax(scores, 3, out=scores)
        return scores.to(m.dtype)
    return scores.softmax(3).to(m.dtype)
