"""Generated images with what was retrieved for them: shown, saved as PNG files and JSON."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from retrodiff.disk.files import plain_json, write_folder, write_json
from retrodiff.interfaces import Database, Neighbors, Query, Value
from retrodiff.model.attribution import Attribution
from retrodiff.pictures.converting import to_bytes
from retrodiff.text import printable

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
MARKER = "generation.json"
SHEET = "sheet.png"
"""Query, samples and neighbors in one picture, beside the images."""

ATTRIBUTION = "attribution.png"
"""Samples tinted by the neighbors that painted them, where that was recorded."""

SHOWN = 16
"""Images that a notebook shows."""

SIDE = 96
"""Largest side of a picture in a notebook, in pixels."""


@dataclass(frozen=True, eq=False, repr=False)
class Generation(Value):
    """Generated images, their queries and neighbors, and the settings that make them again.

    A notebook shows query, neighbors and sample of the first ones.

    Args:
        images: (b, c, h, w) in [-1, 1].
        latents: (b, c, h, w) of the denoiser, before decoding.
        query: what was asked for each image.
        neighbors: what conditioned each image, with records; k = 0 when nothing did.
        settings: mode, k, guidance, steps, seed, fingerprints.
        pictures: those that were asked with, (c, h, w) each; empty where they were texts or rows.
        database: what was retrieved from, to show its pictures; it is not saved.
        attribution: which neighbor has which part in which region, where that was asked for.
        renewed: neighbors of each image that were found while sampling, by step, where that was
            asked for.

    Examples:
        >>> from retrodiff import presets
        >>> out = presets.ldm().sample(n=2, steps=2)
        >>> out.images.shape, len(out.pil())
        (torch.Size([2, 1, 8, 8]), 2)
    """

    images: Tensor
    latents: Tensor
    query: Query
    neighbors: Neighbors
    settings: Mapping[str, Any]
    pictures: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)
    database: Database | None = field(default=None, compare=False, repr=False)
    attribution: Attribution | None = field(default=None, compare=False, repr=False)
    renewed: Mapping[int, tuple[Neighbors, ...]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __len__(self) -> int:
        return self.images.shape[0]

    def pil(self) -> list[Image]:
        """The images as PIL images."""
        return [to_picture(image) for image in self.images]

    def not_finite(self) -> list[int]:
        """Numbers of the images with NaN or infinities in pixels or latents."""
        pixels, latents = (x.isfinite().flatten(1).all(1) for x in (self.images, self.latents))
        return (~(pixels & latents)).nonzero().flatten().tolist()

    def _repr_html_(self) -> str:
        """Query, neighbors and sample of the first images, for a notebook."""
        rows = [
            f"<tr><td>{self._asked(i)}</td><td>{self._near(i)}</td>"
            f"<td>{_shown(self.images[i])}</td></tr>"
            for i in range(min(len(self), SHOWN))
        ]
        more = f"<p>{len(self) - SHOWN} more</p>" if len(self) > SHOWN else ""
        head = "<tr><th>query</th><th>neighbors</th><th>sample</th></tr>"
        return f"<table>{head}{''.join(rows)}</table>{more}"

    def _asked(self, i: int) -> str:
        if i < len(self.pictures):
            return _shown(self.pictures[i])
        return html.escape(printable(self.query.source[i])) if self.query.source else ""

    def _near(self, i: int) -> str:
        """The pictures of an image's neighbors, or what their records say."""
        rows = self.neighbors.indices[i].flatten().tolist()
        records = self.neighbors.records[i] if self.neighbors.records else ({},) * len(rows)
        image = getattr(self.database, "image", None)
        shown: list[str] = []
        for row, record in zip(rows, records, strict=True):
            if row < 0:
                continue
            name = html.escape(printable(record.get("file") or record.get("label") or f"row {row}"))
            try:
                shown.append(name if image is None else _shown(image(row), name))
            except (OSError, ValueError):
                shown.append(name)
        return " ".join(shown)

    def _share(self, i: int, j: int) -> dict[str, float]:
        """The share of a neighbor in an image, where it was recorded."""
        if self.attribution is None or self.neighbors.indices.ndim != 2:
            return {}
        return {"share": float(self.attribution.means[i, j])}

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """PNG files and ``generation.json`` with everything that is needed to make them again."""

        def write(temporary: Path) -> None:
            rows: list[dict[str, Any]] = []
            wrong = set(self.not_finite())
            for i, picture in enumerate(self.pil()):
                name = f"{i:05d}.png"
                picture.save(temporary / name)
                rows.append(
                    {
                        "file": name,
                        **({"finite": False} if i in wrong else {}),
                        "source": self.query.source[i] if self.query.source else None,
                        "neighbors": [
                            {
                                "row": int(self.neighbors.indices[i].flatten()[j]),
                                "similarity": float(self.neighbors.similarity[i].flatten()[j]),
                                **self._share(i, j),
                                "record": dict(record),
                            }
                            for j, record in enumerate(
                                self.neighbors.records[i] if self.neighbors.records else ()
                            )
                        ],
                    }
                )
            if self.attribution is not None:
                from retrodiff.model.attribution_sheet import attribution_sheet

                attribution_sheet(self).save(temporary / ATTRIBUTION)
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
    return {MARKER, SHEET, ATTRIBUTION} | images


def to_picture(image: Tensor) -> Image:
    """An image (c, h, w) in [-1, 1], c = 1 or 3, as an 8-bit PIL picture; NaN becomes black."""
    from PIL import Image

    pixels = to_bytes(image.detach().float().nan_to_num(-1.0).clamp(-1, 1).cpu())
    pixels = pixels.expand(3, -1, -1) if pixels.shape[0] == 1 else pixels
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _shown(image: Tensor, title: str = "") -> str:
    """An image as HTML that holds its pixels."""
    if not image.is_floating_point():
        image = image.float() / 127.5 - 1
    picture = to_picture(image)
    picture.thumbnail((2 * SIDE, 2 * SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    style = f"max-width:{SIDE}px;max-height:{SIDE}px"
    return f'<img title="{title}" style="{style}" src="data:image/png;base64,{data}">'
