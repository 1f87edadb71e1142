"""Turns a request into queries, their neighbors, and contexts for a generator.

All queries and neighbors of a request are found before the first image is generated, so that what
is wrong with them costs nothing. They stay on the CPU; a context moves to its generator later.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from retrodiff.components import where
from retrodiff.interfaces import (
    Autoencoder,
    Conditioner,
    Context,
    Database,
    Encoder,
    Generator,
    Mode,
    Neighbors,
    Prior,
    ProposalDistribution,
    Query,
    Randomness,
    Record,
    Retriever,
    TextEncoder,
)
from retrodiff.model.checks import check_context, encoder_disagreement
from retrodiff.model.neighbor_latents import seen
from retrodiff.model.request import Request
from retrodiff.pictures.converting import PixelRange
from retrodiff.retrieval.known_words import warning_of_strange
from retrodiff.retrieval.retriever import RandomOfTop


@dataclass(frozen=True, eq=False)
class Part:
    """Some images of a request that are generated together.

    Args:
        rows: their numbers.
        query: queries of the images.
        neighbors: neighbors of the images.
        context: what conditions them.
        null: the condition of the unconditional branch.
        others: the conditions that other databases give, by name.
    """

    rows: list[int]
    query: Query
    neighbors: Neighbors
    context: Context
    null: Context
    others: Mapping[str, Context]


@dataclass(frozen=True, eq=False)
class Asked:
    """The queries of a request, and what was found for them.

    Args:
        query: of all images.
        found: for each mode, the numbers of its images and their neighbors.
        others: for each mode, the neighbors of the same images in other databases, by name.
    """

    query: Query
    found: Mapping[Mode, tuple[list[int], Neighbors]]
    others: Mapping[Mode, Mapping[str, Neighbors]]

    @property
    def neighbors(self) -> Neighbors:
        """Those of all images, in their order.

        Modes differ in k; shorter lists are filled up with row -1 and similarity 0.
        """
        width = max(neighbors.k for _, neighbors in self.found.values())
        parts = [_widened(neighbors, width) for _, neighbors in self.found.values()]
        order = [row for rows, _ in self.found.values() for row in rows]
        back = torch.tensor(order).argsort()
        records = [row for part in parts for row in part.records]
        return Neighbors(
            torch.cat([part.indices for part in parts])[back],
            torch.cat([part.similarity for part in parts])[back],
            torch.cat([part.embeddings for part in parts])[back],
            tuple(records[i] for i in back.tolist()),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Asker:
    """The part of a model that retrieves and conditions; arguments as for `retrodiff.Model`."""

    encoder: Encoder | None
    database: Database | None
    retriever: Retriever
    proposal: ProposalDistribution | None
    prior: Prior | None
    conditioner: Conditioner
    autoencoder: Autoencoder | None
    prompt_template: str
    class_top: int

    def ask(self, request: Request, others: Mapping[str, Database] | None = None) -> Asked:
        """Queries and neighbors of every image of a request.

        Args:
            request: what is asked.
            others: further databases, by name.

        Raises:
            ValueError: a part is missing, or the request does not fit the database.
        """
        modes = list(dict.fromkeys(request.modes))
        for mode in modes:
            self._check(mode, request.k)
        query = self.queries(request)
        found: dict[Mode, tuple[list[int], Neighbors]] = {}
        more: dict[Mode, dict[str, Neighbors]] = {}
        for mode in modes:
            rows = [i for i, other in enumerate(request.modes) if other == mode]
            found[mode] = rows, self.neighbors(query.rows(rows), mode, request.k)
            if request.kind == "prompts":
                prompts = [request.value[i] for i in rows]
                told = warning_of_strange(self.encoder, prompts, self.database, found[mode][1])
                if told is not None:
                    warnings.warn(told, stacklevel=5)
            if others and bool((found[mode][1].indices < 0).all()):
                raise ValueError(
                    f"mode {mode!r} with k={request.k} retrieves nothing, so databases "
                    f"{', '.join(others)} have no effect: leave them out, or ask in another mode"
                )
            more[mode] = {}
            for name, database in (others or {}).items():
                asker = dataclasses.replace(self, database=database)
                asker._check(mode, request.k)
                more[mode][name] = asker.neighbors(query.rows(rows), mode, request.k)
        if len({neighbors.indices.ndim for _, neighbors in found.values()}) > 1:
            raise ValueError(
                f"modes {' and '.join(modes)} give neighbors of different shapes for several "
                "queries per image: ask for one of them at a time"
            )
        return Asked(query, found, more)

    def condition(self, asked: Asked, generator: Generator, request: Request) -> Iterator[Part]:
        """The contexts of a request in batches of like mode, each checked against the generator.

        The first image of each mode is checked before any batch is handed out.
        """
        for mode, (rows, neighbors) in asked.found.items():
            one = self.context(asked.query.rows(rows[:1]), neighbors.rows(slice(0, 1)))
            tokens = sum(tokens.values.shape[-2] for tokens in one.streams.values())
            if not tokens and generator.widths:
                raise ValueError(
                    f"k={request.k} leaves mode {mode!r} without a single token, but the denoiser "
                    "takes a condition: use k of 1 or more, or mode='text'"
                )
            check_context(generator, one, self.conditioner.null(one), 1)
        for mode, (rows, neighbors) in asked.found.items():
            for start in range(0, len(rows), request.batch_size):
                part = slice(start, start + request.batch_size)
                query = asked.query.rows(rows[part])
                near = neighbors.rows(part)
                context = self.context(query, near)
                others = {
                    name: self.context(query, theirs.rows(part))
                    for name, theirs in asked.others[mode].items()
                }
                null = self.conditioner.null(context)
                yield Part(rows[part], query, near, context, null, others)

    def neighbors(self, query: Query, mode: Mode, k: int) -> Neighbors:
        """The k tokens that condition each query in a mode, with their records.

        ``text`` touches no database, and neither does k = 0.
        """
        itself = Neighbors.of_query(query)
        if mode == "text" or not self.conditioner.uses_neighbors:
            found = itself
        elif mode == "text+neighbors":
            found = itself
            if k > 1:
                rest = self._retrieve(query, mode, k - 1)
                if rest.indices.ndim != itself.indices.ndim:
                    raise ValueError(
                        f"{type(self.retriever).__name__} merges the several queries of an image, "
                        "so they cannot be tokens beside its neighbors: use mode='neighbors'"
                    )
                found = Neighbors.cat([itself, rest])
        elif k == 0:
            found = itself.take(torch.zeros(0, dtype=torch.int64))
        else:
            found = self._retrieve(query, mode, k)
        return self._complete(query, found)

    @torch.no_grad()
    def context(self, query: Query, neighbors: Neighbors) -> Context:
        """What conditions images with these queries and neighbors."""
        return conditioned(self.conditioner, query, neighbors)

    def again(self, query: Query, neighbors: Neighbors, images: Tensor) -> Neighbors:
        """The neighbors of images in place of those that were found before.

        Args:
            query: what was asked; where it is a token among the neighbors, it remains one.
            neighbors: found before, of the images' number.
            images: (b, c, h, w), such as estimates while sampling.
        """
        found = self._images(list(images))
        found = dataclasses.replace(found, generator=query.generator)
        prompted = bool((neighbors.indices.flatten(1)[:, 0] < 0).all())
        near = self._retrieve(found, "image", neighbors.k - prompted)
        if prompted:
            token = query.embedding
            if near.indices.ndim == 3 and token.ndim == 2:
                token = token.unsqueeze(1).expand(-1, near.indices.shape[1], -1)
            near = Neighbors.cat([Neighbors.of_query(Query(token)), near])
        return self._complete(query, near)

    def _complete(self, query: Query, found: Neighbors) -> Neighbors:
        """With their records, and what the conditioner sees of their pictures."""
        found = dataclasses.replace(found, records=_origins(query, found, self.database))
        return seen(found, self.conditioner, self.database, self.autoencoder)

    def _check(self, mode: Mode, k: int) -> None:
        """Whether the database has enough rows for a mode, before anything is encoded."""
        if mode == "text" or not self.conditioner.uses_neighbors:
            return
        rows = k - 1 if mode == "text+neighbors" else k
        if rows > 0 or mode == "unconditional":
            database = self._database(mode)
            if rows > len(database):
                raise ValueError(
                    f"k={k} in mode {mode!r} retrieves {rows} rows, but the database has "
                    f"{len(database)} rows: lower k, or use a larger database"
                )

    def queries(self, request: Request) -> Query:
        """The queries of all images, on the CPU, each with its own randomness."""
        total, kind = len(request), request.kind
        if kind == "query":
            query: Query = request.value
        elif kind == "n" and not self.conditioner.uses_neighbors and self.proposal is None:
            query = Query(torch.zeros(total, 0), ("",) * total)
        elif kind == "n":
            query = self._proposed(request)
        elif kind == "images":
            query = self._images(request.value)
        else:
            query = self._texts(kind, request.value)
            if self.prior is not None:
                randomness = Randomness.of(request.seed, range(total), "prior")
                query = _translated(self.prior, query, randomness)
        return Query(
            query.embedding.detach().cpu().float(),
            query.source,
            None if query.ids is None else query.ids.cpu(),
            Randomness.of(request.seed, range(total), "retrieval"),
        )

    def _proposed(self, request: Request) -> Query:
        database = self._database("unconditional")
        if self.proposal is None:
            raise ValueError(
                "unconditional sampling needs a proposal distribution and this model has "
                "none: set proposal=Uniform(), or fit one to its database with "
                "NeighborCounts.fit(queries, database, k)"
            )
        randomness = Randomness.of(request.seed, range(len(request)), "proposal")
        return self.proposal.propose(database, len(request), randomness)

    def _images(self, images: Sequence[Tensor]) -> Query:
        """Images as queries; they are taken for new ones, rows of no database."""
        from retrodiff.databases.build.encoding import encode_images

        encoder = self._encoder("images")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", PixelRange)  # said when the request was read
            embedding = encode_images(encoder, images)
        source = tuple(f"image {i}" for i in range(len(images)))
        return _new("images", embedding, source)

    def _texts(self, kind: str, texts: Sequence[str]) -> Query:
        """Prompts, or class names in their template, as queries; equal ones are encoded once."""
        encoder = self._encoder(kind)
        if not hasattr(encoder, "encode_text"):
            raise ValueError(
                f"{kind} need an encoder of text, but {type(encoder).__name__} has no text tower "
                "(no encode_text): use a CLIPEncoder, or ask with images="
            )
        if kind == "classes":
            texts = [self.prompt_template.format(text) for text in texts]
        distinct = list(dict.fromkeys(texts))
        number = {text: i for i, text in enumerate(distinct)}
        with torch.no_grad():
            embedding = cast("TextEncoder", encoder).encode_text(distinct)
        at = torch.tensor([number[text] for text in texts], device=embedding.device)
        return _new(kind, embedding[at], tuple(texts))

    def _encoder(self, kind: str) -> Encoder:
        if self.encoder is None:
            raise ValueError(f"{kind} need an encoder and this model has none: set encoder=...")
        return self.encoder

    def _retrieve(self, query: Query, mode: Mode, k: int) -> Neighbors:
        database = self._database(mode)
        if self.encoder is not None and mode != "unconditional":
            # An encoder that fetched its weights just now can be compared only from here on.
            difference = encoder_disagreement(self.encoder, database)
            if difference is not None:
                raise ValueError(difference)
        zero = (~query.embedding.flatten(1).any(1)).nonzero().flatten().tolist()
        if zero:
            warnings.warn(
                f"query {zero[0]} is all zero, so that no row is nearer to it than another: its "
                "neighbors mean nothing",
                stacklevel=6,
            )
        retriever = self.retriever
        if mode == "class":
            retriever = RandomOfTop(retriever, min(max(self.class_top, k), len(database)))
        return retriever.retrieve(query, database, k).to("cpu")

    def _database(self, mode: Mode) -> Database:
        if self.database is None:
            raise ValueError(
                f"mode {mode!r} retrieves, but this model has no database: set "
                "database=open_database(path), or use mode='text', which needs none"
            )
        return self.database


def conditioned(conditioner: Conditioner, query: Query, neighbors: Neighbors) -> Context:
    """Applies a conditioner to query and neighbors, on the device of its weights."""
    at = where(conditioner)
    device = query.embedding.device if at is None else at[0]
    if query.embedding.device != device:
        query = dataclasses.replace(query, embedding=query.embedding.to(device))
    return conditioner.condition(query, neighbors.to(device))


@torch.no_grad()
def _translated(prior: Prior, query: Query, randomness: Randomness) -> Query:
    embedding = prior.translate(query.embedding, randomness)
    if embedding.shape != query.embedding.shape or not bool(embedding.isfinite().all()):
        raise ValueError(
            f"{type(prior).__name__} made embeddings {tuple(embedding.shape)} of "
            f"{tuple(query.embedding.shape)}, expected finite ones of the same shape"
        )
    return dataclasses.replace(query, embedding=embedding)


def _new(kind: str, embedding: Tensor, source: tuple[str, ...]) -> Query:
    """Queries that are no rows of any database."""
    wrong = (~embedding.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"the encoder gives embeddings that are not finite for {kind}[{wrong[0]}]: look for "
            "NaN in its weights, or use it in float32"
        )
    return Query(embedding, source, torch.full((len(embedding),), -1))


def _origins(
    query: Query, found: Neighbors, database: Database | None
) -> tuple[tuple[Record, ...], ...]:
    """Where every token of every query comes from: the record of its row, or the query itself."""
    flat = found.indices.reshape(len(query), -1)
    stored = flat >= 0
    known: list[Record] = []
    if database is not None and bool(stored.any()):
        known = database.records(flat[stored].cpu())
    rest = iter(known)
    return tuple(
        tuple(
            next(rest)
            if row >= 0
            else {"query": query.source[i] if i < len(query.source) else None}
            for row in rows
        )
        for i, rows in enumerate(flat.tolist())
    )


def _widened(neighbors: Neighbors, k: int) -> Neighbors:
    missing = k - neighbors.k
    if missing == 0:
        return neighbors
    shape = (*neighbors.indices.shape[:-1], missing)
    filler = Neighbors(
        torch.full(shape, -1),
        neighbors.similarity.new_zeros(shape),
        neighbors.embeddings.new_zeros(*shape, neighbors.embeddings.shape[-1]),
    )
    return dataclasses.replace(Neighbors.cat([neighbors, filler]), records=neighbors.records)
