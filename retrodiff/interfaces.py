"""The eight components, their helpers, and the values that flow between them.

Everything in the library is one of these roles or one of these values; nothing here computes much.
A component is any object with the right methods: subclass the Protocol to have forgotten methods
refused at construction, or hand in a foreign object that happens to fit. Methods are named, never
``__call__``. A component holds hyper-parameters (and weights); data, context and randomness come in
as arguments.

Axis letters, here and in every docstring::

    b batch    k neighbors (tokens)    d embedding width    r regions of the latent
    c channels    h, w height and width    n positions or rows    m rows of a database

Images are float tensors (b, c, h, w) in [-1, 1]. Similarity is the cosine in [-1, 1]: higher is
nearer. ``sigma`` is the standard deviation of the noise in x = x0 + sigma * noise.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

Scale = Literal["raw", "unit"]
Mode = Literal["text", "text+neighbors", "neighbors", "class", "image", "unconditional"]
Denoise = Callable[[Tensor, Tensor], Tensor]
"""``(x (b, c, h, w), sigma (b,)) -> denoised (b, c, h, w)``: all that a sampler sees of a model."""

Record = Mapping[str, Any]
"""Where a database row comes from: file, patch box, label, licence, credit, ..."""


# --- values ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What must agree wherever embeddings meet: who made them, how, and in which order.

    Args:
        encoder: the encoder's name, with everything that changes its numbers (activation, size).
        weights: hash of the encoder's weights.
        preprocessing: name of the image preprocessing.
        dim: width of an embedding.
        scale: ``raw`` as the encoder gave them, ``unit`` divided by their norm.
        rows: hash of the stored rows in their order; empty for an encoder.
    """

    encoder: str
    weights: str
    preprocessing: str
    dim: int
    scale: Scale = "raw"
    rows: str = ""

    @classmethod
    def from_json(cls, value: Any) -> Fingerprint:
        """A fingerprint as a file holds it.

        Raises:
            ValueError: a part is missing, unknown, or of another type.
        """
        kinds = {"encoder": str, "weights": str, "preprocessing": str, "dim": int, "rows": str}
        if not isinstance(value, dict):
            raise ValueError("the fingerprint is no JSON object")
        about = cast("dict[str, Any]", value)
        if unknown := about.keys() - {*kinds, "scale"}:
            raise ValueError(f"the fingerprint has an unknown part {min(unknown)!r}")
        about = {"scale": "raw", "rows": "", **about}
        for name, kind in kinds.items():
            if name not in about:
                raise ValueError(f"the fingerprint lacks {name!r}")
            if type(about[name]) is not kind:
                raise ValueError(f"the fingerprint has {name}={about[name]!r}")
        if about["scale"] not in ("raw", "unit") or not 0 < about["dim"] < 2**31:
            raise ValueError(
                f"the fingerprint has scale={about['scale']!r} and dim={about['dim']!r}"
            )
        return cls(**about)

    def disagreement(self, other: Fingerprint) -> str | None:
        """What differs about the *encoder* of two fingerprints, in words; None if nothing does."""
        for name in ("dim", "encoder", "preprocessing", "weights"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}={mine!r} against {name}={theirs!r}"
        return None


@dataclass(frozen=True)
class Query:
    """What is asked of a database.

    Args:
        embedding: (b, d); (b, r, d) when every region of the latent asks for itself; (b, q, d),
            q queries for one image, for a retriever that merges what they find; raw scale.
        source: for each of the b queries, what it came from (a prompt, a file name, ...).
        ids: (b,) rows of the database that the queries themselves are (-1: none of them), so that
            `ExcludeSelf` can leave them out.
        generator: randomness for retrievers that draw; None means torch's global state.
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
        return replace(self, embedding=self.embedding[rows], source=source, ids=ids)


@dataclass(frozen=True)
class Neighbors:
    """Rows of a database, found for each query, nearest first.

    Args:
        indices: (b, k) or (b, r, k) int64 row numbers; -1 marks a token that is no row of the
            database (the query itself, in the paper's text modes).
        similarity: cosine to the query, same shape.
        embeddings: (b, k, d) or (b, r, k, d), raw scale as stored.
        records: for each of the b queries, one record per neighbor; empty until described.
    """

    indices: Tensor
    similarity: Tensor
    embeddings: Tensor
    records: tuple[tuple[Record, ...], ...] = ()

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
        )

    def rows(self, rows: Tensor | slice | list[int]) -> Neighbors:
        """The neighbors of some of the queries."""
        records = self.records
        if records:
            kept = torch.arange(len(records))[rows].tolist()
            records = tuple(records[i] for i in kept)
        return Neighbors(self.indices[rows], self.similarity[rows], self.embeddings[rows], records)

    def to(self, device: torch.device | str) -> Neighbors:
        """The same neighbors on another device."""
        return replace(
            self,
            indices=self.indices.to(device),
            similarity=self.similarity.to(device),
            embeddings=self.embeddings.to(device),
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
        """Several sets of the same queries, joined along k."""
        return cls(
            torch.cat([p.indices for p in parts], -1),
            torch.cat([p.similarity for p in parts], -1),
            torch.cat([p.embeddings for p in parts], -2),
        )


@dataclass(frozen=True)
class Tokens:
    """One stream of conditioning tokens.

    Args:
        values: (b, k, d), or (b, r, k, d) with r regions that attend to their own tokens only.
        mask: (b, k) or (b, r, k), True where a token takes part; None: all do. For a variable
            number of neighbors; a row of only False equals the null condition.
        null_rows: how many rows at the *end* of the batch are the all-zero null condition. Set
            where the null is made and never detected from values, so that a network may skip them.
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


@dataclass(frozen=True)
class Context:
    """Everything that conditions one denoising run, and nothing else.

    Args:
        streams: named token sets; a network joins them along k after its own projection of each.
        vector: (b, v), added to the timestep embedding; None: there is none.
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

    def to(self, device: torch.device | str) -> Context:
        """The same context on another device."""
        streams = {
            name: replace(
                t,
                values=t.values.to(device),
                mask=None if t.mask is None else t.mask.to(device),
            )
            for name, t in self.streams.items()
        }
        return Context(streams, None if self.vector is None else self.vector.to(device))

    @classmethod
    def of(cls, values: Tensor, name: str = "neighbors") -> Context:
        """A context of one stream from a plain tensor (b, k, d)."""
        return cls({name: Tokens(values)})

    @classmethod
    def cat(cls, parts: Sequence[Context]) -> Context:
        """Several contexts with the same streams, joined along b."""
        streams = {
            name: Tokens.cat([part.streams[name] for part in parts]) for name in parts[0].streams
        }
        vectors = [part.vector for part in parts if part.vector is not None]
        return cls(streams, torch.cat(vectors) if vectors else None)


def unit(embedding: Tensor) -> Tensor:
    """The embedding(s) divided by their norm along the last axis; zero stays zero."""
    return embedding / embedding.norm(dim=-1, keepdim=True).clamp_min(1e-12)


# --- the eight components ----------------------------------------------------------------------


@runtime_checkable
class Encoder(Protocol):
    """Maps images to embeddings (φ in the paper).

    Three members must be written; the rest has defaults, and what wraps an encoder forwards it.
    """

    @property
    def dim(self) -> int:
        """Width d of an embedding."""
        ...

    @property
    def fingerprint(self) -> Fingerprint:
        """Identity of the encoder: name, weights, preprocessing, width."""
        ...

    @abstractmethod
    def encode_image(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] of any size -> embeddings (b, d), raw scale."""
        ...

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory; False while published ones wait for the first use."""
        return True

    @property
    def identity(self) -> Fingerprint:
        """The fingerprint, the hash of its weights empty while they are not loaded."""
        return self.fingerprint

    @property
    def preparation(self) -> Callable[[Tensor], Tensor] | None:
        """A function from images to what `encode_prepared` takes; None: those take images.

        It takes images (b, c, h, w) of any size, uint8 or in [-1, 1], works on each alone, and can
        be sent to other processes, which decode and resize ahead of the encoder.
        """
        return None

    def encode_prepared(self, prepared: Tensor) -> Tensor:
        """Prepared images (b, ...) -> embeddings (b, d), raw scale."""
        return self.encode_image(prepared)

    def to(self, device: torch.device | str) -> Encoder:
        """Moves the weights, where there are any; returns the encoder itself."""
        del device
        return self


@runtime_checkable
class TextEncoder(Encoder, Protocol):
    """An encoder that maps text into the same space as images."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> embeddings (b, d), raw scale."""
        ...


@runtime_checkable
class Database(Protocol):
    """What do we own (D)? Rows of embeddings with their origin; it does not change."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Who made the embeddings, and a hash of the rows in their order."""
        ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def embeddings(self, indices: Tensor) -> Tensor:
        """Row numbers (...) -> stored vectors (..., d), float32, raw scale."""
        ...

    @abstractmethod
    def search(self, query: Query, k: int) -> Neighbors:
        """The k rows of highest cosine for each query, nearest first."""
        ...

    @abstractmethod
    def records(self, indices: Tensor) -> list[Record]:
        """Row numbers (n,) -> their metadata, in that order."""
        ...


@runtime_checkable
class Retriever(Protocol):
    """Which k of them (ξ_k)?"""

    @abstractmethod
    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Some k rows of the database for each query."""
        ...


@runtime_checkable
class ProposalDistribution(Protocol):
    """What do we ask when nobody asks (p_D)?"""

    @abstractmethod
    def support(self, database: Database) -> tuple[Tensor, Tensor]:
        """The rows that may be drawn (n,) int64 and their positive weights (n,) float64."""
        ...

    @abstractmethod
    def propose(self, database: Database, n: int, generator: torch.Generator) -> Query:
        """Pseudo-queries (n,) drawn from the database."""
        ...


@runtime_checkable
class Conditioner(Protocol):
    """How do query and neighbors enter the network?"""

    @property
    def uses_neighbors(self) -> bool:
        """Whether a database is needed at all."""
        return True

    @abstractmethod
    def widths(self, dim: int) -> dict[str, int]:
        """Width of each stream for embeddings of width ``dim``."""
        ...

    @abstractmethod
    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """Query and neighbors -> what the network attends to. Deterministic."""
        ...

    def null(self, context: Context) -> Context:
        """The condition of the unconditional branch; by default all zero."""
        return context.zeros()

    def drop(self, context: Context, generator: torch.Generator | None = None) -> Context:
        """What training hides, so that the null is learned; by default nothing."""
        del generator
        return context


@runtime_checkable
class Denoiser(Protocol):
    """What is the clean latent (ε_θ, in the convention ``(x, sigma) -> denoised``)?"""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of a latent."""
        ...

    @property
    def widths(self) -> dict[str, int]:
        """Width of each context stream that the network accepts; empty: takes no condition."""
        ...

    @property
    def schedule(self) -> Schedule:
        """The noise levels it is sampled at unless another schedule is chosen."""
        ...

    @abstractmethod
    def denoise(self, x: Tensor, sigma: Tensor, context: Any) -> Tensor:
        """E[x0 | x] for x = x0 + sigma * noise.

        Args:
            x: (b, c, h, w).
            sigma: (b,).
            context: what `prepare` returned, or a Context. It may have a whole multiple of b rows:
                the branches of guidance, one after the other, all on the same x.

        Returns:
            (rows of the context, c, h, w); b rows for a denoiser that takes no condition.
        """
        ...

    def prepare(self, context: Context) -> Any:
        """Everything about the context that all steps share, computed once; immutable."""
        return context


@runtime_checkable
class TrainableDenoiser(Denoiser, Protocol):
    """A denoiser that knows its own training objective."""

    @abstractmethod
    def draw_sigmas(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise levels (n,) of the training distribution."""
        ...

    @abstractmethod
    def loss(self, x0: Tensor, sigma: Tensor, noise: Tensor, context: Context) -> Tensor:
        """Weighted squared error (b,) of each sample."""
        ...


@runtime_checkable
class Guidance(Protocol):
    """How strongly does the condition act?"""

    @abstractmethod
    def guide(self, denoiser: Denoiser, branches: Mapping[str, Context]) -> Denoise:
        """Branches (``cond``, ``null``, ...) -> one guided ``(x, sigma) -> denoised``."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """How do we get from noise to data?"""

    @abstractmethod
    def sample(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        generator: torch.Generator | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """From x at sigmas[0] to x at sigmas[-1].

        Args:
            denoise: ``(x, sigma) -> denoised``.
            x: (b, c, h, w) in σ-space.
            sigmas: (steps + 1,), strictly decreasing; the last may be 0.
            generator: randomness of stochastic samplers.
            callback: told ``(step, denoised)`` after each step.
        """
        ...


# --- their helpers -----------------------------------------------------------------------------


@runtime_checkable
class Autoencoder(Protocol):
    """In which space do we diffuse?

    Both methods take tensors of any floating dtype, and return float32 (or float64) ones.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; float32 where there are none."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU where there are none."""
        return torch.device("cpu")

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] -> latents."""
        ...

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images in about [-1, 1]."""
        ...


@runtime_checkable
class Index(Protocol):
    """How do we find neighbors fast? Holds vectors in its own form, searches by cosine."""

    @abstractmethod
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Queries (b, d) of any norm -> similarity (b, k) and indices (b, k), nearest first."""
        ...


@runtime_checkable
class Schedule(Protocol):
    """Which noise levels, and how unit noise enters and a latent leaves σ-space."""

    @abstractmethod
    def sigmas(self, steps: int) -> Tensor:
        """Decreasing noise levels (steps + 1,), float64."""
        ...

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Unit noise -> x at sigmas[0]."""
        return noise * sigmas[0].to(noise)

    def finish(self, x: Tensor, sigmas: Tensor) -> Tensor:
        """From x at sigmas[-1] to the latent."""
        del sigmas
        return x
