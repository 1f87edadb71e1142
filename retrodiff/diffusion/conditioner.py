"""Conditioners: turn query and neighbors into named streams of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retrodiff.components import inside
from retrodiff.interfaces import (
    Conditioner,
    Context,
    Neighbors,
    Query,
    Scale,
    Tokens,
    member,
    unit,
)
from retrodiff.numbers import real
from retrodiff.randomness import normal_like, uniform


def _scaled(embedding: Tensor, scale: Scale) -> Tensor:
    if scale not in ("raw", "unit"):
        raise ValueError(f"scale={scale!r}, but a conditioner takes 'raw' or 'unit'")
    return unit(embedding) if scale == "unit" else embedding


@dataclass(frozen=True)
class NeighborEmbeddings(Conditioner):
    """The embeddings of the neighbors, as a set (Blattmann et al. 2022, section 3.2).

    Args:
        scale: ``raw`` as the encoder gave them (the paper's models), ``unit`` divided by their norm
            (the 768 model). Search is by cosine either way; the wrong scale here gives bad images
            without an error, so checkpoints and databases record theirs and the two are compared.
        convert: whether ``unit`` may divide what a database stores raw. False, as in the presets of
            published checkpoints: such a database is refused until someone says so.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.diffusion import NeighborEmbeddings
        >>> from retrodiff.testing import small_database
        >>> query = Query(torch.randn(2, 8))
        >>> context = NeighborEmbeddings("unit").condition(
        ...     query, small_database().search(query, 4)
        ... )
        >>> context.streams["neighbors"].values.norm(dim=-1).round().tolist()
        [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    """

    scale: Scale
    convert: bool = True

    def refuses(self, stored: Scale) -> str | None:
        """Why a database stored at this scale does not fit, in a line; None: it does."""
        if self.scale == "raw" and stored == "unit":
            return (
                "the network takes raw embeddings, but the database stores unit ones, whose norms "
                "are lost: build or import it again from raw embeddings, or use a network that was "
                "trained on unit ones (NeighborEmbeddings('unit'))"
            )
        if self.scale == "unit" and stored == "raw" and not self.convert:
            return (
                "the network was trained on unit embeddings, but the database stores raw ones: "
                "convert them knowingly with convert_scale=True in the preset (--convert-scale of "
                "retrodiff convert; conditioner=NeighborEmbeddings('unit') for a saved model), or "
                "use a database of unit embeddings"
            )
        return None

    def widths(self, dim: int) -> dict[str, int]:
        """One stream."""
        return {"neighbors": dim}

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """One token per neighbor; the query takes part only where it is one of them."""
        del query
        values = _scaled(neighbors.embeddings, self.scale)
        return Context({"neighbors": Tokens(values, neighbors.mask)})


@dataclass(frozen=True)
class Unconditional(Conditioner):
    """No condition at all: the parametric baseline without retrieval.

    Examples:
        >>> from retrodiff.diffusion import Unconditional
        >>> Unconditional().widths(512), Unconditional().uses_neighbors
        ({}, False)
    """

    @property
    def uses_neighbors(self) -> bool:
        """No database is needed."""
        return False

    def widths(self, dim: int) -> dict[str, int]:
        """No stream."""
        return {}

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """An empty context."""
        return Context({})


@dataclass(frozen=True)
class QueryOnly(Conditioner):
    """The query's own embedding and no database: the parametric baseline with CLIP guidance.

    Args:
        scale: as for `NeighborEmbeddings`.

    Examples:
        >>> import torch
        >>> from retrodiff import Neighbors, Query
        >>> from retrodiff.diffusion import QueryOnly
        >>> query = Query(torch.randn(2, 512))
        >>> QueryOnly("unit").condition(query, Neighbors.of_query(query)).streams[
        ...     "query"
        ... ].values.shape
        torch.Size([2, 1, 512])
    """

    scale: Scale

    @property
    def uses_neighbors(self) -> bool:
        """No database is needed."""
        return False

    def widths(self, dim: int) -> dict[str, int]:
        """One stream."""
        return {"query": dim}

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """One token."""
        del neighbors
        return Context({"query": Tokens(_scaled(query.embedding.unsqueeze(-2), self.scale))})


@dataclass(frozen=True)
class QueryAndNeighbors(Conditioner):
    """Query and neighbors as two streams (kNN-Diffusion, Sheynin et al. 2022).

    The query has its own stream in every mode, so that it is never a neighbor of itself: in
    ``text+neighbors`` its token among the neighbors is masked, and in ``text`` the neighbors are
    the null condition, as dropping the stream shows it in training.

    Args:
        scale: as for `NeighborEmbeddings`, of both streams.

    Examples:
        >>> from retrodiff.diffusion import QueryAndNeighbors
        >>> QueryAndNeighbors("unit").widths(512)
        {'query': 512, 'neighbors': 512}
    """

    scale: Scale

    def refuses(self, stored: Scale) -> str | None:
        """Why a database stored at this scale does not fit; see `NeighborEmbeddings`."""
        return NeighborEmbeddings(self.scale).refuses(stored)

    def widths(self, dim: int) -> dict[str, int]:
        """Two streams of the same width."""
        return {"query": dim, "neighbors": dim}

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """One query token, k neighbor tokens."""
        streams = QueryOnly(self.scale).condition(query, neighbors).streams
        near = NeighborEmbeddings(self.scale).condition(query, neighbors).streams["neighbors"]
        rows = neighbors.indices >= 0
        mask = rows if near.mask is None else rows & near.mask
        alone = ~mask.any(-1, keepdim=True)
        near = Tokens(near.values * mask.unsqueeze(-1), mask | alone)
        return Context({**streams, "neighbors": near})


@dataclass(frozen=True)
class PromptAndNeighbors(Conditioner):
    """The prompt and the rows of the database as two streams, each masked where it is not there.

    `QueryAndNeighbors` shows the query to the network in every mode. Here the stream ``query`` is
    the prompt in the modes that make a token of it, ``text`` and ``text+neighbors``, and masked in
    the others; the stream ``neighbors`` holds rows only and is masked in ``text``. A network that
    is trained on these cases, `TrainingSet.captioned`, serves all six modes.

    Args:
        scale: as for `NeighborEmbeddings`, of both streams.

    Examples:
        >>> from retrodiff.diffusion import PromptAndNeighbors
        >>> PromptAndNeighbors("unit").widths(512)
        {'query': 512, 'neighbors': 512}
    """

    scale: Scale

    def refuses(self, stored: Scale) -> str | None:
        """Why a database stored at this scale does not fit; see `NeighborEmbeddings`."""
        return NeighborEmbeddings(self.scale).refuses(stored)

    def widths(self, dim: int) -> dict[str, int]:
        """Two streams of the same width."""
        return {"query": dim, "neighbors": dim}

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """One query token and k neighbor tokens; row -1 marks the query among the neighbors."""
        del query
        rows = neighbors.indices >= 0
        itself = ~rows
        if neighbors.mask is not None:
            rows, itself = rows & neighbors.mask, itself & neighbors.mask
        values = _scaled(neighbors.embeddings, self.scale)
        prompt = (values * itself.unsqueeze(-1)).sum(-2, keepdim=True)
        return Context(
            {
                "query": Tokens(prompt, itself.any(-1, keepdim=True)),
                "neighbors": Tokens(values * rows.unsqueeze(-1), rows),
            }
        )


class Wrapper(Conditioner):
    """A conditioner around another one: forwards everything, so that only changes are written.

    A subclass is a dataclass or a torch module with a ``conditioner``, the inner one.

    Examples:
        >>> from dataclasses import dataclass, replace
        >>> import torch
        >>> from retrodiff import Context, Query, Tokens
        >>> from retrodiff.diffusion import NeighborEmbeddings, Wrapper
        >>> from retrodiff.testing import small_database
        >>> @dataclass(frozen=True)
        ... class Averaged(Wrapper):
        ...     # The mean of each stream in place of its tokens.
        ...     conditioner: NeighborEmbeddings
        ...
        ...     def condition(self, query, neighbors):
        ...         inner = self.conditioner.condition(query, neighbors)
        ...         means = {
        ...             n: Tokens(t.values.mean(1, keepdim=True))
        ...             for n, t in inner.streams.items()
        ...         }
        ...         return Context(means)
        >>> query = Query(torch.randn(2, 8))
        >>> context = Averaged(NeighborEmbeddings("raw")).condition(
        ...     query, small_database().search(query, 4)
        ... )
        >>> context.streams["neighbors"].values.shape
        torch.Size([2, 1, 8])
    """

    conditioner: Conditioner

    @property
    def uses_neighbors(self) -> bool:
        """As the inner conditioner."""
        return member(self.conditioner, Conditioner, "uses_neighbors")

    @property
    def latents_shape(self) -> tuple[int, int, int] | None:
        """As the inner conditioner."""
        return member(self.conditioner, Conditioner, "latents_shape")

    def refuses(self, stored: Scale) -> str | None:
        """As the inner conditioner."""
        return refusal(self.conditioner, stored)

    def widths(self, dim: int) -> dict[str, int]:
        """As the inner conditioner."""
        return self.conditioner.widths(dim)

    def vector_width(self, dim: int) -> int | None:
        """As the inner conditioner."""
        return member(self.conditioner, Conditioner, "vector_width")(dim)

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """As the inner conditioner."""
        return self.conditioner.condition(query, neighbors)

    def null(self, context: Context) -> Context:
        """As the inner conditioner."""
        return self.conditioner.null(context)

    def drop(self, context: Context, generator: torch.Generator | None = None) -> Context:
        """As the inner conditioner."""
        return self.conditioner.drop(context, generator)


@dataclass(frozen=True)
class QueryVector(Wrapper):
    """The query's embedding as a vector beside the tokens of another conditioner.

    A network adds it to the timestep embedding: ``UNet(vector_width=...)``.

    Args:
        conditioner: what gives the tokens; `Unconditional()` for none.
        scale: as for `NeighborEmbeddings`.

    Examples:
        >>> import torch
        >>> from retrodiff import Neighbors, Query
        >>> from retrodiff.diffusion import QueryVector, Unconditional
        >>> query = Query(torch.randn(2, 512))
        >>> QueryVector(Unconditional(), "unit").condition(
        ...     query, Neighbors.of_query(query)
        ... ).vector.shape
        torch.Size([2, 512])
    """

    conditioner: Conditioner
    scale: Scale

    def vector_width(self, dim: int) -> int | None:
        """That of an embedding."""
        return dim

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """The inner context with the vector.

        Raises:
            ValueError: queries have several embeddings for an image.
        """
        if query.embedding.ndim != 2:
            raise ValueError(
                f"queries of shape {tuple(query.embedding.shape)} give no vector: ask with one "
                "embedding for each image, (b, d)"
            )
        inner = self.conditioner.condition(query, neighbors)
        return replace(inner, vector=_scaled(query.embedding, self.scale))


@dataclass(frozen=True)
class Noised(Wrapper):
    """Noise on the vector of another conditioner in training, and its level told to the network.

    The conditioning augmentation of cascaded models (Ho et al. 2022), which unCLIP (Ramesh et al.
    2022) uses: a network that is used to inexact embeddings takes those of a prior. The vector gets
    one more entry, the level: 0.1 is noise of a tenth of the vector's norm. Sampling adds none.

    Args:
        conditioner: what gives the vector, such as `QueryVector`.
        most: levels are drawn from 0 to this in training.
        level: what the network is told in sampling: higher, and it holds to the embedding less.

    Examples:
        >>> from retrodiff.diffusion import Noised, QueryVector, Unconditional
        >>> conditioner = Noised(QueryVector(Unconditional(), "unit"), most=0.5)
        >>> conditioner.vector_width(512)
        513
    """

    conditioner: Conditioner
    most: float
    level: float = 0.0

    def __post_init__(self) -> None:
        real("most", self.most, 0)
        real("level", self.level, 0, self.most)

    def vector_width(self, dim: int) -> int | None:
        """One more than the inner vector's.

        Raises:
            ValueError: there is no vector.
        """
        inner = super().vector_width(dim)
        if inner is None:
            raise ValueError(
                f"Noised has no vector to put noise on: {type(self.conditioner).__name__} gives "
                "tokens alone; wrap it in QueryVector"
            )
        return inner + 1

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """The inner context and the level."""
        inner = self.conditioner.condition(query, neighbors)
        return _leveled(inner, torch.full((len(inner),), self.level))

    def null(self, context: Context) -> Context:
        """The inner null, level 0."""
        return _leveled(self.conditioner.null(_plain(context)), torch.zeros(len(context)))

    def drop(self, context: Context, generator: torch.Generator | None = None) -> Context:
        """What is trained on: the inner context, noise added to its vector."""
        inner = self.conditioner.drop(_plain(context), generator)
        level = self.most * uniform(generator, (len(inner),))
        vector = inner.vector
        assert vector is not None  # `_plain` says so
        size = vector.norm(dim=-1, keepdim=True) / vector.shape[-1] ** 0.5
        noise = level.to(vector).view(-1, 1) * normal_like(vector, generator)
        return _leveled(replace(inner, vector=vector + size * noise), level)


def _leveled(context: Context, level: Tensor) -> Context:
    """With a noise level (b,) at the end of the vector."""
    vector = context.vector
    assert vector is not None
    return replace(context, vector=torch.cat([vector, level.to(vector).view(-1, 1)], -1))


def _plain(context: Context) -> Context:
    """Without the noise level."""
    if context.vector is None:
        raise ValueError("Noised was handed a context without a vector: make it with condition")
    return replace(context, vector=context.vector[:, :-1])


@dataclass(frozen=True)
class Dropped(Wrapper):
    """A conditioner that training hides at random, so that the null condition is learned.

    Ho & Salimans 2022. Sampling is not affected. Wrapped several times, each draws on its own:
    ``Dropped(Dropped(Dropped(c, 0.1, "query"), 0.1, "neighbors"), 0.1)`` hides the query, the
    neighbors, and both together, each in a tenth of the samples.

    Args:
        conditioner: what is hidden.
        probability: of hiding a sample's condition.
        stream: the stream to hide, or ``vector`` for ``Context.vector``; None hides all of them
            together.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.diffusion import Dropped, NeighborEmbeddings
        >>> from retrodiff.testing import small_database
        >>> conditioner = Dropped(NeighborEmbeddings("raw"), probability=0.5)
        >>> query = Query(torch.randn(100, 8))
        >>> context = conditioner.condition(query, small_database().search(query, 4))
        >>> shown = (
        ...     conditioner.drop(context, torch.Generator().manual_seed(0))
        ...     .streams["neighbors"]
        ...     .values
        ... )
        >>> bool((shown == 0).all((1, 2)).any()), bool((shown != 0).any())
        (True, True)
    """

    conditioner: Conditioner
    probability: float
    stream: str | None = None

    def __post_init__(self) -> None:
        real("probability", self.probability, 0, 1)

    def drop(self, context: Context, generator: torch.Generator | None = None) -> Context:
        """The null's values in place of the hidden samples' (their length is kept).

        Raises:
            ValueError: there is no such stream.
        """
        context = self.conditioner.drop(context, generator)
        parts = [*context.streams, *([] if context.vector is None else ["vector"])]
        if self.stream is not None and self.stream not in parts:
            raise ValueError(
                f"Dropped(stream={self.stream!r}) hides nothing: the context has "
                f"{', '.join(parts) or 'no streams'}"
            )
        null = self.conditioner.null(context)
        kept = uniform(generator, (len(context),)) >= self.probability
        streams = dict(context.streams)
        for name, tokens in context.streams.items():
            if self.stream in (None, name):
                where = kept.to(tokens.values.device)
                where = where.view(-1, *[1] * (tokens.values.ndim - 1))
                values = torch.where(where, tokens.values, null.streams[name].values)
                # The null condition has no mask: what is hidden is one of as many tokens.
                mask = None if tokens.mask is None else tokens.mask | ~where.squeeze(-1)
                streams[name] = replace(tokens, values=values, mask=mask)
        vector = context.vector
        if vector is not None and null.vector is not None and self.stream in (None, "vector"):
            vector = torch.where(kept.to(vector.device).view(-1, 1), vector, null.vector)
        return Context(streams, vector)


def refusal(conditioner: Conditioner, stored: Scale) -> str | None:
    """Why a conditioner does not take embeddings stored at a scale, in a line; None: it does.

    A wrapper that says nothing of its own is asked for what the conditioners inside it say.
    """
    spoken_for: set[int] = set()
    for part in inside(conditioner):
        own = getattr(type(part), "refuses", None)
        if id(part) in spoken_for or own is None or own is Conditioner.refuses:
            continue
        if (line := part.refuses(stored)) is not None:
            return line
        spoken_for |= {id(inner) for inner in inside(part)}
    return None
