"""One picture that tells a story: grids of samples, each with the neighbors it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrodiff.pictures.converting import to_bytes

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

INK, GRAY, RULE = "#1a1a1a", "#6b6b6b", "#dddddd"
GAP, LABEL = 4, 104
SAMPLE, NEIGHBOR = 64, 26
"""Sides of the pictures, in pixels."""
TITLE, TEXT = 17, 12
"""Sizes of the fonts, in pixels."""


@dataclass(frozen=True)
class Cell:
    """Samples side by side, above the neighbors that they were made from.

    Args:
        samples: images (c, h, w) in [-1, 1].
        neighbors: likewise; may be empty.
    """

    samples: Sequence[Tensor]
    neighbors: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Grid:
    """Cells in rows and columns under a title.

    Args:
        title: what one sees.
        columns: what each column is.
        rows: the label of each row, and its cells.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]] = field(repr=False)


def draw_poster(heading: str, grids: Sequence[Grid], width: int = 1000) -> Image:
    """Draws grids below each other.

    Args:
        heading: above all of them.
        grids: of any number of columns; each takes the whole width.
        width: of the picture, in pixels.

    Returns:
        A PIL image.
    """
    from PIL import Image, ImageDraw

    height = 44 + sum(_height(grid) for grid in grids)
    poster = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(poster)
    draw.text((2 * GAP, 10), heading, INK, _font(TITLE + 3))
    y = 44
    for grid in grids:
        draw.line((2 * GAP, y, width - 2 * GAP, y), RULE)
        draw.text((2 * GAP, y + 6), grid.title, INK, _font(TITLE))
        _grid(poster, draw, grid, y + 32)
        y += _height(grid)
    return poster


def _height(grid: Grid) -> int:
    return 32 + TEXT + 6 + sum(_row_height(cells) for _, cells in grid.rows) + GAP


def _row_height(cells: Sequence[Cell]) -> int:
    strip = NEIGHBOR + 2 if any(len(cell.neighbors) for cell in cells) else 0
    return SAMPLE + strip + 2 * GAP


def _grid(poster: Image, draw: ImageDraw, grid: Grid, y: int) -> None:
    step = (poster.width - LABEL - 2 * GAP) // max(1, len(grid.columns))
    for j, name in enumerate(grid.columns):
        draw.text((LABEL + j * step, y), name, GRAY, _font(TEXT))
    y += TEXT + 6
    for label, cells in grid.rows:
        lines = _wrapped(label, LABEL - 3 * GAP)
        draw.multiline_text((2 * GAP, y + 2), "\n".join(lines), INK, _font(TEXT), spacing=2)
        for j, cell in enumerate(cells):
            x = LABEL + j * step
            there = max(1, (step - GAP) // (SAMPLE + GAP))
            for i, image in enumerate(cell.samples[:there]):
                poster.paste(picture(image, SAMPLE), (x + i * (SAMPLE + GAP), y))
            for i, image in enumerate(cell.neighbors):
                poster.paste(picture(image, NEIGHBOR), (x + i * (NEIGHBOR + 2), y + SAMPLE + 2))
        y += _row_height(cells)


def picture(image: Tensor, side: int) -> Image:
    """A PIL image of ``side`` x ``side`` pixels of an image (c, h, w), bytes or in [-1, 1]."""
    from PIL import Image

    image = image.detach().cpu()
    if image.dtype != torch.uint8:
        image = to_bytes(image.float().nan_to_num(-1.0).clamp(-1, 1))
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font(TEXT).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)
