"""A database in memory: embeddings with their records, for small data and for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from retrodiff.databases.digests import SHARD_ROWS, rows_digest, rows_hash
from retrodiff.databases.searchable import Searchable, show
from retrodiff.databases.storable import storable
from retrodiff.indexes import Recipe, Vectors
from retrodiff.interfaces import Fingerprint, Record
from retrodiff.pictures.thumbnails import to_float


class ArrayDatabase(Searchable):
    """Embeddings in memory, for small data and for tests.

    Args:
        embeddings: (m, d), raw scale; kept in float16, as on disk.
        fingerprint: of the encoder that made them.
        records: one per row; by default its number.
        images: one (c, h, w) per row, to be shown.
        index: recipe of the index; exact by default.

    Raises:
        ValueError: numbers of embeddings, records and images differ, the widths differ, or an
            embedding cannot be stored in float16.

    Examples:
        >>> import torch
        >>> from retrodiff import Fingerprint, Query
        >>> from retrodiff.databases import ArrayDatabase
        >>> made_by = Fingerprint(encoder="mine", weights="", preprocessing="none", dim=2)
        >>> database = ArrayDatabase(
        ...     torch.eye(2), made_by, [{"file": "a.png"}, {"file": "b.png"}]
        ... )
        >>> found = database.search(Query(torch.tensor([[0.9, 0.1]])), k=1)
        >>> database.records(found.indices[0])
        [{'file': 'a.png'}]
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
        self._recipe = index
        self._records = [dict(r) for r in records] if records is not None else None
        self._images = images

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self._recipe is not None:  # other libraries' indexes cannot be sent to another process
            del state["index"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "index" not in state:
            self.index = state["_recipe"].build(self.vectors)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what is known about every row."""
        if self._records is None:
            return ("number",)
        return tuple(dict.fromkeys(name for record in self._records for name in record))

    def records(self, indices: Tensor | Sequence[int]) -> list[Record]:
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
            return show(self.records([index])[0], None, anywhere=True)
        return to_float(self._images[int(self._checked([index]))]).expand(3, -1, -1)
