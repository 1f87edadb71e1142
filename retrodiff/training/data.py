"""What a model is trained on: images, their embeddings, and the row numbers of their neighbors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from retrodiff.interfaces import Database, Encoder, Neighbors, Query, Retriever
from retrodiff.progress import progress_bar
from retrodiff.retrieval.neighbors import neighbor_table


class Images(Protocol):
    """Training images: any sequence that gives several at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Row numbers (b,) -> images (b, c, h, w) in [-1, 1]."""
        ...


@dataclass(frozen=True)
class TrainingSet:
    """X with its neighbors in D, found once before training. Make one with `of`.

    Args:
        images: n images; a float tensor (n, c, h, w) in [-1, 1] will do.
        embeddings: theirs (n, d), raw scale.
        table: row numbers of their neighbors (n, k).
        database: D.
    """

    images: Images
    embeddings: Tensor
    table: Tensor
    database: Database

    def __post_init__(self) -> None:
        counts = {len(self.images), len(self.embeddings), len(self.table)}
        if len(counts) != 1:
            raise ValueError(
                f"{len(self.images)} images, {len(self.embeddings)} embeddings and "
                f"{len(self.table)} rows of neighbors: there must be as many of each"
            )

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def of(
        cls,
        images: Images,
        encoder: Encoder,
        database: Database,
        retriever: Retriever,
        k: int,
        *,
        ids: Tensor | None = None,
        batch_size: int = 256,
        progress: bool = True,
    ) -> TrainingSet:
        """Embeds the images and looks their neighbors up.

        Args:
            images: n training images.
            encoder: the one the database was built with.
            database: D.
            retriever: which neighbors; wrap it in `ExcludeSelf` where images are rows of D.
            k: neighbors per image.
            ids: (n,) rows of D that the images are, -1 where they are none.
            batch_size: images per pass of the encoder.
            progress: show a bar.
        """
        parts: list[Tensor] = []
        with progress_bar(len(images), "embedding", progress) as bar:
            for start in range(0, len(images), batch_size):
                rows = torch.arange(start, min(start + batch_size, len(images)))
                parts.append(encoder.encode_image(images[rows]).cpu())
                bar.update(len(rows))
        embeddings = torch.cat(parts)
        query = Query(embeddings, ids=ids)
        table = neighbor_table(query, database, k, retriever, progress=progress)
        return cls(images, embeddings, table, database)

    def batch(self, rows: Tensor, k: int | None = None) -> tuple[Tensor, Query, Neighbors]:
        """Images, queries and the first k neighbors of some rows."""
        indices = self.table[rows, :k]
        query = Query(self.embeddings[rows])
        found = self.database.embeddings(indices)
        similarity = torch.cosine_similarity(query.embedding.unsqueeze(1), found, dim=-1)
        return self.images[rows], query, Neighbors(indices, similarity, found)

    def rows_at(self, step: int, batch_size: int, seed: int) -> Tensor:
        """The rows (b,) of a training step: epochs of a shuffle, a function of the step alone."""
        n = len(self)
        positions = torch.arange(step * batch_size, (step + 1) * batch_size)
        epochs = positions // n
        rows = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch))
            here = epochs == epoch
            rows[here] = shuffled[positions[here] % n]
        return rows
