"""A causal transformer over the codes of an image that attends to neighbor embeddings.

The autoregressive sibling of the paper's diffusion model (Blattmann et al. 2022, RARM): codes in
reading order, each predicted from those before it; in every block causal self-attention, attention
to the neighbors as a set, and a gated feed-forward layer. There is no norm after the last block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from retrodiff.attention import NeighborAttention
from retrodiff.attention.dot_product import dot_product_attention
from retrodiff.interfaces import Context, Tokens
from retrodiff.networks.placed import Placed
from retrodiff.networks.streams import join_streams
from retrodiff.networks.transformer import FeedForward, SelfAttention, repeated
from retrodiff.precision import autocast_dtype


class CausalTransformer(Placed):
    """Logits of the next code: ``(codes so far, context) -> logits``.

    Args:
        codes: size of the vocabulary.
        grid: (h, w) of the codes of an image, read row by row; n = h * w.
        width: c of the tokens.
        depth: number of blocks.
        heads: of both attentions; divides the width.
        context_width: d of the neighbors; None: a network without cross-attention.
        streams: names of the context streams, all of width ``context_width``.
        extra_tokens: inputs beside the codes; the last of them starts an image. The published
            models have two, the other of which was made for masked codes and never used.

    Raises:
        ValueError: ``heads`` does not divide ``width``, or a number is less than 1.

    Examples:
        >>> import torch
        >>> from retrodiff.networks import CausalTransformer
        >>> network = CausalTransformer(
        ...     codes=16, grid=(4, 4), width=32, depth=1, heads=2, context_width=8
        ... )
        >>> codes = torch.zeros(2, 5, dtype=torch.int64)  # the first five codes of two images
        >>> network(codes, torch.randn(2, 4, 8)).shape
        torch.Size([2, 6, 16])
    """

    def __init__(
        self,
        *,
        codes: int,
        grid: tuple[int, int],
        width: int,
        depth: int,
        heads: int,
        context_width: int | None,
        streams: Sequence[str] = ("neighbors",),
        extra_tokens: int = 1,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        for name, value in (("codes", codes), ("extra_tokens", extra_tokens), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name}={value}: give 1 or more")
        self.codes, self.grid, self.width, self.heads = codes, (grid[0], grid[1]), width, heads
        self.context_width, self.streams = context_width, tuple(streams)
        self.extra_tokens = extra_tokens
        self.untrained = False
        """Fresh weights that are meant to be replaced: sampling from them warns."""
        self.embed = nn.Embedding(codes + extra_tokens, width)
        self.positional_encoding = nn.Parameter(0.02 * torch.randn(width, self.length))
        self.blocks = nn.ModuleList(
            [CausalBlock(width, context_width, heads) for _ in range(depth)]
        )
        self.out = nn.Linear(width, codes)
        nn.init.normal_(self.embed.weight, std=0.02)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments: ``CausalTransformer(**config)`` is the same architecture."""
        return {
            "codes": self.codes,
            "grid": list(self.grid),
            "width": self.width,
            "depth": len(self.blocks),
            "heads": self.heads,
            "context_width": self.context_width,
            "streams": list(self.streams),
            "extra_tokens": self.extra_tokens,
        }

    @property
    def length(self) -> int:
        """n, codes of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def start(self) -> int:
        """The input that stands before the first code."""
        return self.codes + self.extra_tokens - 1

    @property
    def widths(self) -> dict[str, int]:
        """Width of each context stream; empty: takes no tokens."""
        return {} if self.context_width is None else dict.fromkeys(self.streams, self.context_width)

    def prepare(
        self, context: Context | Tensor, *, positions: int | None = None, steps: int | None = None
    ) -> PreparedNeighbors:
        """The neighbors as every block needs them (keys and values, or tables of them).

        Args:
            context: a `Context`, or tokens (b, k, d) of the only stream.
            positions: that each evaluation will have; None: all n.
            steps: evaluations that will share it; None: many.

        Raises:
            ValueError: the context and the network do not fit.
        """
        if isinstance(context, Tensor):
            context = Context.of(context, self.streams[0])
        if context.vector is not None:
            raise ValueError(
                f"context.vector has width {context.vector.shape[-1]}, but a CausalTransformer "
                "takes none: use a conditioner that makes tokens"
            )
        tokens = join_streams(context, self.widths)
        if tokens is None:
            return PreparedNeighbors((None,) * len(self.blocks), 0)
        if tokens.values.ndim != 3:
            raise ValueError(
                f"a context of shape {tuple(tokens.values.shape)} has neighbors for each region, "
                "but a CausalTransformer takes one set for an image, (b, k, d): query with (b, d)"
            )
        if autocast_dtype(tokens.values.device) is None:
            tokens = replace(tokens, values=tokens.values.to(self.dtype))
        n = self.length if positions is None else positions
        layers = tuple(block.prepare(tokens, n, steps) for block in self._blocks())
        return PreparedNeighbors(layers, len(tokens.values))

    def forward(self, codes: Tensor, context: Context | Tensor | PreparedNeighbors) -> Tensor:
        """Logits of each code given those before it, all at once.

        Args:
            codes: (b, i) the first i codes of images, 0 <= i < n.
            context: of b rows, or of a whole multiple of b: the branches of guidance.

        Returns:
            Logits (rows of the context, i + 1, vocabulary); place j has those of code j.

        Raises:
            ValueError: codes and network, or codes and context, do not fit.
        """
        if codes.ndim != 2 or codes.shape[1] >= self.length:
            raise ValueError(
                f"codes of shape {tuple(codes.shape)}: expected (b, i) with i below the "
                f"{self.length} codes of an image"
            )
        prepared = (
            context if isinstance(context, PreparedNeighbors) else self.prepare(context, steps=1)
        )
        rows = prepared.rows or len(codes)
        if len(codes) == 0 or rows % len(codes):
            raise ValueError(
                f"codes have {len(codes)} rows, the context {rows}: hand in as many of both, or a "
                "whole multiple for the branches of guidance"
            )
        begin = codes.new_full((len(codes), 1), self.start)
        x = self.embed(torch.cat([begin, codes], 1))
        x = repeated(x + self.positional_encoding.T[: x.shape[1]], rows)
        for block, layer in zip(self._blocks(), prepared.layers, strict=True):
            x = block(x, layer)
        return self.out(x)

    def decoding(self, context: Context | Tensor, rows: int | None = None) -> Decoding:
        """Begins to generate code by code, with the neighbors prepared and a cache for the past.

        Args:
            context: the condition of each image.
            rows: of the batch, for a network that takes no tokens; None: those of the context.
        """
        prepared = self.prepare(context, positions=1, steps=self.length)
        return Decoding(self, prepared, prepared.rows or rows or 1)

    def _blocks(self) -> list[CausalBlock]:
        return cast("list[CausalBlock]", list(self.blocks))


@dataclass(frozen=True)
class PreparedNeighbors:
    """A context as every block needs it: what `CausalTransformer.prepare` returns.

    Args:
        layers: one entry per block.
        rows: b of the context; 0 for a network that takes none.
    """

    layers: tuple[Any, ...]
    rows: int


class Decoding:
    """One run of generation: every call of `next` takes the codes just chosen, and goes on.

    Keys and values of all places so far are kept, so that a step costs one place, not all; those
    of the neighbors are computed once.

    Args:
        network: the transformer.
        neighbors: prepared for single places.
        rows: of the batch.
    """

    def __init__(self, network: CausalTransformer, neighbors: PreparedNeighbors, rows: int) -> None:
        self.network, self.neighbors, self.rows = network, neighbors, rows
        self.place = 0
        self._past = [Past(network.length) for _ in network.blocks]

    def next(self, codes: Tensor | None = None) -> Tensor:
        """Logits (rows, vocabulary) of the next code.

        Args:
            codes: (rows,) chosen by the last call; None at the first.

        Raises:
            ValueError: the image has all its codes, or another number of codes is handed in.
        """
        net = self.network
        if self.place == net.length:
            raise ValueError(f"all {net.length} codes are there: begin anew with decoding(context)")
        if (codes is None) != (self.place == 0):
            raise ValueError(
                f"code {self.place} needs the codes before it, the first one needs none"
            )
        if codes is None:
            codes = torch.full((self.rows,), net.start, device=net.device)
        x = net.embed(codes) + net.positional_encoding[:, self.place]
        x = rearrange(x, "b c -> b 1 c")
        for block, layer, past in zip(
            net._blocks(), self.neighbors.layers, self._past, strict=True
        ):
            x = block(x, layer, past)
        self.place += 1
        return net.out(rearrange(x, "b 1 c -> b c"))


class Past:
    """Keys and values (b, heads, n, e) of the places so far, for one self-attention.

    Args:
        length: n, places there will be.
    """

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self._held: tuple[Tensor, Tensor] | None = None

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps those of further places (b, heads, m, e); returns those of all places so far."""
        if self._held is None:
            b, heads, _, e = keys.shape
            shape = (b, heads, self.length, e)
            self._held = keys.new_empty(shape), values.new_empty(shape)
        begin, self.filled = self.filled, self.filled + keys.shape[2]
        for held, new in zip(self._held, (keys, values), strict=True):
            held[:, :, begin : self.filled] = new
        return self._held[0][:, :, : self.filled], self._held[1][:, :, : self.filled]


class CausalAttention(SelfAttention):
    """``x + attention(norm(x))``, each place to itself and those before it."""

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """(b, m, c) -> (b, m, c); with a past, x is the single place that follows it."""
        y = self.norm(x)
        q, k, v = (
            rearrange(project(y), "b n (heads e) -> b heads n e", heads=self.heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        if past is not None:
            k, v = past.extended(k, v)
        h = dot_product_attention(q, k, v, causal=past is None)
        return x + self.to_out(rearrange(h, "b heads n e -> b n (heads e)"))


class CausalBlock(nn.Module):
    """Causal self-attention, cross-attention to the neighbors, feed-forward.

    Args:
        width: c.
        context_width: d of the tokens; None leaves the cross-attention out.
        heads: number of heads.
    """

    def __init__(self, width: int, context_width: int | None, heads: int) -> None:
        super().__init__()
        self.self_attention = CausalAttention(width, heads)
        self.cross_attention = (
            None if context_width is None else NeighborAttention(width, context_width, heads)
        )
        self.feed_forward = FeedForward(width)

    def prepare(self, tokens: Tokens, positions: int, steps: int | None) -> Any:
        """What the block's cross-attention needs of the tokens."""
        if self.cross_attention is None:
            return None
        return self.cross_attention.prepare(tokens, positions, steps)

    def forward(self, x: Tensor, prepared: Any, past: Past | None = None) -> Tensor:
        """(b, m, c) -> (b, m, c)."""
        x = self.self_attention(x, past)
        if self.cross_attention is not None:
            x = self.cross_attention(x, prepared)
        return self.feed_forward(x)
