"""Roles of retrieval: encoders, databases, retrievers, proposal distributions, indexes, priors."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from retrodiff.interfaces.values import Fingerprint, Neighbors, Query, Record


@runtime_checkable
class Encoder(Protocol):
    """Maps images to embeddings (φ in the paper).

    Three members must be written; the rest has defaults, and what wraps an encoder forwards it.

    Examples:
        >>> import torch
        >>> from retrodiff import Encoder, Fingerprint
        >>> class MeanColor(Encoder):
        ...     dim = 3
        ...     fingerprint = Fingerprint(
        ...         encoder="mean-color", weights="", preprocessing="none", dim=3
        ...     )
        ...
        ...     def encode_image(self, images):
        ...         return images.float().mean((2, 3))
        >>> MeanColor().encode_image(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 3])
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
    """Maps images and text to embeddings in one space.

    Examples:
        >>> import torch
        >>> from retrodiff import Fingerprint, TextEncoder
        >>> class Lengths(TextEncoder):
        ...     # Places a prompt by its number of letters; only to show the methods.
        ...     dim = 2
        ...     fingerprint = Fingerprint(
        ...         encoder="lengths", weights="", preprocessing="none", dim=2
        ...     )
        ...
        ...     def encode_image(self, images):
        ...         return torch.ones(len(images), 2)
        ...
        ...     def encode_text(self, prompts):
        ...         return torch.tensor([[float(len(text)), 1.0] for text in prompts])
        >>> Lengths().encode_text(["a door", "a tree"]).tolist()
        [[6.0, 1.0], [6.0, 1.0]]
    """

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> embeddings (b, d), raw scale."""
        ...


@runtime_checkable
class Database(Protocol):
    """Rows of embeddings with a record of where each comes from (D). It does not change.

    Examples:
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.testing import small_database
        >>> database = small_database(rows=32, dim=8)
        >>> found = database.search(Query(database.embeddings(torch.tensor([5]))), k=3)
        >>> found.indices[0, 0].item(), database.records(torch.tensor([5]))
        (5, [{'file': '5.png', 'label': '1'}])
    """

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
    """Chooses k rows of a database for each query (ξ_k).

    Examples:
        >>> from retrodiff import Retriever
        >>> class Reversed(Retriever):
        ...     # The k nearest, the farthest of them first.
        ...     def retrieve(self, query, database, k):
        ...         found = database.search(query, k)
        ...         return found.take(torch.arange(k - 1, -1, -1))
        >>> import torch
        >>> from retrodiff import Query
        >>> from retrodiff.testing import small_database
        >>> found = Reversed().retrieve(Query(torch.randn(2, 8)), small_database(), k=4)
        >>> found.indices.shape
        torch.Size([2, 4])
    """

    @abstractmethod
    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        """Some k rows of the database for each query.

        A retriever that draws at random takes its numbers from
        ``retrodiff.randomness.uniform(query.generator, shape)``, so that what a query gets does not
        depend on the others of its batch.
        """
        ...


@runtime_checkable
class ProposalDistribution(Protocol):
    """Distribution over database rows used as queries in unconditional sampling (p_D).

    Examples:
        >>> import torch
        >>> from retrodiff import ProposalDistribution, Query
        >>> from retrodiff.randomness import uniform
        >>> from retrodiff.testing import check_proposal, small_database
        >>> class FirstHalf(ProposalDistribution):
        ...     # The rows of the first half, all alike.
        ...     def support(self, database):
        ...         rows = torch.arange(len(database) // 2)
        ...         return rows, torch.ones(len(rows), dtype=torch.float64)
        ...
        ...     def propose(self, database, n, generator):
        ...         rows, _ = self.support(database)
        ...         chosen = rows[(uniform(generator, (n,)) * len(rows)).long()]
        ...         return Query(database.embeddings(chosen), ids=chosen, generator=generator)
        >>> check_proposal(FirstHalf(), small_database())
    """

    @abstractmethod
    def support(self, database: Database) -> tuple[Tensor, Tensor]:
        """The rows that may be drawn (n,) int64 and their positive weights (n,) float64."""
        ...

    @abstractmethod
    def propose(self, database: Database, n: int, generator: torch.Generator) -> Query:
        """Pseudo-queries (n,) drawn from the database.

        Args:
            database: whose rows are drawn.
            n: queries to draw.
            generator: best a `Randomness` of n rows; draw with ``retrodiff.randomness.uniform``, so
                that query i does not depend on n.
        """
        ...


@runtime_checkable
class Index(Protocol):
    """Searches vectors by cosine, in a form of its own.

    Examples:
        >>> import torch
        >>> from retrodiff import Index
        >>> class Brute(Index):
        ...     def __init__(self, rows):
        ...         self.rows = torch.nn.functional.normalize(rows, dim=-1)
        ...     def search(self, queries, k):
        ...         cosines = torch.nn.functional.normalize(queries, dim=-1) @ self.rows.T
        ...         return cosines.topk(k)
        >>> rows = torch.randn(50, 8)
        >>> similarity, found = Brute(rows).search(rows[:2], k=3)
        >>> found[:, 0].tolist()
        [0, 1]
    """

    @abstractmethod
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Queries (b, d) of any norm -> similarity (b, k) and indices (b, k), nearest first."""
        ...


@runtime_checkable
class Prior(Protocol):
    """Turns embeddings of text into embeddings of images that it may describe (unCLIP's prior).

    Examples:
        >>> import torch
        >>> from retrodiff import Prior
        >>> class Shifted(Prior):
        ...     # Adds the mean difference of image and text embeddings.
        ...     def __init__(self, shift):
        ...         self.shift = shift
        ...
        ...     def translate(self, embedding, generator=None):
        ...         return embedding + self.shift
        >>> Shifted(torch.ones(4)).translate(torch.zeros(2, 4)).shape
        torch.Size([2, 4])
    """

    @abstractmethod
    def translate(self, embedding: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Embeddings of prompts (b, d), raw scale -> embeddings (b, d), raw scale.

        Args:
            embedding: as `TextEncoder.encode_text` gave them.
            generator: randomness of priors that draw, best a `Randomness` of b rows.
        """
        ...
