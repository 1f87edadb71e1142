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

    Examples:
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
        """All streams of the inner conditioner, ``width`` wide.

        Raises:
            ValueError: ``dim`` is not the one it was made for.
        """
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


class VectorTokens(nn.Module, Wrapper):
    """Tokens made of another conditioner's vector, which stays beside them.

    unCLIP's decoder (Ramesh et al. 2022, section 2.1) takes an embedding twice: added to the
    timestep embedding, and projected to four extra tokens. Without a bias, so that the null, all
    zero, has zero tokens. `Dropped` goes around it.

    Args:
        conditioner: what gives the vector, such as `QueryVector`.
        dim: width of an embedding, the encoder's ``dim``.
        tokens: number of tokens.
        width: of each.
        stream: its name.

    Raises:
        ValueError: the conditioner gives no vector, or has a stream of that name.

    Examples:
        >>> from retrodiff.diffusion import QueryVector, Unconditional, VectorTokens
        >>> vector = QueryVector(Unconditional(), "unit")
        >>> VectorTokens(vector, dim=512, tokens=4, width=128).widths(512)
        {'query': 128}
    """

    def __init__(
        self, conditioner: Conditioner, *, dim: int, tokens: int, width: int, stream: str = "query"
    ) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.dim, self.tokens = whole("dim", dim), whole("tokens", tokens)
        self.width, self.stream = whole("width", width), stream
        given = self.vector_width(self.dim)
        if given is None or stream in conditioner.widths(self.dim):
            reason = "gives no vector" if given is None else f"has a stream {stream!r} already"
            name = type(conditioner).__name__
            raise ValueError(f"VectorTokens(stream={stream!r}) around {name}, which {reason}")
        self.project = nn.Linear(given, self.tokens * self.width, bias=False)

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        names = ("conditioner", "dim", "tokens", "width", "stream")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return f"VectorTokens({self.conditioner!r}, tokens={self.tokens}, width={self.width})"

    def widths(self, dim: int) -> dict[str, int]:
        """The inner streams and the tokens'."""
        return {**self.conditioner.widths(dim), self.stream: self.width}

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """The inner context with the tokens."""
        return self._with_tokens(self.conditioner.condition(query, neighbors))

    def null(self, context: Context) -> Context:
        """The inner null with its tokens."""
        return self._with_tokens(self.conditioner.null(self._inner(context)))

    def drop(self, context: Context, generator: torch.Generator | None = None) -> Context:
        """What the inner conditioner shows in training, with tokens of the same vector."""
        return self._with_tokens(self.conditioner.drop(self._inner(context), generator))

    def _inner(self, context: Context) -> Context:
        streams = {name: t for name, t in context.streams.items() if name != self.stream}
        return replace(context, streams=streams)

    def _with_tokens(self, inner: Context) -> Context:
        assert inner.vector is not None  # `__init__` says so
        values = self.project(inner.vector.to(self.project.weight))
        tokens = Tokens(values.unflatten(-1, (self.tokens, self.width)))
        return replace(inner, streams={**inner.streams, self.stream: tokens})


class LearnedNull(nn.Module, Wrapper):
    """Another conditioner with a learned null: one token for each stream, repeated k times.

    In training it needs conditions to be hidden: ``Dropped(LearnedNull(...), 0.1)``.

    Args:
        conditioner: what gives the streams.
        dim: width of an embedding, the encoder's ``dim``.

    Examples:
        >>> import torch
        >>> from retrodiff import Context
        >>> from retrodiff.diffusion import Dropped, LearnedNull, NeighborEmbeddings
        >>> conditioner = Dropped(LearnedNull(NeighborEmbeddings("unit"), dim=8), 0.1)
        >>> null = conditioner.null(Context.of(torch.randn(2, 4, 8)))
        >>> null.streams["neighbors"].values.shape
        torch.Size([2, 4, 8])
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
