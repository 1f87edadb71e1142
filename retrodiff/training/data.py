"""What a model is trained on: images, their embeddings, and the row numbers of their neighbors.

Embeddings and row numbers are found once; with a folder for them they are mapped from files, and a
set of any size takes no memory for them.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.interfaces import Database, Encoder, Neighbors, Query, Retriever, TextEncoder
from retrodiff.model.checks import encoder_disagreement
from retrodiff.numbers import real, whole
from retrodiff.retrieval.neighbors import neighbor_table
from retrodiff.retrieval.table import tabulated
from retrodiff.training.augment import Augmentation, augmented
from retrodiff.training.captions import Captions, SearchedBy, listed
from retrodiff.training.conditions import Conditions, Search, Tables
from retrodiff.training.group_neighbors import Groups, groups_of
from retrodiff.training.images import Images, as_images, digest, embedded, pixels
from retrodiff.training.no_database import NoDatabase
from retrodiff.training.occasion import Occasion, Order
from retrodiff.training.overlap import needs_ids, own_rows, warn_of_copies
from retrodiff.training.pairing import Pairing
from retrodiff.training.prefetch import read_ahead
from retrodiff.training.reading import Reading


@dataclass(frozen=True, repr=False)
class TrainingSet:
    """Training images with their neighbors in a database, found once. Make one with `of`.

    Args:
        images: n images; a tensor (n, c, h, w), uint8 or floats in [-1, 1], will do.
        embeddings: of the images, (n, d), raw scale; or (n, r, d) for r regions.
        table: row numbers of their neighbors (n, k), or (n, r, k).
        database: D.
        pairing: which image is drawn from whose condition; None: each from its own.
        search: how neighbors are found; `of` knows it, and what looks for more needs it.
        per_step: neighbors are asked for at each step, by ``search``, and the table is empty.
        captions: text in place of images' own embeddings; see `captioned`.
        groups: neighbors from an image's own group; see `grouped`.
        tables: the neighbors of captions and groups.
        jitter: whether the number of neighbors varies; see `jittered`.
        augment: changes images; see `augmented`.
        latents: of D's pictures; see `seeing`.

    Raises:
        ValueError: the parts do not fit together.

    Examples:
        >>> import torch
        >>> from retrodiff.encoders import TimmEncoder
        >>> from retrodiff.databases import ArrayDatabase
        >>> from retrodiff.retrieval import NearestNeighbors
        >>> from retrodiff.training import TrainingSet
        >>> encoder = TimmEncoder("test_resnet", image_size=32)
        >>> pictures = torch.rand(24, 3, 32, 32) * 2 - 1
        >>> database = ArrayDatabase(encoder.encode_image(pictures[8:]), encoder.fingerprint)
        >>> data = TrainingSet.of(
        ...     pictures[:8], encoder, database, NearestNeighbors(), k=4, progress=False
        ... )
        >>> len(data), data.table.shape
        (8, torch.Size([8, 4]))
    """

    images: Images
    embeddings: Tensor
    table: Tensor
    database: Database
    pairing: Pairing | None = None
    search: Search | None = field(default=None, kw_only=True, repr=False)
    per_step: bool = field(default=False, kw_only=True)
    captions: Captions | None = field(default=None, kw_only=True, repr=False)
    groups: Groups | None = field(default=None, kw_only=True, repr=False)
    tables: Tables = field(default=Tables(), kw_only=True, repr=False)
    jitter: bool = field(default=False, kw_only=True)
    augment: tuple[Augmentation, ...] = field(default=(), kw_only=True)
    latents: Tensor | None = field(default=None, kw_only=True, repr=False)
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
        if self.per_step and self.search is None:
            raise ValueError("per_step=True needs a retriever: make the set with TrainingSet.of")
        if self.pairing is not None:
            self.pairing.check(len(self.images))

    def __repr__(self) -> str:
        parts = [f"{len(self.images)} images", f"k={self.k} of {self.database!r}"]
        if self.pairing is not None:
            parts.append(f"{len(self.pairing)} pairs")
        if self.per_step:
            parts.append("per_step")
        if self.captions is not None:
            parts.append(f"captions in modes {dict(self.captions.modes)}")
        if self.groups is not None:
            parts.append(f"{self.groups.share:g} of one {self.groups.column}")
        if self.jitter:
            parts.append("jittered")
        return f"TrainingSet({', '.join([*parts, *map(repr, self.augment)])})"

    def __len__(self) -> int:
        return len(self.images) if self.pairing is None else len(self.pairing)

    @property
    def k(self) -> int:
        """Neighbors of each image."""
        if self.per_step and self.search is not None:
            return self.search.k
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
        per_step: bool = False,
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
            per_step: ask the retriever again at each step, in place of once before training: one
                that draws, such as `RandomOfTop`, then gives other rows each time, and a step
                costs a search. What is drawn depends on seed and step alone.
            ids: (n,) rows of D that the images are, -1 where they are none. None: where the
                retriever needs them, the rows whose embedding is the image's own.
            cache: folder that keeps embeddings and row numbers as files, which are then mapped;
                later those of captions and groups, too.
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
        if ids is None and needs_ids(retriever):
            ids = own_rows(embeddings, database)
            if not bool((ids >= 0).any()):
                warnings.warn(
                    f"{type(retriever).__name__} leaves out rows that the training images are, but "
                    "none of them was found in the database: nothing is left out",
                    stacklevel=2,
                )
        if ids is not None and len(ids) != len(images):
            raise ValueError(
                f"{len(images)} training images, but {len(ids)} ids: give the row of the database "
                "that each is, -1 for none"
            )
        search = Search(retriever, k, None if ids is None else ids.long().cpu(), seed, folder)
        if per_step:
            table = torch.empty((*embeddings.shape[:-1], 0), dtype=torch.int32)
        else:
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
        made = cls(images, embeddings, table, database, search=search, per_step=per_step)
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

    @classmethod
    def alone(cls, images: Images | Any, embeddings: Tensor | None = None) -> TrainingSet:
        """Images without a database, for models that retrieve nothing.

        Args:
            images: n training images, as `of` takes them.
            embeddings: what conditions each (n, d), raw scale, such as the encoded name of its
                class; None: nothing does.
        """
        images = as_images(images)
        embeddings = torch.zeros(len(images), 1) if embeddings is None else embeddings
        table = torch.empty((len(embeddings), 0), dtype=torch.int32)
        return cls(images, embeddings, table, NoDatabase(embeddings.shape[-1]))

    def paired(self, pairing: Pairing | None) -> TrainingSet:
        """The same images, drawn from the conditions that a pairing gives them."""
        return self._with(pairing=pairing)

    def captioned(
        self,
        captions: Sequence[str | Sequence[str] | None],
        encoder: TextEncoder,
        *,
        modes: Mapping[Any, float],
        searched_by: SearchedBy = "image",
        neighbors_by_caption: float = 0.0,
        cache: str | Path | None = None,
        batch_size: int = 256,
        progress: bool = True,
    ) -> TrainingSet:
        """The same images, trained with their captions in the modes in which text is sampled.

        At each step an image is in one mode, as a sample is: ``neighbors`` (its k rows),
        ``text+neighbors`` (one of its captions, and k - 1 rows) or ``text`` (the caption alone).
        With `NeighborEmbeddings` the caption is one token of the set, as in Blattmann et al. 2022,
        section 3.3; with `PromptAndNeighbors` it is a stream of its own, as
        the query is in Sheynin et al. 2022.

        Args:
            captions: of each image: text, several texts, or None. Images without a caption are
                trained with neighbors alone, and counted in a warning.
            encoder: the one the database was built with.
            modes: the share of each mode, such as ``{"neighbors": 0.5, "text+neighbors": 0.4,
                "text": 0.1}``; their sum is 1.
            searched_by: ``image``: rows are the image's own neighbors; ``caption``: where a
                caption is used, they are the caption's, as they will be when sampling.
            neighbors_by_caption: share of the images in the mode ``neighbors`` whose rows are
                found for a caption, which is not shown: as those of a prompt are in this mode of
                sampling. Needs ``searched_by="caption"``.
            cache: folder that keeps the captions' embeddings; see `of`.
            batch_size: texts per call of the encoder.
            progress: show a bar.

        Raises:
            ValueError: the encoder takes no text or is not the database's, captions are not as
                many as images, none is there, or a share is wrong.
        """
        if self.embeddings.ndim != 2:
            raise ValueError(
                f"the training images have {self.embeddings.shape[1]} regions each, but a caption "
                "is of a whole image: train regions without captions"
            )
        texts = listed(captions, len(self.images))
        made = Captions.of(
            texts,
            encoder,
            self.database,
            modes,
            searched_by,
            neighbors_by_caption=neighbors_by_caption,
            path=None if cache is None else Path(cache).expanduser() / "captions.safetensors",
            batch_size=whole("batch_size", batch_size),
            progress=progress,
        )
        if silent := sum(not own for own in texts):
            warnings.warn(
                f"{silent} of {len(texts)} training images have no caption: they are trained with "
                "neighbors alone",
                stacklevel=2,
            )
        return self._with(captions=made)._completed(progress)

    def grouped(
        self,
        by: str,
        share: float,
        *,
        groups: Sequence[Any] | None = None,
        progress: bool = True,
    ) -> TrainingSet:
        """The same images, some of them with neighbors from their own group only, such as a style.

        A network that is shown pictures of one style, and draws that style, learns to take the
        style from the database. Retriever, k and the images' own rows are those of `of`.

        Args:
            by: column of the database, such as ``style``.
            share: of the images of a step whose neighbors come from their own group; the others
                have neighbors from the whole database.
            groups: group of each image, None: of none. Left out: the images are rows of the
                database, and have their rows' groups.
            progress: show a bar.

        Raises:
            ValueError: the groups of the images are not known, or one has too few rows.
        """
        search = self._searching("grouped")
        share = real("share", share, 0, 1)
        ids = search.ids
        if groups is None and ids is None and self.embeddings.ndim == 2:
            ids = own_rows(self.embeddings, self.database)
        own = groups_of(self.database, by, ids, groups, len(self.images))
        if groups is None and (unknown := sum(value is None for value in own)):
            warnings.warn(
                f"{unknown} of {len(own)} training images are no rows of the database, so their "
                f"{by} is not known: their neighbors come from the whole database",
                stacklevel=2,
            )
        made = Groups.of(self.database, by, own, share, search.k)
        return self._with(groups=made)._completed(progress)

    def jittered(self) -> TrainingSet:
        """The same images, each with a number of its neighbors that is drawn from 1 to k.

        The others are masked, so that a network that is sampled with fewer neighbors than it was
        trained with has seen such sets. A caption counts as the first of them.
        """
        return self._with(jitter=True)

    def seeing(self, latents: Tensor) -> TrainingSet:
        """The same images; a conditioner that sees the neighbors' pictures finds them in a table.

        Without it the pictures of a step's neighbors are read and encoded at every step.

        Args:
            latents: (rows of D, c, h, w), of any floating type, such as
                ``encoded_pictures(torch.arange(len(D)), D, autoencoder, shape)``.

        Raises:
            ValueError: D has another number of rows.
        """
        if latents.ndim != 4 or len(latents) != len(self.database):
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, but the database has "
                f"{len(self.database)} rows: give (rows, c, h, w)"
            )
        return self._with(latents=latents)

    def augmented(self, *augment: Augmentation) -> TrainingSet:
        """The same images, changed each time by what does not leak into samples.

        Embeddings and neighbors stay those of the picture as it is. See `Mirrored` and `Moved`.

        Args:
            augment: one after the other.
        """
        return self._with(augment=tuple(augment))

    def batch(
        self, rows: Tensor, k: int | None = None, occasion: Occasion | None = None
    ) -> tuple[Tensor, Query, Neighbors]:
        """Images, queries and the first k neighbors of some rows (of some pairs).

        Args:
            rows: (b,) of images, or of pairs.
            k: neighbors of each; None: all.
            occasion: when they are used, which decides on captions, groups, the number of neighbors
                and augmentation. None: none of these, as for a validation.
        """
        images = pixels(self.images, self._targets(rows))
        if self.augment and occasion is not None:
            images = augmented(self.augment, images, occasion.randomness("augment"))
        return images, *self._conditions(rows, k, occasion)

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
        reading = Reading(self.images, targets, order, self.augment)
        images = read_ahead(reading, steps, workers)
        return self._joined(images, order, steps, k)

    def _joined(
        self, images: Iterator[Tensor], order: Order, steps: range, k: int | None
    ) -> Iterator[tuple[Tensor, Query, Neighbors]]:
        try:
            for step in steps:
                rows = order.mine(self.rows_at(step, order.batch_size, order.seed))
                yield next(images), *self._conditions(rows, k, order.occasion(step))
        finally:
            images.close()  # type: ignore[attr-defined]

    def _targets(self, rows: Tensor) -> Tensor:
        return rows if self.pairing is None else self.pairing.target[rows]

    def _conditions(
        self, rows: Tensor, k: int | None, occasion: Occasion | None
    ) -> tuple[Query, Neighbors]:
        asking = rows if self.pairing is None else self.pairing.condition[rows]
        conditions = Conditions(
            self.embeddings,
            self.table,
            self.database,
            self.search if self.per_step else None,
            self.tables,
            self.captions,
            self.groups,
            self.jitter,
            self.latents,
        )
        return conditions.of(asking, k, occasion)

    def _with(self, **changed: Any) -> TrainingSet:
        made = replace(self, **changed)
        object.__setattr__(made, "made_from", self.made_from)
        return made

    def _searching(self, method: str) -> Search:
        if self.search is None:
            raise ValueError(
                f"{method} looks for neighbors, but this training set knows no retriever: make it "
                "with TrainingSet.of"
            )
        return self.search

    def _completed(self, progress: bool) -> TrainingSet:
        """With the tables of neighbors that captions and groups need and that are missing."""
        by_caption = self.captions is not None and self.captions.searched_by == "caption"
        if self.per_step or (self.groups is None and not by_caption):
            return self
        search = self._searching("captioned(searched_by='caption')")
        tables = self.tables.completed(
            search, self.embeddings, self.database, self.captions, self.groups, progress
        )
        return self._with(tables=tables)

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
            "per_step": self.per_step or None,
            "captions": None if self.captions is None else self.captions.describe(),
            "groups": None if self.groups is None else self.groups.describe(),
            "jitter": self.jitter or None,
            "latents": None if self.latents is None else list(self.latents.shape),
            "augment": [re.sub(r" at 0x[0-9a-f]+", "", repr(one)) for one in self.augment] or None,
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
        nearest = self._conditions(rows, 1, None)[1].embeddings[:, 0]
        warn_of_copies(self.embeddings[rows], nearest, stacklevel + 1)


def _hash(values: Tensor) -> str:
    found = hashlib.sha256(f"{tuple(values.shape)} {values.dtype}".encode())
    for part in values.detach().split(4096):
        found.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]
