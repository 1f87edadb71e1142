"""Neighbor cross-attention as it is written in a paper: the specification, and the standard path.

`reference_attention` is the slow clear form that every other path is tested against.
`standard_attention` is the same with PyTorch's fused softmax-attention and with the neighbors' keys
and values computed once: the path for long contexts, and the opponent in benchmarks.
(The block: Rombach et al. 2022, appendix E.2.1; its use on neighbors: Blattmann et al. 2022,
section 3.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from retrodiff.attention.dot_product import dot_product_attention
from retrodiff.interfaces import Tokens


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of one block, under the names that the formula gives them.

    Args:
        gain: (c,) of the LayerNorm.
        shift: (c,) of the LayerNorm.
        query: (c, c), rows are outputs (h e), as in every `nn.Linear`.
        key: (c, d).
        value: (c, d).
        out: (c, c).
        bias: (c,) of the output projection.
        heads: h; each is e = c / h wide.
        eps: of the LayerNorm.

    Examples:
        >>> import torch
        >>> from retrodiff.attention import NeighborAttention, reference_attention
        >>> block = NeighborAttention(width=64, context_width=32, heads=2)
        >>> x, neighbors = torch.randn(2, 256, 64), torch.randn(2, 4, 32)
        >>> with torch.no_grad():
        ...     y = block(x, neighbors)
        ...     slow = reference_attention(x, neighbors, block.weights)
        >>> torch.allclose(y, slow, atol=1e-5)
        True
    """

    gain: Tensor
    shift: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    bias: Tensor
    heads: int
    eps: float = 1e-5

    def to(self, dtype: torch.dtype) -> Weights:
        """The same weights in another dtype."""
        names = ("gain", "shift", "query", "key", "value", "out", "bias")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})


@dataclass(frozen=True, kw_only=True)
class KeysValues:
    """Keys and values of the neighbors, ready for any number of evaluations.

    Args:
        keys: (b, r, k, c) without the null rows.
        values: (b, r, k, c).
        mask: (b, r, k) or None, True where a token takes part.
        hidden: (b, r, k) or None, True where the caller's mask hid a token.
        null_rows: rows at the end of the batch that are null, beside the b.

    Examples:
        >>> import torch
        >>> from retrodiff.attention import NeighborAttention
        >>> block = NeighborAttention(width=64, context_width=32, heads=2, path="standard")
        >>> with torch.no_grad():
        ...     prepared = block.prepare(torch.randn(2, 4, 32), positions=256)
        >>> prepared.keys.shape
        torch.Size([2, 1, 4, 64])
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    hidden: Tensor | None
    null_rows: int

    @property
    def batch(self) -> int:
        """Rows of x that this belongs to."""
        return self.keys.shape[0] + self.null_rows

    @property
    def regions(self) -> int:
        """Regions of the positions, each with its own neighbors."""
        return self.keys.shape[1]


@dataclass(frozen=True)
class Neighborhood:
    """Tokens in the one form that the paths work on: live rows only, masked tokens zeroed.

    A row whose mask hides everything keeps its (now zero) tokens unmasked: zero values give a zero
    sum, which is the null condition, exactly and without a NaN.

    Args:
        values: (b, r, k, d).
        mask: (b, r, k) or None.
        hidden: (b, r, k) or None, where the caller's mask hid a token.
        null_rows: trailing null rows that were cut off.
    """

    values: Tensor
    mask: Tensor | None
    hidden: Tensor | None
    null_rows: int

    @classmethod
    def of(cls, tokens: Tokens | Tensor, width: int) -> Neighborhood:
        """Checked tokens.

        Raises:
            ValueError: no tokens, or widths or shapes that disagree.
        """
        if isinstance(tokens, Tensor):
            tokens = Tokens(tokens)
        values, mask = tokens.values, tokens.mask
        if values.ndim not in (3, 4):
            raise ValueError(
                f"context of shape {tuple(values.shape)}: expected (b, k, d), or (b, r, k, d) with "
                "one set of neighbors per region"
            )
        if values.shape[-2] == 0 or values.shape[1] == 0:
            raise ValueError(
                f"context of shape {tuple(values.shape)} has no tokens: give at least one, or the "
                "null condition, `Tokens.zeros()`"
            )
        if values.shape[-1] != width:
            raise ValueError(
                f"context width {values.shape[-1]} does not match context_width={width}: use "
                "embeddings of the encoder that the network was trained with"
            )
        if not 0 <= tokens.null_rows <= values.shape[0]:
            raise ValueError(
                f"null_rows={tokens.null_rows} does not fit a context of {values.shape[0]} rows"
            )
        if mask is not None and mask.shape != values.shape[:-1]:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} does not match context {tuple(values.shape)}: "
                f"expected {tuple(values.shape[:-1])}"
            )
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(
                f"mask of dtype {mask.dtype}: expected bool, True where a token counts"
            )
        if values.ndim == 3:
            values = rearrange(values, "b k d -> b 1 k d")
            mask = None if mask is None else rearrange(mask, "b k -> b 1 k")
        live = values.shape[0] - tokens.null_rows
        values = values[:live]
        if mask is None:
            return cls(values, None, None, tokens.null_rows)
        mask = mask[:live]
        values = values.masked_fill(~mask.unsqueeze(-1), 0)
        return cls(values, mask | ~mask.any(-1, keepdim=True), ~mask, tokens.null_rows)


def split_regions(x: Tensor, regions: int, shape: tuple[int, int] | None) -> Tensor:
    """Positions (b, n, c) -> (b, r, n/r, c), by region.

    Args:
        x: (b, n, c).
        regions: r.
        shape: (h, w) that n was flattened from, row by row: the regions are then the blocks of a
            √r by √r grid, in reading order. None: r runs of n/r consecutive positions.

    Raises:
        ValueError: the regions do not divide the positions.
    """
    n = x.shape[1]
    if regions == 1:
        return rearrange(x, "b n c -> b 1 n c")
    if shape is None:
        if n % regions:
            raise ValueError(f"{regions} regions do not divide {n} positions evenly")
        return rearrange(x, "b (r n) c -> b r n c", r=regions)
    side = check_grid(n, regions, shape)
    return rearrange(
        x,
        "b (y h x w) c -> b (y x) (h w) c",
        y=side,
        x=side,
        h=shape[0] // side,
        w=shape[1] // side,
    )


def join_regions(x: Tensor, shape: tuple[int, int] | None) -> Tensor:
    """The inverse of `split_regions`: (b, r, n/r, c) -> (b, n, c)."""
    regions = x.shape[1]
    if regions == 1 or shape is None:
        return rearrange(x, "b r n c -> b (r n) c")
    side = math.isqrt(regions)
    return rearrange(x, "b (y x) (h w) c -> b (y h x w) c", y=side, x=side, h=shape[0] // side)


def check_grid(n: int, regions: int, shape: tuple[int, int]) -> int:
    """Side of the square grid of regions.

    Raises:
        ValueError: shape, regions and positions do not fit together.
    """
    side = math.isqrt(regions)
    if shape[0] * shape[1] != n:
        raise ValueError(f"shape={shape} does not have the {n} positions of x")
    if side * side != regions or shape[0] % side or shape[1] % side:
        raise ValueError(
            f"{regions} regions do not tile a latent of {shape[0]}x{shape[1]}: use a square number "
            "whose root divides both sides, or leave shape out for runs of consecutive positions"
        )
    return side


def reference_attention(
    x: Tensor,
    tokens: Tokens | Tensor,
    weights: Weights,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """The formula: x + W_o · concat_h softmax(q_h k_hᵀ / √e) v_h + b_o, q from LayerNorm(x).

    Args:
        x: (b, n, c).
        tokens: (b, k, d) or (b, r, k, d), with mask.
        weights: of the block.
        shape: see `split_regions`.

    Returns:
        (b, n, c).
    """
    out, _ = _reference(x, tokens, weights, shape)
    return out


def reference_weights(
    x: Tensor,
    tokens: Tokens | Tensor,
    weights: Weights,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """Attention weights (b, h, n, k) of positions on neighbors by the formula; zero on null."""
    _, attention = _reference(x, tokens, weights, shape)
    return attention


def _reference(
    x: Tensor, tokens: Tokens | Tensor, weights: Weights, shape: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    tokens = tokens if isinstance(tokens, Tokens) else Tokens(tokens)
    values = tokens.values if tokens.values.ndim == 4 else tokens.values.unsqueeze(1)
    y = F.layer_norm(x, x.shape[-1:], weights.gain, weights.shift, weights.eps)
    y = split_regions(y, values.shape[1], shape)
    h = weights.heads
    q = rearrange(y @ weights.query.T, "b r n (h e) -> b r h n e", h=h)
    k = rearrange(values @ weights.key.T, "b r k (h e) -> b r h k e", h=h)
    v = rearrange(values @ weights.value.T, "b r k (h e) -> b r h k e", h=h)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if tokens.mask is None:
        attention = scores.softmax(-1)
    else:
        mask = rearrange(tokens.mask, "b ... k -> b (...) 1 1 k")
        attention = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        attention = attention.masked_fill(~mask, 0)
        v = v.masked_fill(~rearrange(tokens.mask, "b ... k -> b (...) 1 k 1"), 0)
    merged = rearrange(attention @ v, "b r h n e -> b r n (h e)")
    out = x + (join_regions(merged, shape) @ weights.out.T + weights.bias)
    if tokens.null_rows:
        attention = torch.cat(
            [
                attention[: len(x) - tokens.null_rows],
                torch.zeros_like(attention[len(x) - tokens.null_rows :]),
            ]
        )
    flat = rearrange(attention, "b r h n k -> b r n (h k)")
    return out, rearrange(join_regions(flat, shape), "b n (h k) -> b h n k", h=h)


def nothing(*empty: Tensor) -> Tensor:
    """Zero, as the sum of empty tensors: gives what they came from the gradient zero, not none.

    Distributed training waits for the gradient of every parameter.
    """
    return sum((part.sum() for part in empty), start=torch.zeros((), device=empty[0].device))


def keys_values(tokens: Tokens | Tensor, weights: Weights) -> KeysValues:
    """Keys and values of the neighbors, once for all evaluations."""
    near = Neighborhood.of(tokens, weights.key.shape[1])
    return KeysValues(
        keys=F.linear(near.values, weights.key),
        values=F.linear(near.values, weights.value),
        mask=near.mask,
        hidden=near.hidden,
        null_rows=near.null_rows,
    )


def standard_weights(
    x: Tensor, cached: KeysValues, weights: Weights, shape: tuple[int, int] | None = None
) -> Tensor:
    """Attention weights (b, h, n, k) of positions on neighbors, from keys; zero on the null."""
    live, h = cached.keys.shape[0], weights.heads
    y = F.layer_norm(x[:live], x.shape[-1:], weights.gain, weights.shift, weights.eps)
    q = split_regions(F.linear(y, weights.query), cached.regions, shape)
    q = rearrange(q, "b r n (h e) -> b r h n e", h=h)
    keys = rearrange(cached.keys, "b r k (h e) -> b r h e k", h=h).to(q.dtype)
    scores = q @ keys / math.sqrt(q.shape[-1])
    if cached.mask is not None:
        scores = scores.masked_fill(~rearrange(cached.mask, "b r k -> b r 1 1 k"), -torch.inf)
    attention = scores.softmax(-1)
    if cached.hidden is not None:
        attention = attention.masked_fill(rearrange(cached.hidden, "b r k -> b r 1 1 k"), 0)
    flat = rearrange(attention, "b r h n k -> b r n (h k)")
    found = rearrange(join_regions(flat, shape), "b n (h k) -> b h n k", h=h)
    return F.pad(found, (0, 0, 0, 0, 0, 0, 0, cached.null_rows))


def standard_attention(
    x: Tensor, cached: KeysValues, weights: Weights, shape: tuple[int, int] | None = None
) -> Tensor:
    """The block with PyTorch's `scaled_dot_product_attention`; (b, n, c) -> (b, n, c)."""
    live = cached.keys.shape[0]
    if live == 0:
        rest = (weights.gain, weights.shift, weights.query, weights.out)
        empty = nothing(cached.keys, cached.values, *(weight[:0] for weight in rest))
        return x + weights.bias.to(x.dtype) + empty.to(x.dtype)
    h = weights.heads
    y = F.layer_norm(x[:live], x.shape[-1:], weights.gain, weights.shift, weights.eps)
    q = split_regions(F.linear(y, weights.query), cached.regions, shape)
    out = dot_product_attention(
        rearrange(q, "b r n (h e) -> (b r) h n e", h=h),
        rearrange(cached.keys, "b r k (h e) -> (b r) h k e", h=h).to(q.dtype),
        rearrange(cached.values, "b r k (h e) -> (b r) h k e", h=h).to(q.dtype),
        None if cached.mask is None else rearrange(cached.mask, "b r k -> (b r) 1 1 k"),
    )
    out = rearrange(out, "(b r) h n e -> b r n (h e)", r=cached.regions)
    out = x[:live] + F.linear(join_regions(out, shape), weights.out, weights.bias)
    if not cached.null_rows:
        return out
    return torch.cat([out, x[live:] + weights.bias.to(x.dtype)])
