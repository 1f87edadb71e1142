"""What sampling returns: images, what was retrieved for them, and how they were made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrodiff.files import plain_json, write_folder, write_json
from retrodiff.interfaces import Database, Neighbors, Query, Record

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
MARKER = "generation.json"
SHEET = "sheet.png"
"""Query, samples and neighbors in one picture, beside the images."""


@dataclass(frozen=True)
class Generation:
    """Generated images, their queries and neighbors, and the settings that make them again.

    Args:
        images: (b, c, h, w) in [-1, 1].
        latents: (b, c, h, w) of the denoiser, before decoding.
        query: what was asked for each image.
        neighbors: what conditioned each image, with records; k = 0 when nothing did.
        settings: mode, k, guidance, steps, seed, fingerprints.
    """

    images: Tensor
    latents: Tensor
    query: Query
    neighbors: Neighbors
    settings: Mapping[str, Any]

    def __len__(self) -> int:
        return self.images.shape[0]

    def pictures(self) -> list[Image]:
        """The images as PIL pictures."""
        return [to_picture(image) for image in self.images]

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """PNG files and ``generation.json`` with everything that is needed to make them again."""

        def write(temporary: Path) -> None:
            rows = []
            for i, picture in enumerate(self.pictures()):
                name = f"{i:05d}.png"
                picture.save(temporary / name)
                rows.append(
                    {
                        "file": name,
                        "source": self.query.source[i] if self.query.source else None,
                        "neighbors": [
                            {
                                "row": int(self.neighbors.indices[i].flatten()[j]),
                                "similarity": float(self.neighbors.similarity[i].flatten()[j]),
                                "record": dict(record),
                            }
                            for j, record in enumerate(
                                self.neighbors.records[i] if self.neighbors.records else ()
                            )
                        ],
                    }
                )
            value = {"format": FORMAT, "settings": dict(self.settings), "images": rows}
            write_json(temporary / MARKER, plain_json(value))

        return write_folder(folder, write, marker=MARKER, own=own_files, overwrite=overwrite)


def own_files(folder: Path) -> set[str]:
    """The files of a folder of samples that `Generation.save` and ``retrodiff sample`` wrote."""
    try:
        rows = json.loads((folder / MARKER).read_text("utf-8"))["images"]
        images = {row["file"] for row in rows if re.fullmatch(r"\d{5,}\.png", row["file"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        images = set[str]()
    return {MARKER, SHEET} | images


def gathered(
    parts: list[tuple[Tensor, Tensor, Query, Neighbors]], order: list[int], settings: dict[str, Any]
) -> Generation:
    """Parts in the order in which they ran -> one Generation in the order in which they were asked.

    Modes differ in k; shorter neighbor lists are filled up with row -1 and similarity 0.
    """
    back = torch.tensor(order).argsort()
    width = max(neighbors.k for *_, neighbors in parts)
    padded = [_widened(neighbors, width) for *_, neighbors in parts]
    records = tuple(r for neighbors in padded for r in neighbors.records)
    source = tuple(s for _, _, query, _ in parts for s in query.source)
    positions = back.tolist()
    return Generation(
        torch.cat([images for images, *_ in parts])[back],
        torch.cat([latents for _, latents, *_ in parts])[back],
        Query(
            torch.cat([query.embedding.cpu() for _, _, query, _ in parts])[back],
            tuple(source[i] for i in positions) if source else (),
        ),
        Neighbors(
            torch.cat([n.indices.cpu() for n in padded])[back],
            torch.cat([n.similarity.cpu() for n in padded])[back],
            torch.cat([n.embeddings.cpu() for n in padded])[back],
            tuple(records[i] for i in positions) if records else (),
        ),
        settings,
    )


def _widened(neighbors: Neighbors, k: int) -> Neighbors:
    missing = k - neighbors.k
    if missing == 0:
        return neighbors
    shape = (*neighbors.indices.shape[:-1], missing)
    filler = Neighbors(
        torch.full(shape, -1, device=neighbors.indices.device),
        neighbors.similarity.new_zeros(shape),
        neighbors.embeddings.new_zeros(*shape, neighbors.embeddings.shape[-1]),
    )
    return replace(Neighbors.cat([neighbors, filler]), records=neighbors.records)


def to_picture(image: Tensor) -> Image:
    """An image (c, h, w) in [-1, 1], c = 1 or 3, as an 8-bit PIL picture."""
    from PIL import Image

    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = pixels.expand(3, -1, -1) if pixels.shape[0] == 1 else pixels
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def origins(
    query: Query, found: Neighbors, database: Database | None
) -> tuple[tuple[Record, ...], ...]:
    """Where every token of every query comes from: the record of its row, or the query itself."""
    flat = found.indices.reshape(len(query), -1)
    stored = flat >= 0
    known: list[Record] = []
    if database is not None and bool(stored.any()):
        known = database.records(flat[stored].cpu())
    rest = iter(known)
    return tuple(
        tuple(
            next(rest)
            if row >= 0
            else {"query": query.source[i] if i < len(query.source) else None}
            for row in rows
        )
        for i, rows in enumerate(flat.tolist())
    )
