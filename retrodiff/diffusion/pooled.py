"""Conditions that a small network sees sooner: pooled into a vector, and of the size it expects."""

# pyright: strict

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrodiff.diffusion.conditioner import Wrapper
from retrodiff.interfaces import Conditioner, Context, Neighbors, Query, Tokens
from retrodiff.numbers import real


@dataclass(frozen=True)
class Pooled(Wrapper):
    """The mean of each stream's tokens as a vector beside the tokens, as SDXL has it of its text.

    A network adds it to the timestep embedding, ``UNet(vector_width=...)``, so that every layer
    knows from the first step on what is asked; attention to tokens is learned more slowly. The
    means of the streams stand one behind the other; one without a token that is there is zero.

    A mean does not tell the nearest neighbor from the others, nor does attention to a set: with
    ``first`` the network knows which one it is.

    Args:
        conditioner: what gives the tokens, without a vector of its own.
        first: a stream whose first token that is there stands behind the means; of ``neighbors``
            it is the nearest, as retrievers return them. None: no token does.

    Examples:
        >>> from retrodiff.diffusion import Pooled, PromptAndNeighbors
        >>> conditioner = Pooled(PromptAndNeighbors("unit"))
        >>> conditioner.widths(512), conditioner.vector_width(512)
        ({'query': 512, 'neighbors': 512}, 1024)
    """

    conditioner: Conditioner
    first: str | None = None

    def vector_width(self, dim: int) -> int | None:
        """The widths of the streams together, and that of the first token.

        Raises:
            ValueError: there is no stream ``first``.
        """
        widths = self.conditioner.widths(dim)
        if self.first is None:
            return sum(widths.values())
        if self.first not in widths:
            raise ValueError(
                f"first={self.first!r}, but {type(self.conditioner).__name__} has the streams "
                f"{', '.join(widths)}: name one of them, or None"
            )
        return sum(widths.values()) + widths[self.first]

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """The inner context with the vector."""
        return self._pooled(self.conditioner.condition(query, neighbors))

    def null(self, context: Context) -> Context:
        """The inner null with the vector of its tokens."""
        return self._pooled(self.conditioner.null(context))

    def _pooled(self, context: Context) -> Context:
        parts = [_weighted(tokens, _there(tokens)) for tokens in context.streams.values()]
        if self.first is not None:
            tokens = context.streams[self.first]
            there = _there(tokens)
            parts.append(_weighted(tokens, there * (there.cumsum(1) == 1)))
        return replace(context, vector=torch.cat(parts, -1))


def _there(tokens: Tokens) -> Tensor:
    """Ones for the tokens that are there (b, k, 1), regions one behind the other."""
    values, mask = tokens.values.flatten(1, -2), tokens.mask
    there = values.new_ones(values.shape[:-1]) if mask is None else mask.flatten(1)
    return there.to(values.dtype).unsqueeze(-1)


def _weighted(tokens: Tokens, weights: Tensor) -> Tensor:
    """The mean (b, d) of the tokens by weights (b, k, 1) of zero and one; zero where all are."""
    return (tokens.values.flatten(1, -2) * weights).sum(1) / weights.sum(1).clamp(min=1)


@dataclass(frozen=True)
class Rescaled(Wrapper):
    """The tokens and the vector of another conditioner, times a factor.

    The values of an embedding of unit norm are small, 1/√d each: a network with fresh weights
    hardly sees them beside its own. Times √d they have the size that its layers expect.

    Args:
        conditioner: what gives the tokens.
        factor: above 0.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.diffusion import NeighborEmbeddings, Rescaled
        >>> from retrodiff.testing import small_database
        >>> query = Query(torch.randn(2, 8))
        >>> conditioner = Rescaled(NeighborEmbeddings("unit"), factor=3.0)
        >>> context = conditioner.condition(query, small_database().search(query, 4))
        >>> context.streams["neighbors"].values.norm(dim=-1).round().unique().tolist()
        [3.0]
    """

    conditioner: Conditioner
    factor: float

    def __post_init__(self) -> None:
        real("factor", self.factor, above=0)

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """The inner context, larger."""
        return self._times(self.conditioner.condition(query, neighbors))

    def null(self, context: Context) -> Context:
        """The inner null, larger."""
        return self._times(self.conditioner.null(context))

    def _times(self, context: Context) -> Context:
        streams = {
            name: replace(tokens, values=tokens.values * self.factor)
            for name, tokens in context.streams.items()
        }
        vector = None if context.vector is None else context.vector * self.factor
        return Context(streams, vector)
