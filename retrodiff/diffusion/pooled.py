"""Conditions that a small network sees sooner: pooled into a vector, and of the size it expects."""

# pyright: strict

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrodiff.diffusion.conditioner import Wrapper
from retrodiff.interfaces import Conditioner, Context, Neighbors, Query
from retrodiff.numbers import real


@dataclass(frozen=True)
class Pooled(Wrapper):
    """The mean of each stream's tokens as a vector beside the tokens, as SDXL has it of its text.

    A network adds it to the timestep embedding, ``UNet(vector_width=...)``, so that every layer
    knows from the first step on what is asked; attention to tokens is learned more slowly. The
    means of the streams stand one behind the other; one without a token that is there is zero.

    Args:
        conditioner: what gives the tokens, without a vector of its own.

    Examples:
        >>> from retrodiff.diffusion import Pooled, PromptAndNeighbors
        >>> conditioner = Pooled(PromptAndNeighbors("unit"))
        >>> conditioner.widths(512), conditioner.vector_width(512)
        ({'query': 512, 'neighbors': 512}, 1024)
    """

    conditioner: Conditioner

    def vector_width(self, dim: int) -> int | None:
        """The widths of the streams together."""
        return sum(self.conditioner.widths(dim).values())

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """The inner context with the vector."""
        return self._pooled(self.conditioner.condition(query, neighbors))

    def null(self, context: Context) -> Context:
        """The inner null with the vector of its tokens."""
        return self._pooled(self.conditioner.null(context))

    @staticmethod
    def _pooled(context: Context) -> Context:
        means: list[Tensor] = []
        for tokens in context.streams.values():
            values, mask = tokens.values.flatten(1, -2), tokens.mask
            there = values.new_ones(values.shape[:-1]) if mask is None else mask.flatten(1)
            there = there.to(values.dtype).unsqueeze(-1)
            means.append((values * there).sum(1) / there.sum(1).clamp(min=1))
        return replace(context, vector=torch.cat(means, -1))


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
