"""Conditioners with weights of their own, trained together with the denoiser."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from retrodiff.diffusion.conditioner import Wrapper
from retrodiff.interfaces import Conditioner, Context, Neighbors, Query, Tokens
from retrodiff.numbers import whole


class Projected(nn.Module, Wrapper):
    """A learned linear projection of every stream of another conditioner.

    Its null is all zero, which each projection, without a bias, also makes of zeros; wrap it in
    `LearnedNull` for one that is learned. `Dropped` goes around it, so that what it hides is
    replaced by the null: ``Dropped(Projected(...), 0.1)``.

    Args:
        conditioner: what gives the streams.
        dim: width of an embedding, the encoder's ``dim``.
        width: of every stream afterwards.

    Example:
        >>> from retrodiff.diffusion import NeighborEmbeddings, Projected
        >>> Projected(NeighborEmbeddings("unit"), dim=512, width=128).widths(512)
        {'neighbors': 128}
    """

    def __init__(self, conditioner: Conditioner, *, dim: int, width: int) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.dim, self.width = whole("dim", dim), whole("width", width)
        self.project = nn.ModuleDict(
            {
                name: nn.Linear(given, self.width, bias=False)
                for name, given in conditioner.widths(self.dim).items()
            }
        )

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"conditioner": self.conditioner, "dim": self.dim, "width": self.width}

    def __repr__(self) -> str:
        return f"Projected({self.conditioner!r}, dim={self.dim}, width={self.width})"

    def widths(self, dim: int) -> dict[str, int]:
        """All streams of the inner conditioner, ``width`` wide."""
        if dim != self.dim:
            raise ValueError(
                f"Projected was made for embeddings of dim={self.dim}, not {dim}: use the encoder "
                "it was trained with, or make another"
            )
        return dict.fromkeys(self.conditioner.widths(dim), self.width)

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """The inner context, each stream projected."""
        inner = self.conditioner.condition(query, neighbors)
        streams = {name: self._projected(name, tokens) for name, tokens in inner.streams.items()}
        return replace(inner, streams=streams)

    def null(self, context: Context) -> Context:
        """All zero."""
        return context.zeros()

    def _projected(self, name: str, tokens: Tokens) -> Tokens:
        layer = self.project[name]
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return replace(tokens, values=layer(tokens.values.to(weight)))


class LearnedNull(nn.Module, Wrapper):
    """Another conditioner with a learned null: one token for each stream, repeated k times.

    In training it needs conditions to be hidden: ``Dropped(LearnedNull(...), 0.1)``.

    Args:
        conditioner: what gives the streams.
        dim: width of an embedding, the encoder's ``dim``.
    """

    def __init__(self, conditioner: Conditioner, *, dim: int) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.dim = whole("dim", dim)
        self.token = nn.ParameterDict(
            {
                name: nn.Parameter(0.02 * torch.randn(width))
                for name, width in conditioner.widths(self.dim).items()
            }
        )
        width = self.vector_width(self.dim)
        self.vector = None if width is None else nn.Parameter(0.02 * torch.randn(width))

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"conditioner": self.conditioner, "dim": self.dim}

    def __repr__(self) -> str:
        return f"LearnedNull({self.conditioner!r}, dim={self.dim})"

    def null(self, context: Context) -> Context:
        """The learned tokens, as many as the condition has."""
        streams = {
            name: Tokens(self.token[name].to(tokens.values).expand(tokens.values.shape))
            for name, tokens in context.streams.items()
        }
        vector = context.vector
        if vector is not None and self.vector is not None:
            vector = self.vector.to(vector).expand(vector.shape)
        return Context(streams, vector)
