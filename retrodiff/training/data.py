"""What a model is trained on: images, their embeddings, and the row numbers of their neighbors.

Embeddings and row numbers are found once; with a folder for them they are mapped from files, and a
set of any size takes no memory for them.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.components import inside
from retrodiff.interfaces import Database, Encoder, Neighbors, Query, Retriever
from retrodiff.model.checks import encoder_disagreement
from retrodiff.numbers import whole
from retrodiff.retrieval import ExcludeGroup, ExcludeSelf
from retrodiff.retrieval.neighbors import neighbor_table
from retrodiff.retrieval.table import tabulated
from retrodiff.training.images import Images, as_images, digest, embedded, pixels
from retrodiff.training.occasion import Order
from retrodiff.training.pairing import Pairing
from retrodiff.training.prefetch import read_ahead
from retrodiff.training.reading import Reading

SAME = 1e-6
"""1 - cosine up to which a database row and an image are the same picture: float16 rounds by less,
two photographs are further apart."""


@dataclass(frozen=True)
class TrainingSet:
    """X with its neighbors in D, found once before training. Make one with `of`.

    Args:
        images: n images; a tensor (n, c, h, w), uint8 or floats in [-1, 1], will do.
        embeddings: theirs (n, d), raw scale; or (n, r, d) for r regions.
        table: row numbers of their neighbors (n, k), or (n, r, k).
        database: D.
        pairing: which image is drawn from whose condition; None: each from its own.

    Raises:
        ValueError: the parts do not fit together.
    """

    images: Images
    embeddings: Tensor
    table: Tensor
    database: Database
    pairing: Pairing | None = None
    made_from: Mapping[str, Any] | None = field(default=None, init=False, repr=False)
    """What `of` computed embeddings and table from; None where they were given."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", as_images(self.images))
        counts = {len(self.images), len(self.embeddings), len(self.table)}
        if len(counts) != 1:
            raise ValueError(
                f"{len(self.images)} images, {len(self.embeddings)} embeddings and "
                f"{len(self.table)} rows of neighbors: there must be as many of each"
            )
        shapes = tuple(self.embeddings.shape), tuple(self.table.shape)
        if len(shapes[0]) not in (2, 3) or shapes[0][:-1] != shapes[1][:-1]:
            raise ValueError(
                f"embeddings have shape {shapes[0]} and neighbors {shapes[1]}: give (n, d) and "
                "(n, k), or (n, r, d) and (n, r, k) for r regions"
            )
        if self.table.is_floating_point():
            raise ValueError(f"the neighbors are {self.table.dtype}: give row numbers")
        width = self.database.fingerprint.dim
        if shapes[0][-1] != width:
            raise ValueError(
                f"the embeddings are {shapes[0][-1]} wide, but the database's dim={width}: use the "
                "encoder it was built with"
            )
        if self.pairing is not None:
            self.pairing.check(len(self.images))

    def __len__(self) -> int:
        return len(self.images) if self.pairing is None else len(self.pairing)

    @property
    def k(self) -> int:
        """Neighbors kept for each image."""
        return self.table.shape[-1]

    @classmethod
    def of(
        cls,
        images: Images | Any,
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

        Where images turn out to be rows of the database themselves, one warning says so: a network
        that always finds the image among its neighbors learns to copy.

        Args:
            images: n training images: `FolderImages`, a tensor, or a list of pictures.
            encoder: the one the database was built with.
            database: D.
            retriever: which neighbors; wrap it in `ExcludeSelf` where images are rows of D.
            k: neighbors per image.
            ids: (n,) rows of D that the images are, -1 where they are none. None: where the
                retriever needs them, the rows whose embedding is the image's own.
            cache: folder that keeps embeddings and row numbers as files, which are then mapped.
                What is there already is used, and what was begun is continued; the images must be
                the same each time they are read. None: in memory.
            batch_size: images per pass of the encoder.
            seed: of retrievers that draw.
            progress: show a bar.

        Raises:
            ValueError: the encoder is not the database's, an image is not finite; or the folder
                keeps those of other images, or of another encoder, database, retriever or k.
        """
        images = as_images(images)
        k, batch_size, seed = whole("k", k), whole("batch_size", batch_size), whole("seed", seed, 0)
        if (line := encoder_disagreement(encoder, database)) is not None:
            raise ValueError(line)
        folder = None if cache is None else Path(cache).expanduser()
        about = {f"encoder.{k}": v for k, v in vars(encoder.fingerprint).items()}
        embeddings = tabulated(
            lambda start, stop: embedded(images, encoder, torch.arange(start, stop)),
            (len(images), encoder.dim),
            torch.float32,
            batch_size=batch_size,
            what="embedding",
            progress=progress,
            path=None if folder is None else folder / "embeddings.safetensors",
            about=None if folder is None else {**about, "images": digest(images)},
            resume=True,
        )
        if ids is None and _needs_ids(retriever):
            ids = own_rows(embeddings, database)
            if not bool((ids >= 0).any()):
                warnings.warn(
                    f"{type(retriever).__name__} leaves out rows that the training images are, but "
                    "none of them was found in the database: nothing is left out",
                    stacklevel=2,
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
        made = cls(images, embeddings, table, database)
        about = {
            "encoder": dict(vars(encoder.identity)),
            "retriever": re.sub(r" at 0x[0-9a-f]+", "", repr(retriever)),
            "retriever_seed": seed,
            "neighbors": k,
            "ids": None if ids is None else _hash(ids.long()),
        }
        object.__setattr__(made, "made_from", about)
        made.warn_of_copies(stacklevel=3)
        return made

    def paired(self, pairing: Pairing | None) -> TrainingSet:
        """The same images, drawn from the conditions that a pairing gives them."""
        made = replace(self, pairing=pairing)
        object.__setattr__(made, "made_from", self.made_from)
        return made

    def batch(self, rows: Tensor, k: int | None = None) -> tuple[Tensor, Query, Neighbors]:
        """Images, queries and the first k neighbors of some rows (of some pairs)."""
        return pixels(self.images, self._targets(rows)), *self._conditions(rows, k)

    def batches(
        self,
        start: int,
        stop: int,
        *,
        batch_size: int,
        seed: int,
        part: tuple[int, int] = (0, 1),
        k: int | None = None,
        workers: int = 0,
    ) -> Iterator[tuple[Tensor, Query, Neighbors]]:
        """Images, queries and neighbors of the steps from ``start`` up to ``stop``, in order.

        What a step gets depends on seed and step alone: a training that is continued sees what it
        would have seen, and any number of workers gives the same bits. Close the iterator to end
        its workers early; at its end, or where it raises, they are ended.

        Args:
            start: the first step.
            stop: the step after the last one.
            batch_size: images of a step, of all processes together.
            seed: of the training.
            part: number of this process, and how many there are; each gets an equal part, in
                order, and reads no more than that.
            k: neighbors of each image; None: all that are kept.
            workers: processes that read images ahead; 0: they are read when they are asked for.

        Raises:
            ValueError: a number is out of range, or an image cannot be read.
            ChildProcessError: a worker was killed; the message says what it was reading.
        """
        start, stop = whole("start", start, 0), whole("stop", stop, 0)
        workers = whole("workers", workers, 0)
        order = Order(len(self), batch_size, seed, part)
        steps = range(start, stop)
        targets = None if self.pairing is None else self.pairing.target
        images = read_ahead(Reading(self.images, targets, order), steps, workers)
        return self._joined(images, order, steps, k)

    def _joined(
        self, images: Iterator[Tensor], order: Order, steps: range, k: int | None
    ) -> Iterator[tuple[Tensor, Query, Neighbors]]:
        try:
            for step in steps:
                rows = order.mine(self.rows_at(step, order.batch_size, order.seed))
                yield next(images), *self._conditions(rows, k)
        finally:
            images.close()  # type: ignore[attr-defined]

    def _targets(self, rows: Tensor) -> Tensor:
        return rows if self.pairing is None else self.pairing.target[rows]

    def _conditions(self, rows: Tensor, k: int | None) -> tuple[Query, Neighbors]:
        asking = rows if self.pairing is None else self.pairing.condition[rows]
        indices = self.table[asking][..., :k].long()
        query = Query(self.embeddings[asking])
        found = self.database.embeddings(indices)
        similarity = torch.cosine_similarity(query.embedding.unsqueeze(-2), found, dim=-1)
        return query, Neighbors(indices, similarity, found)

    def rows_at(self, step: int, batch_size: int, seed: int) -> Tensor:
        """The rows (b,) of a training step: epochs of a shuffle, a function of the step alone."""
        return Order(len(self), batch_size, seed).rows(step)

    def describe(self) -> dict[str, Any]:
        """What must be the same when a training is continued, as JSON-able values.

        Embeddings that `of` computed are described by what they were computed from, since another
        processor gives other last digits.
        """
        made = self.made_from
        if made is None:
            made = {"embeddings": _hash(self.embeddings), "table": _hash(self.table.long())}
        return {
            "images": digest(self.images),
            "count": len(self.images),
            "database": dict(vars(self.database.fingerprint)),
            "pairing": None if self.pairing is None else self.pairing.digest(),
            **made,
        }

    def warn_of_copies(self, looked_at: int = 1024, stacklevel: int = 2) -> None:
        """Warns once where images are the nearest neighbors of themselves.

        Args:
            looked_at: images that are compared, evenly spaced.
            stacklevel: of the warning.
        """
        if self.embeddings.ndim != 2 or not self.k:
            return
        n = len(self.images)
        rows = torch.linspace(0, n - 1, min(looked_at, n)).long()
        nearest = self.database.embeddings(self.table[rows][:, 0].long())
        same = int(_same(self.embeddings[rows], nearest).sum())
        if same:
            warnings.warn(
                f"{same} of {len(rows)} training images are rows of the database themselves, each "
                "its own nearest neighbor, so the network learns to copy: leave them out, wrap the "
                "retriever in ExcludeSelf (--exclude-self), where the database holds copies of "
                "them in ExcludeDuplicates, or use a database of other images",
                stacklevel=stacklevel,
            )


def own_rows(embeddings: Tensor, database: Database, batch_size: int = 1024) -> Tensor:
    """Rows of the database (n,) that images are themselves, -1 where they are none.

    A row is an image's own if it is nearest to it and has the same embedding, up to rounding.

    Args:
        embeddings: (n, d), made with the database's encoder.
        database: D.
        batch_size: images per search.
    """
    found: list[Tensor] = []
    for part in embeddings.split(batch_size):
        nearest = database.search(Query(part), 1)
        own = nearest.indices[:, 0].cpu()
        found.append(torch.where(_same(part, nearest.embeddings[:, 0]), own, -1))
    return torch.cat(found)


def _same(one: Tensor, other: Tensor) -> Tensor:
    one, other = one.double().cpu(), other.double().cpu()
    return 1 - torch.cosine_similarity(one, other, dim=-1) <= SAME


def _needs_ids(retriever: Retriever) -> bool:
    return any(isinstance(part, (ExcludeSelf, ExcludeGroup)) for part in inside(retriever))


def _hash(values: Tensor) -> str:
    found = hashlib.sha256(f"{tuple(values.shape)} {values.dtype}".encode())
    for part in values.detach().split(4096):
        found.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]
