"""Databases that own no files: in memory, and chosen rows of another one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from retrodiff.databases.digests import SHARD_ROWS, rows_digest, rows_hash
from retrodiff.databases.searchable import Searchable, show
from retrodiff.indexes import Recipe, Vectors
from retrodiff.indexes.vectors import row_norms
from retrodiff.interfaces import Fingerprint, Record
from retrodiff.pictures.thumbnails import to_float

STRAY = 0.01
"""How far a stored row may lie from the one that was given, as a fraction of its norm."""


class ArrayDatabase(Searchable):
    """Embeddings in memory, for small data and for tests.

    Args:
        embeddings: (m, d), raw scale; kept in float16, as on disk.
        fingerprint: of the encoder that made them.
        records: one per row; by default its number.
        images: one (c, h, w) per row, to be shown.
        index: recipe of the index; exact by default.
    """

    def __init__(
        self,
        embeddings: Tensor,
        fingerprint: Fingerprint,
        records: Sequence[Mapping[str, Any]] | None = None,
        *,
        images: Tensor | Sequence[Tensor] | None = None,
        index: Recipe | None = None,
    ):
        for name, values in (("records", records), ("images", images)):
            if values is not None and len(values) != len(embeddings):
                raise ValueError(
                    f"{len(embeddings)} embeddings, but {len(values)} {name}: give one for each"
                )
        stored, norms = storable(embeddings, fingerprint.encoder, lambda row: f"row {row}")
        vectors = Vectors([stored], [norms])
        digests = [rows_digest(part) for part in stored.split(SHARD_ROWS) if len(part)]
        fingerprint = replace(fingerprint, rows=rows_hash(digests))
        super().__init__(vectors, fingerprint, index.build(vectors) if index else None)
        self._records = [dict(r) for r in records] if records is not None else None
        self._images = images

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what is known about every row."""
        if self._records is None:
            return ("number",)
        return tuple(dict.fromkeys(name for record in self._records for name in record))

    def records(self, indices: Tensor) -> list[Record]:
        """Row numbers (n,) -> their metadata, in that order."""
        rows = self._checked(indices).tolist()
        if self._records is None:
            return [{"number": row} for row in rows]
        return [self._records[row] for row in rows]

    def table(self, columns: Sequence[str] | None = None) -> Any:
        """The records of all rows as a pyarrow table, in their order."""
        import pyarrow as pa

        records = self.records(torch.arange(len(self)))
        names = self.columns if columns is None else columns
        return pa.table({name: pa.array([r.get(name) for r in records]) for name in names})

    def image(self, index: int) -> Tensor:
        """The picture of a row, to be shown: (3, h, w) in [-1, 1]."""
        if self._images is None:
            return show(self.records(torch.tensor([index]))[0], None, anywhere=True)
        return to_float(self._images[index]).expand(3, -1, -1)


class Subset(Searchable):
    """Chosen rows of a database, numbered anew; nothing is copied.

    Args:
        database: whose rows.
        rows: (m,) row numbers there, in the order they shall have here.
    """

    def __init__(self, database: Searchable, rows: Tensor):
        self.database = database
        self.rows = database._checked(rows)
        digest = hashlib.sha256(database.fingerprint.rows.encode())
        digest.update(self.rows.numpy().tobytes())
        fingerprint = replace(database.fingerprint, rows=digest.hexdigest()[:32])
        super().__init__(database.vectors.select(database.stored(self.rows)), fingerprint)

    def __reduce__(self) -> Any:
        return type(self), (self.database, self.rows)  # the vectors are those of the database

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what is known about every row."""
        return self.database.columns

    def records(self, indices: Tensor) -> list[Record]:
        """Row numbers (n,) -> their metadata, in that order."""
        return self.database.records(self.rows[self._checked(indices)])

    def table(self, columns: Sequence[str] | None = None) -> Any:
        """The records of all rows as a pyarrow table, in their order."""
        return self.database.table(columns).take(self.rows.numpy())

    def image(self, index: int) -> Tensor:
        """The picture of a row, to be shown: (3, h, w) in [-1, 1]."""
        return self.database.image(int(self.rows[index]))


class GatheredVectors(Vectors):
    """Rows that lie elsewhere: a subclass knows `rows` and a length, blocks are gathered so."""

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row, stored values (n, d) and norms (n,), at most ``size`` rows at a time."""
        for start in range(0, len(self), size):
            block = self.rows(torch.arange(start, min(start + size, len(self))))
            yield start, block, row_norms(block)


def storable(embeddings: Tensor, encoder: str, name: Callable[[int], str]) -> tuple[Tensor, Tensor]:
    """Embeddings as they are stored, refused if float16 cannot hold them.

    Numbers above 65504 overflow. Below 6e-5 float16 loses digits, below 3e-8 everything: a row
    that is so small that this changes its direction by more than `STRAY` is refused. A row of
    zeros stays one.

    Args:
        embeddings: (n, d).
        encoder: who made them.
        name: row number -> what that row is called in an error.

    Returns:
        The embeddings (n, d) in float16, and the norms (n,) of these stored values.
    """
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings are {embeddings.dtype} of shape {tuple(embeddings.shape)}, "
            "expected floats (m, d)"
        )
    embeddings = embeddings.detach().cpu()
    stored = embeddings.to(torch.float16)
    norms = row_norms(stored)  # one pass over the rows serves both: a norm is finite iff its row is
    if not bool(norms.isfinite().all()):
        row = int((~norms.isfinite()).nonzero()[0, 0])
        what = "NaN or infinity" if not embeddings[row].isfinite().all() else "more than 65504"
        raise ValueError(
            f"the embedding of {name(row)} by {encoder} holds {what}: leave it out, or look at the "
            "encoder's weights and precision"
        )
    small = (norms < STRAY**-1 * 2.0**-25 * embeddings.shape[1] ** 0.5).nonzero().flatten()
    if len(small):
        given = embeddings[small].double()
        largest = (
            given.abs().amax(1, keepdim=True).clamp_min(5e-324)
        )  # so that no square underflows
        lost = (stored[small].double() - given) / largest
        stray = lost.norm(dim=1) > STRAY * (given / largest).norm(dim=1)
        if bool(stray.any()):
            row = int(small[stray][0])
            norm = float(embeddings[row].double().norm())
            raise ValueError(
                f"the embedding of {name(row)} by {encoder} has norm {norm:.3g}, too small for the "
                "float16 that rows are stored in: multiply all embeddings by one number (which "
                "leaves the cosine as it is), or look at the encoder's weights"
            )
    return stored, norms
