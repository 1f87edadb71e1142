"""One picture that shows what a model does: query, neighbors, samples, a line for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from retrodiff.model.generated import to_picture

if TYPE_CHECKING:
    from PIL.Image import Image

CELL, GAP, TEXT = 64, 4, 18


@dataclass(frozen=True)
class Line:
    """One line of the picture.

    Args:
        query: what was asked: an image (c, h, w), a text, or None for nothing.
        neighbors: images (k, c, h, w) that conditioned; may be empty.
        samples: images (n, c, h, w).
        note: a few words below the query.
    """

    query: Tensor | str | None
    neighbors: Tensor | Sequence[Tensor]
    samples: Tensor | Sequence[Tensor]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Lines under a title."""

    title: str
    lines: Sequence[Line]


def compose(sections: Sequence[Section]) -> Image:
    """The sections below each other, small images enlarged without smoothing."""
    from PIL import Image, ImageDraw, ImageFont

    lines = [line for section in sections for line in section.lines]
    k = max(len(line.neighbors) for line in lines)
    n = max(len(line.samples) for line in lines)
    step = CELL + GAP
    query_width = 3 * CELL
    near_x = GAP + query_width + 2 * GAP
    sample_x = near_x + k * step + 4 * GAP
    width = sample_x + n * step + GAP
    height = GAP + sum(
        TEXT * 2 + GAP + sum(step for _ in section.lines) + 2 * GAP for section in sections
    )
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    bold, small = ImageFont.load_default(size=15), ImageFont.load_default(size=11)

    def paste(image: Tensor, x: int, y: int) -> None:
        picture = to_picture(image)
        sheet.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))

    y = GAP
    for section in sections:
        draw.text((GAP, y), section.title, "black", bold)
        y += TEXT + GAP
        for x, word in ((GAP, "query"), (near_x, "neighbors"), (sample_x, "samples")):
            draw.text((x, y), word, "gray", small)
        y += TEXT
        for line in section.lines:
            if isinstance(line.query, Tensor):
                paste(line.query, GAP, y)
                draw.multiline_text((GAP + step, y + 4), _wrapped(line.note, 20), "black", small)
            else:
                text = "\n".join(filter(None, [line.query or "(nothing asked)", line.note]))
                draw.multiline_text((GAP, y + 4), _wrapped(text, 32), "black", small)
            for i, image in enumerate(line.neighbors):
                paste(image, near_x + i * step, y)
            for i, image in enumerate(line.samples):
                paste(image, sample_x + i * step, y)
            y += step
        y += 2 * GAP
    return sheet


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(
        part for line in text.splitlines() for part in (textwrap.wrap(line, width) or [""])
    )
