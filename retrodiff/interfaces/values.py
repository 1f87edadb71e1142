"""The values that flow between components: queries, neighbors, tokens, contexts, fingerprints.

They are frozen, equal where their contents are, and can be hashed. Axis letters and conventions are
those of `retrodiff.interfaces`, which has all of these names, too.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from retrodiff.randomness import Randomness
from retrodiff.text import printable

Scale = Literal["raw", "unit"]
Mode = Literal["text", "text+neighbors", "neighbors", "class", "image", "unconditional"]

Record = Mapping[str, Any]
"""Where a database row comes from: file, patch box, label, license, credit, ..."""


class Value:
    """Equality, hash and a short repr for a dataclass that holds tensors.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> Query(torch.zeros(1, 4)) == Query(torch.zeros(1, 4))
        True
        >>> Query(torch.zeros(1, 4)) == Query(torch.ones(1, 4))
        False
    """

    def __eq__(self, other: object) -> bool:
        """Of the same type, with equal contents; tensors on other devices differ."""
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(mine, getattr(other, name)) for name, mine in self._compared().items())

    def __hash__(self) -> int:
        """Of shapes and types, not of numbers: equal values have equal hashes."""
        return hash((type(self), *map(_key, self._compared().values())))

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        shown = [f"{f.name}={_short(getattr(self, f.name))}" for f in fields if f.repr]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _compared(self) -> dict[str, Any]:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {f.name: getattr(self, f.name) for f in fields if f.compare}


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Identity of embeddings: encoder, weights, preprocessing, width, scale and order of rows.

    Args:
        encoder: the encoder's name, with everything that changes its numbers (activation, size).
        weights: hash of the encoder's weights.
        preprocessing: name of the image preprocessing.
        dim: width of an embedding.
        scale: ``raw`` as the encoder gave them, ``unit`` divided by their norm.
        rows: hash of the stored rows in their order; empty for an encoder.

    Examples:
        >>> from retrodiff import Fingerprint
        >>> one = Fingerprint(encoder="clip", weights="a1", preprocessing="openai-224", dim=512)
        >>> other = Fingerprint(
        ...     encoder="clip", weights="b2", preprocessing="openai-224", dim=512
        ... )
        >>> one.disagreement(one) is None
        True
        >>> print(one.disagreement(other))
        weights='a1' against weights='b2'
    """

    encoder: str
    weights: str
    preprocessing: str
    dim: int
    scale: Scale = "raw"
    rows: str = ""

    @classmethod
    def from_json(cls, value: Any, what: str = "the fingerprint") -> Fingerprint:
        """A fingerprint as a file holds it.

        Args:
            value: JSON.
            what: the beginning of an error.

        Raises:
            ValueError: a part is missing, unknown, or of another type.
        """
        kinds = {"encoder": str, "weights": str, "preprocessing": str, "dim": int, "rows": str}
        if not isinstance(value, dict):
            raise ValueError(f"{what} is no JSON object")
        given = cast("dict[str, Any]", value)
        if unknown := given.keys() - {*kinds, "scale"}:
            raise ValueError(f"{what} has an unknown part {_told(min(unknown))}")
        about: dict[str, Any] = {"scale": "raw", "rows": "", **given}
        for name, kind in kinds.items():
            if name not in about:
                raise ValueError(f"{what} lacks {name!r}")
            if type(about[name]) is not kind:
                kind = "a whole number" if kind is int else "a text"
                raise ValueError(f"{what} has {name}={_told(about[name])}, not {kind}")
        if about["scale"] not in ("raw", "unit") or not 0 < about["dim"] < 2**31:
            raise ValueError(
                f"{what} has scale={_told(about['scale'])} and dim={_told(about['dim'])}"
            )
        return cls(**about)

    def disagreement(self, other: Fingerprint) -> str | None:
        """What differs about the *encoder* of two fingerprints, in words; None if nothing does."""
        for name in ("dim", "encoder", "preprocessing", "weights"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}={mine!r} against {name}={theirs!r}"
        return None


@dataclass(frozen=True, eq=False, repr=False)
class Query(Value):
    """Queries to a database: embeddings, and what they came from.

    Args:
        embedding: (b, d); (b, r, d) when every region of the latent asks for itself; (b, q, d),
            q queries for one image, for a retriever that merges what they find; raw scale.
        source: for each of the b queries, what it came from (a prompt, a file name, ...).
        ids: (b,) rows of the database that the queries themselves are (-1: none of them), so that
            `ExcludeSelf` can leave them out; None: unknown.
        generator: randomness for retrievers that draw, best a `Randomness` of b rows; None means
            torch's global state.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> query = Query(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), source=("a door", "a tree"))
        >>> len(query), query.unit.tolist()
        (2, [[0.6000000238418579, 0.800000011920929], [0.0, 1.0]])
        >>> query.rows([1]).source
        ('a tree',)
    """

    embedding: Tensor
    source: tuple[str, ...] = ()
    ids: Tensor | None = None
    generator: torch.Generator | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return self.embedding.shape[0]

    @property
    def unit(self) -> Tensor:
        """The embedding divided by its norm."""
        return unit(self.embedding)

    def rows(self, rows: Tensor | slice | list[int]) -> Query:
        """Some of the queries."""
        source = self.source
        if source:
            source = tuple(source[i] for i in torch.arange(len(source))[rows].tolist())
        ids = None if self.ids is None else self.ids[rows]
        generator = self.generator
        if isinstance(generator, Randomness):
            generator = generator.rows(rows)
        return Query(self.embedding[rows], source, ids, generator)

    @classmethod
    def cat(cls, parts: Sequence[Query]) -> Query:
        """Several batches of queries, joined along b; without their randomness."""
        ids = [part.ids for part in parts if part.ids is not None]
        return cls(
            torch.cat([part.embedding for part in parts]),
            tuple(text for part in parts for text in part.source),
            torch.cat(ids) if len(ids) == len(parts) else None,
        )


@dataclass(frozen=True, eq=False, repr=False)
class Neighbors(Value):
    """Rows of a database, found for each query, nearest first.

    Args:
        indices: (b, k) or (b, r, k) int64 row numbers; -1 marks a token that is no row of the
            database (the query itself, in the paper's text modes).
        similarity: cosine to the query, same shape.
        embeddings: (b, k, d) or (b, r, k, d), raw scale as stored.
        records: for each of the b queries, one record per neighbor; empty until described.
        mask: (b, k) or (b, r, k), True where a neighbor takes part; None: all do. Training on a
            varying number of neighbors fills shorter lists up to k with what does not take part.
        latents: (b, k, c, h, w), the neighbors' pictures in the model's first stage, zero where an
            index is -1; None unless the conditioner sees them (``latents_shape``).

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.testing import small_database
        >>> neighbors = small_database().search(Query(torch.randn(2, 8)), k=6)
        >>> neighbors.indices.shape, neighbors.embeddings.shape
        (torch.Size([2, 6]), torch.Size([2, 6, 8]))
        >>> neighbors.take(torch.tensor([0, 2, 4])).k
        3
    """

    indices: Tensor
    similarity: Tensor
    embeddings: Tensor
    records: tuple[tuple[Record, ...], ...] = ()
    mask: Tensor | None = None
    latents: Tensor | None = None

    def __len__(self) -> int:
        return self.indices.shape[0]

    @property
    def k(self) -> int:
        """Neighbors per query."""
        return self.indices.shape[-1]

    def take(self, columns: Tensor) -> Neighbors:
        """The neighbors at ``columns`` (b, j) or (j,) of each query's list, in that order."""
        columns = columns.to(self.indices.device).expand(*self.indices.shape[:-1], -1)
        wide = columns.unsqueeze(-1).expand(*columns.shape, self.embeddings.shape[-1])
        records = ()
        if self.records:
            records = tuple(
                tuple(row[j] for j in chosen)
                for row, chosen in zip(self.records, columns.tolist(), strict=True)
            )
        return Neighbors(
            self.indices.gather(-1, columns),
            self.similarity.gather(-1, columns),
            self.embeddings.gather(-2, wide),
            records,
            None if self.mask is None else self.mask.gather(-1, columns),
            None if self.latents is None else _taken(self.latents, columns),
        )

    def rows(self, rows: Tensor | slice | list[int]) -> Neighbors:
        """The neighbors of some of the queries."""
        records = self.records
        if records:
            kept = torch.arange(len(records))[rows].tolist()
            records = tuple(records[i] for i in kept)
        return Neighbors(
            self.indices[rows],
            self.similarity[rows],
            self.embeddings[rows],
            records,
            None if self.mask is None else self.mask[rows],
            None if self.latents is None else self.latents[rows],
        )

    def to(self, device: torch.device | str) -> Neighbors:
        """The same neighbors on another device."""
        return replace(
            self,
            indices=self.indices.to(device),
            similarity=self.similarity.to(device),
            embeddings=self.embeddings.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            latents=None if self.latents is None else self.latents.to(device),
        )

    @classmethod
    def of_query(cls, query: Query) -> Neighbors:
        """The query as its own only neighbor (index -1, similarity 1).

        This is how a prompt's embedding takes part in the set that conditions the network
        (Blattmann et al. 2022, section 3.3).
        """
        shape = query.embedding.shape[:-1]
        device = query.embedding.device
        return cls(
            torch.full((*shape, 1), -1, dtype=torch.int64, device=device),
            torch.ones((*shape, 1), device=device),
            query.embedding.unsqueeze(-2),
        )

    @classmethod
    def cat(cls, parts: Sequence[Neighbors]) -> Neighbors:
        """Several sets of the same queries, joined along k; without latents."""
        mask = None
        if any(p.mask is not None for p in parts):
            mask = torch.cat([_mask_of(part) for part in parts], -1)
        return cls(
            torch.cat([p.indices for p in parts], -1),
            torch.cat([p.similarity for p in parts], -1),
            torch.cat([p.embeddings for p in parts], -2),
            mask=mask,
        )


@dataclass(frozen=True, eq=False, repr=False)
class Tokens(Value):
    """One stream of conditioning tokens.

    Args:
        values: (b, k, d), or (b, r, k, d) with r regions that attend to their own tokens only.
        mask: (b, k) or (b, r, k), True where a token takes part; None: all do. For a variable
            number of neighbors; a row of only False equals the null condition.
        null_rows: how many rows at the *end* of the batch are the all-zero null condition. Set
            where the null is made and never detected from values, so that a network may skip them.

    Examples:
        >>> import torch
        >>> from retrodiff import Tokens
        >>> tokens = Tokens(torch.randn(2, 4, 512))
        >>> joined = Tokens.cat([tokens, tokens.zeros()])
        >>> joined.values.shape, joined.null_rows
        (torch.Size([4, 4, 512]), 2)
    """

    values: Tensor
    mask: Tensor | None = None
    null_rows: int = 0

    @property
    def is_null(self) -> bool:
        """Every row is the null condition."""
        return self.null_rows == self.values.shape[0]

    def zeros(self) -> Tokens:
        """The null condition of the same shape."""
        return Tokens(torch.zeros_like(self.values), None, self.values.shape[0])

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        """Several batches, joined along b; they must have the same k."""
        mask = None
        if any(p.mask is not None for p in parts):
            mask = torch.cat(
                [
                    p.mask
                    if p.mask is not None
                    else torch.ones(p.values.shape[:-1], dtype=torch.bool, device=p.values.device)
                    for p in parts
                ]
            )
        null_rows = 0
        for part in reversed(parts):
            null_rows += part.null_rows
            if not part.is_null:
                break
        return cls(torch.cat([p.values for p in parts]), mask, null_rows)


@dataclass(frozen=True, eq=False, repr=False)
class Context(Value):
    """The condition of a denoising run: named streams of tokens, and a vector.

    Args:
        streams: named token sets; a network joins them along k after its own projection of each.
        vector: (b, v), added to the timestep embedding; None: there is none.

    Examples:
        >>> import torch
        >>> from retrodiff import Context, Tokens
        >>> context = Context({"neighbors": Tokens(torch.randn(2, 4, 512))})
        >>> context.widths
        {'neighbors': 512}
        >>> context.zeros().streams["neighbors"].is_null
        True
    """

    streams: Mapping[str, Tokens]
    vector: Tensor | None = None

    def __len__(self) -> int:
        for tokens in self.streams.values():
            return tokens.values.shape[0]
        return 0 if self.vector is None else self.vector.shape[0]

    def zeros(self) -> Context:
        """The paper's null: every stream zero, its length kept."""
        vector = None if self.vector is None else torch.zeros_like(self.vector)
        return Context({name: t.zeros() for name, t in self.streams.items()}, vector)

    @property
    def widths(self) -> dict[str, int]:
        """Width of each stream."""
        return {name: tokens.values.shape[-1] for name, tokens in self.streams.items()}

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Context:
        """The same context on another device, or in another floating type."""
        streams = {
            name: replace(
                t,
                values=t.values.to(device, dtype),
                mask=None if t.mask is None else t.mask.to(device),
            )
            for name, t in self.streams.items()
        }
        return Context(streams, None if self.vector is None else self.vector.to(device, dtype))

    @classmethod
    def of(cls, values: Tensor, name: str = "neighbors") -> Context:
        """A context of one stream from a plain tensor (b, k, d)."""
        return cls({name: Tokens(values)})

    @classmethod
    def cat(cls, parts: Sequence[Context]) -> Context:
        """Several contexts with the same streams and token counts, joined along b.

        Raises:
            ValueError: they differ in more than their rows.
        """
        for part in parts[1:]:
            if (one := parts[0].described()) != (other := part.described()):
                raise ValueError(
                    f"contexts of {one} and of {other} cannot be joined: make the null from the "
                    "condition, conditioner.null(context), or give both the same tokens"
                )
        streams = {
            name: Tokens.cat([part.streams[name] for part in parts]) for name in parts[0].streams
        }
        vectors = [part.vector for part in parts if part.vector is not None]
        return cls(streams, torch.cat(vectors) if vectors else None)

    def described(self) -> str:
        """Everything about the shape of a context but its rows, in words."""
        parts = [f"{name} {tuple(t.values.shape[1:])}" for name, t in self.streams.items()]
        if self.vector is not None:
            parts.append(f"a vector of {self.vector.shape[-1]}")
        return ", ".join(parts) or "no tokens"


def unit(embedding: Tensor) -> Tensor:
    """Embeddings (..., d) divided by their norm along the last axis; zero stays zero."""
    return embedding / embedding.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _taken(latents: Tensor, columns: Tensor) -> Tensor:
    """Latents (b, k, c, h, w) at columns (b, j)."""
    return latents.gather(1, columns[..., None, None, None].expand(-1, -1, *latents.shape[2:]))


def _mask_of(neighbors: Neighbors) -> Tensor:
    if neighbors.mask is not None:
        return neighbors.mask
    return torch.ones_like(neighbors.indices, dtype=torch.bool)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return same and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    return bool(one == other)


def _key(value: Any) -> Any:
    """Something hashable that equal values share."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Mapping):
        return frozenset(value)
    return len(value) if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"<{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} {value.device}>"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_short(item)}" for key, item in value.items()) + "}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _told(value: Any) -> str:
    """A value of a file in an error: one line of it."""
    return printable(repr(value))[:80]
