"""What conditions each image of a training step: its query, and its neighbors or a caption's.

Row numbers come from tables that were made before training, or are asked for at each step.
Everything drawn belongs to the image's occasion, so that it depends on seed and step alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.disk.files import plain_json
from retrodiff.interfaces import Database, Neighbors, Query, Randomness, Retriever
from retrodiff.randomness import uniform
from retrodiff.retrieval.neighbors import neighbor_table
from retrodiff.training.captions import WITH_TEXT, Captions
from retrodiff.training.group_neighbors import Groups
from retrodiff.training.occasion import Occasion


@dataclass(frozen=True, eq=False)
class Search:
    """How the neighbors of training images are found.

    Args:
        retriever: which ones.
        k: neighbors of each.
        ids: (n,) rows of the database that the images are, -1 where they are none; None: unknown.
        seed: of retrievers that draw, for tables.
        folder: keeps the tables of captions and groups; None: in memory.
    """

    retriever: Retriever
    k: int
    ids: Tensor | None
    seed: int = 0
    folder: Path | None = None

    def file(self, of: str, described: Any) -> Path | None:
        """The file of a table, named by what it is of."""
        if self.folder is None:
            return None
        known = hashlib.sha256(json.dumps(plain_json(described)).encode()).hexdigest()[:12]
        return self.folder / f"neighbors-{of}-{known}.safetensors"

    def ids_of(self, rows: Tensor) -> Tensor | None:
        """Those of some images."""
        return None if self.ids is None else self.ids[rows]


@dataclass(frozen=True, eq=False)
class Tables:
    """Row numbers of neighbors; None where there are none of a kind.

    Args:
        captions: (m, k) of each caption.
        own: (n, k) of each image, from its own group.
        captions_own: (m, k) of each caption, from the group of its image.
    """

    captions: Tensor | None = None
    own: Tensor | None = None
    captions_own: Tensor | None = None

    def completed(
        self,
        search: Search,
        embeddings: Tensor,
        database: Database,
        captions: Captions | None,
        groups: Groups | None,
        progress: bool,
    ) -> Tables:
        """With the tables that captions and groups need and that are missing.

        Args:
            search: how neighbors are found.
            embeddings: (n, d) of the images, or (n, r, d).
            database: D.
            captions: of the images.
            groups: of the images.
            progress: show bars.
        """
        made, texts = self, None
        if captions is not None and captions.searched_by == "caption":
            texts = Query(captions.embeddings, ids=search.ids_of(captions.images))
            if made.captions is None:
                found = neighbor_table(
                    texts,
                    database,
                    search.k,
                    search.retriever,
                    path=search.file("captions", captions.made_from),
                    resume=True,
                    seed=search.seed,
                    progress=progress,
                )
                made = replace(made, captions=found)
        if groups is not None and made.own is None:
            images = Query(embeddings, ids=search.ids)
            made = replace(
                made, own=_within(groups, images, groups.own, "images", search, progress)
            )
        if groups is not None and captions is not None and texts is not None:
            of_images = groups.own[captions.images]
            own = _within(groups, texts, of_images, "captions", search, progress)
            made = replace(made, captions_own=own)
        return made


def _within(
    groups: Groups, query: Query, own: Tensor, of: str, search: Search, progress: bool
) -> Tensor:
    """Rows (b, k) of each query's own group, -1 for queries of none."""
    return groups.table(
        query,
        own,
        search.k,
        search.retriever,
        lambda name: search.file(of, [groups.describe()["members"], name]),
        seed=search.seed,
        progress=progress,
    )


@dataclass(frozen=True, eq=False)
class Conditions:
    """Queries and neighbors of training images.

    Args:
        embeddings: (n, d) of the images, or (n, r, d).
        table: (n, k) or (n, r, k) rows of the database; not looked at with ``live``.
        database: D.
        live: asked at each step; None: the tables hold the answers.
        tables: for captions and groups.
        captions: text in place of an image's own embedding.
        groups: neighbors from one group only.
        jitter: whether each image sees a number of its neighbors that is drawn from 1 to k.
        latents: (rows of D, c, h, w), for conditioners that see the neighbors' pictures.
    """

    embeddings: Tensor
    table: Tensor
    database: Database
    live: Search | None = None
    tables: Tables = Tables()
    captions: Captions | None = None
    groups: Groups | None = None
    jitter: bool = False
    latents: Tensor | None = None

    def of(self, rows: Tensor, k: int | None, occasion: Occasion | None) -> tuple[Query, Neighbors]:
        """Queries and neighbors of some images.

        Args:
            rows: (b,) numbers of images.
            k: neighbors of each; None: all.
            occasion: when; None: nothing is drawn, each image has its own embedding and all of
                its neighbors.
        """
        embedding, modes = self.embeddings[rows], None
        caption = own = torch.full((len(rows),), -1)
        jitter = self.jitter and occasion is not None
        drawn = torch.empty(0, 4)
        if occasion is not None and (self.captions or self.groups or jitter):
            # All are drawn whatever is used, so that one setting does not change another's draws.
            drawn = uniform(occasion.randomness("conditions"), (len(rows), 4), torch.float64)
        if self.groups is not None and occasion is not None:
            own = torch.where(drawn[:, 2] < self.groups.share, self.groups.own[rows], -1)
        if self.captions is not None and occasion is not None:
            caption, modes = self.captions.chosen(rows, drawn[:, 0], drawn[:, 1])
            text = caption >= 0
            embedding = embedding.clone()
            embedding[text] = self.captions.embeddings[caption[text]].to(embedding)
        query = Query(embedding)
        indices = self._indices(rows, caption, own, occasion)[..., :k]
        found = self.database.embeddings(indices)
        similarity = torch.cosine_similarity(embedding.unsqueeze(-2), found, dim=-1)
        neighbors = Neighbors(indices, similarity, found)
        mask = None
        if modes is not None and self.captions is not None and neighbors.k:
            neighbors = _prompted(neighbors, query, modes)
            if "text" in self.captions.modes:
                alone = torch.tensor([mode == "text" for mode in modes])
                mask = (torch.arange(neighbors.k) == 0) | ~alone.unsqueeze(-1)
        if jitter and neighbors.k:
            most = 1 + (drawn[:, 3] * neighbors.k).long()
            seen = torch.arange(neighbors.k) < most.unsqueeze(-1)
            mask = seen if mask is None else mask & seen
        if mask is not None:
            neighbors = _masked(neighbors, mask)
        if self.latents is not None:
            there = (neighbors.indices >= 0)[..., None, None, None]
            latents = self.latents[neighbors.indices.clamp(min=0)].float() * there
            neighbors = replace(neighbors, latents=latents)
        return query, neighbors

    def _indices(
        self, rows: Tensor, caption: Tensor, own: Tensor, occasion: Occasion | None
    ) -> Tensor:
        captions = self.captions
        by_caption = caption >= 0
        if captions is None or captions.searched_by == "image":
            by_caption = torch.zeros_like(by_caption)
        if self.live is not None:
            return self._asked(self.live, rows, caption, by_caption, own, occasion)
        indices = self.table[rows].long()
        tables = self.tables
        for table, numbers, here in (
            (tables.captions, caption, by_caption & (own < 0)),
            (tables.own, rows, ~by_caption & (own >= 0)),
            (tables.captions_own, caption, by_caption & (own >= 0)),
        ):
            if bool(here.any()):
                assert table is not None
                indices[here] = table[numbers[here]].long()
        return indices

    def _asked(
        self,
        live: Search,
        rows: Tensor,
        caption: Tensor,
        by_caption: Tensor,
        own: Tensor,
        occasion: Occasion | None,
    ) -> Tensor:
        embedding = self.embeddings[rows]
        if self.captions is not None and bool(by_caption.any()):
            embedding = embedding.clone()
            found = self.captions.embeddings[caption[by_caption]]
            embedding[by_caption] = found.to(embedding)
        randomness = Randomness.of(live.seed, rows.tolist(), "retrieval")
        if occasion is not None:
            randomness = occasion.randomness("retrieval")
        query = Query(embedding, ids=live.ids_of(rows), generator=randomness)
        indices = torch.empty((*embedding.shape[:-1], live.k), dtype=torch.int64)
        anywhere, within = (own < 0).nonzero().flatten(), (own >= 0).nonzero().flatten()
        if len(anywhere):
            chosen = live.retriever.retrieve(query.rows(anywhere), self.database, live.k)
            indices[anywhere] = chosen.indices.cpu()
        if len(within) and self.groups is not None:
            indices[within] = self.groups.retrieve(
                query.rows(within), own[within], live.k, live.retriever
            )
        return indices


def _prompted(neighbors: Neighbors, query: Query, modes: Sequence[str]) -> Neighbors:
    """The query as first of k neighbors, where the mode has it as a token."""
    both = Neighbors.cat([Neighbors.of_query(query), neighbors])
    skipped = torch.tensor([0 if mode in WITH_TEXT else 1 for mode in modes])
    return both.take(skipped.unsqueeze(-1) + torch.arange(neighbors.k))


def _masked(neighbors: Neighbors, mask: Tensor) -> Neighbors:
    """Neighbors of which only some take part; the others are zero, and no rows."""
    if neighbors.indices.ndim == 3:
        mask = mask.unsqueeze(1).expand_as(neighbors.indices)
    return replace(
        neighbors,
        indices=torch.where(mask, neighbors.indices, -1),
        similarity=torch.where(mask, neighbors.similarity, 0),
        embeddings=neighbors.embeddings * mask.unsqueeze(-1),
        mask=mask.contiguous(),
    )
