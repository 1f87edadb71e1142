"""Draws queries beside their neighbors, with file, patch box and similarity, to be looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from retrodiff.interfaces import Neighbors, Record
from retrodiff.pictures.converting import to_bytes
from retrodiff.text import printable


def contact_sheet(
    queries: Sequence[Tensor | str],
    pictures: Sequence[Sequence[Tensor]],
    captions: Sequence[Sequence[str]],
    side: int = 128,
) -> Any:
    """One row per query: the query, and what was found for it.

    Args:
        queries: images (c, h, w) in [-1, 1], or prompts.
        pictures: for each query its neighbors' images.
        captions: for each query a text below each neighbor.
        side: of a cell, in pixels.

    Returns:
        A PIL image.
    """
    from PIL import Image, ImageDraw, ImageFont

    gap, text = 6, 30
    width = 1 + max(map(len, pictures), default=0)
    size = (width * (side + gap) + 2 * gap, len(queries) * (side + text + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    for row, query in enumerate(queries):
        y = gap + row * (side + text + gap)
        if isinstance(query, str):
            draw.multiline_text((gap, y), _wrap(query, side // 6), "black", font)
        else:
            sheet.paste(_cell(query, side), (gap, y))
            draw.text((gap, y + side + 1), "query", "black", font)
        for i, (picture, caption) in enumerate(zip(pictures[row], captions[row], strict=True), 1):
            x = 2 * gap + i * (side + gap)
            sheet.paste(_cell(picture, side), (x, y))
            draw.multiline_text((x, y + side + 1), caption, "black", font, spacing=1)
        draw.line((side + 2 * gap, y, side + 2 * gap, y + side), "gray")
    return sheet


def captions_of(neighbors: Neighbors, side: int = 128) -> list[list[str]]:
    """Two short lines per neighbor: similarity and box, then file."""
    return [
        [_caption(record, float(s), side) for record, s in zip(row, similarity, strict=True)]
        for row, similarity in zip(neighbors.records, neighbors.similarity, strict=True)
    ]


def _caption(record: Record | Mapping[str, Any], similarity: float, side: int) -> str:
    where = f"{similarity:.3f}"
    box = record.get("box")
    if box is not None and len(box) == 4:
        where += " ({},{})-({},{})".format(*box)
    name = printable(record.get("file") or record.get("label") or record.get("number", ""))
    most = side // 6
    return f"{where}\n{name if len(name) <= most else '…' + name[1 - most :]}"


def _cell(image: Tensor, side: int) -> Any:
    """A PIL image of at most ``side`` x ``side``; small ones are enlarged crisply."""
    from PIL import Image

    pixels = to_bytes(image.detach().cpu()).expand(3, -1, -1).permute(1, 2, 0).contiguous()
    picture = Image.fromarray(pixels.numpy())
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize(size, how)


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
