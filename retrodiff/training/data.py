"""What a model is trained on: images, their embeddings, and the row numbers of their neighbors.

Embeddings and row numbers are found once; with a folder for them they are mapped from files, and a
set of any size takes no memory for them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from retrodiff.interfaces import Database, Encoder, Neighbors, Query, Retriever
from retrodiff.retrieval.neighbors import neighbor_table
from retrodiff.retrieval.table import tabulated


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
        embeddings: theirs (n, d), raw scale; or (n, r, d) for r regions.
        table: row numbers of their neighbors (n, k), or (n, r, k).
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
        cache: str | Path | None = None,
        batch_size: int = 256,
        seed: int = 0,
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
            cache: folder that keeps embeddings and row numbers as files, which are then mapped.
                What is there already is used, and what was begun is continued; the images must be
                the same each time they are read. None: in memory.
            batch_size: images per pass of the encoder.
            seed: of retrievers that draw.
            progress: show a bar.

        Raises:
            ValueError: the folder keeps those of other images, or of another encoder, database,
                retriever or k.
        """
        folder = None if cache is None else Path(cache)
        embeddings = tabulated(
            lambda start, stop: encoder.encode_image(images[torch.arange(start, stop)]),
            (len(images), encoder.dim),
            torch.float32,
            batch_size=batch_size,
            what="embedding",
            progress=progress,
            path=None if folder is None else folder / "embeddings.safetensors",
            about=None if folder is None else _about(images, encoder),
            resume=True,
        )
        table = neighbor_table(
            Query(embeddings, ids=ids),
            database,
            k,
            retriever,
            path=None if folder is None else folder / "neighbors.safetensors",
            resume=True,
            seed=seed,
            progress=progress,
        )
        return cls(images, embeddings, table, database)

    def batch(self, rows: Tensor, k: int | None = None) -> tuple[Tensor, Query, Neighbors]:
        """Images, queries and the first k neighbors of some rows."""
        indices = self.table[rows][..., :k].long()
        query = Query(self.embeddings[rows])
        found = self.database.embeddings(indices)
        similarity = torch.cosine_similarity(query.embedding.unsqueeze(-2), found, dim=-1)
        return self.images[rows], query, Neighbors(indices, similarity, found)

    def rows_at(self, step: int, batch_size: int, seed: int) -> Tensor:
        """The rows (b,) of a training step: epochs of a shuffle, a function of the step alone."""
        n = len(self)
        positions = torch.arange(step * batch_size, (step + 1) * batch_size)
        epochs = positions // n
        rows = torch.empty_like(positions)
        for epoch in epochs.unique().tolist():
            shuffled = _shuffled(n, seed + epoch)
            here = epochs == epoch
            rows[here] = shuffled[positions[here] % n]
        return rows


@lru_cache(2)  # a step looks at one epoch, or at two: nothing is shuffled twice
def _shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _about(images: Images, encoder: Encoder, looked_at: int = 16) -> dict[str, object]:
    """What embeddings depend on: the encoder, and the images by some of them."""
    rows = torch.linspace(0, len(images) - 1, min(looked_at, len(images))).long()
    pixels = images[rows].detach().float().cpu().contiguous().numpy()
    return {
        **{f"encoder.{name}": value for name, value in vars(encoder.fingerprint).items()},
        "images": hashlib.sha256(pixels.data).hexdigest()[:32],
    }
