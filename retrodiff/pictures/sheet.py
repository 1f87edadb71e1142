"""One picture to look at: query | neighbors | samples, a line for each query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from retrodiff.pictures.converting import to_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

GAP, SMALL, LARGE = 6, 10, 15
WORDS = 128
"""Least width of a column that holds texts, in pixels."""
TEXT_LINES = 3
"""Most lines of text below a picture."""


@dataclass(frozen=True)
class Line:
    """One line of a sheet.

    Args:
        query: what was asked: an image (c, h, w) in [-1, 1] or of bytes, a text, or None: nothing.
        neighbors: images (c, h, w) that were found; may be empty.
        samples: images (c, h, w) that were made; may be empty.
        note: a few words below the query.
        captions: of the neighbors, a short text each; may be empty.

    Examples:
        >>> import torch
        >>> from retrodiff.pictures import Line, Section, draw_sheet
        >>> found = torch.zeros(3, 3, 32, 32)
        >>> line = Line(
        ...     "a red door", found, samples=torch.ones(2, 3, 32, 32), captions=["0.31"] * 3
        ... )
        >>> draw_sheet([Section("doors", [line])]).save("doors.png")
    """

    query: Tensor | str | None
    neighbors: Tensor | Sequence[Tensor]
    samples: Tensor | Sequence[Tensor] = ()
    note: str = ""
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """Lines under a title; an empty title takes no room.

    Args:
        title: above the lines.
        lines: of the section, from above.

    Examples:
        >>> import torch
        >>> from retrodiff.pictures import Line, Section, draw_sheet
        >>> rows = [Line(None, torch.zeros(3, 3, 32, 32)), Line(None, torch.ones(3, 3, 32, 32))]
        >>> draw_sheet([Section("black and white", rows)]).save("sheet.png")
    """

    title: str
    lines: Sequence[Line]


def draw_sheet(sections: Sequence[Section], side: int = 64) -> Image:
    """Draws sections below each other; small images are enlarged without smoothing.

    Columns have a heading where a section has a title.

    Args:
        sections: what is drawn.
        side: of a picture on the sheet, in pixels.

    Returns:
        A PIL image.
    """
    from PIL import Image, ImageDraw, ImageFont

    bold, small = ImageFont.load_default(size=LARGE), ImageFont.load_default(size=SMALL)
    lines = [line for section in sections for line in section.lines]
    asked = side if all(_asked(line, side, side, small)[1] for line in lines) else max(side, WORDS)
    near_x = GAP + asked + 2 * GAP
    k = max((len(line.neighbors) for line in lines), default=0)
    n = max((len(line.samples) for line in lines), default=0)
    sample_x = near_x + k * (side + GAP) + (GAP if n else 0)
    width = max(
        sample_x + n * (side + GAP),
        *(round(bold.getlength(section.title)) + 2 * GAP for section in sections),
    )
    below = [_below(line, side, asked, small) for line in lines]
    height = GAP + sum(side + GAP + _text_height(texts) for texts in below)
    height += sum(LARGE + SMALL + 3 * GAP for section in sections if section.title)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    y, texts = GAP, iter(below)
    for section in sections:
        if section.title:
            draw.text((GAP, y), section.title, "black", bold)
            y += LARGE + GAP
            heads = ((GAP, "query", 1), (near_x, "neighbors", k), (sample_x, "samples", n))
            for x, word, columns in heads:
                if columns:
                    draw.text((x, y), word, "gray", small)
            y += SMALL + GAP
        top = y
        for line in section.lines:
            note, *captions = next(texts)
            if isinstance(line.query, Tensor):
                sheet.paste(_cell(line.query, side), (GAP, y))
                draw.multiline_text((GAP, y + side + 1), note, "black", small, spacing=1)
            else:
                draw.multiline_text((GAP, y), note, "black", small, spacing=2)
            for i, image in enumerate(line.neighbors):
                x = near_x + i * (side + GAP)
                sheet.paste(_cell(image, side), (x, y))
                caption = captions[i] if i < len(captions) else ""
                draw.multiline_text((x, y + side + 1), caption, "black", small, spacing=1)
            for i, image in enumerate(line.samples):
                sheet.paste(_cell(image, side), (sample_x + i * (side + GAP), y))
            y += side + GAP + _text_height([note, *captions])
        for x in (near_x - GAP, *((sample_x - GAP,) if n and k else ())):
            draw.line((x, top, x, y - GAP), "lightgray")
        y += GAP if section.title else 0
    return sheet


def _below(line: Line, side: int, asked: int, font: Any) -> list[str]:
    """The texts of a line, fit to their columns: the query's, then the neighbors'."""
    captions = (_fit(caption, side, font)[0] for caption in line.captions)
    return [_asked(line, side, asked, font)[0], *captions]


def _asked(line: Line, side: int, width: int, font: Any) -> tuple[str, bool]:
    """The text of a line's query in its column, and whether all of it is there."""
    if isinstance(line.query, Tensor):
        return _fit(line.note, side, font)[0], True
    said = "\n".join(filter(None, [line.query or "(nothing asked)", line.note]))
    return _fit(said, width, font, max(TEXT_LINES, side // (SMALL + 3)))


def _text_height(texts: Sequence[str]) -> int:
    """Room below a line's pictures; a text query stands beside them."""
    rows = max((text.count("\n") + 1 for text in texts if text), default=0)
    return min(rows, TEXT_LINES) * (SMALL + 3)


def _fit(text: str, width: int, font: Any, rows: int = TEXT_LINES) -> tuple[str, bool]:
    """A text in lines that are no wider than ``width`` pixels, and whether all of it is there."""
    lines: list[str] = []
    for part in text.splitlines():
        line = ""
        for word in part.split(" "):
            longer = f"{line} {word}" if line else word
            if not line or font.getlength(longer) <= width:
                line = longer
            else:
                lines.append(line)
                line = word
        lines.append(line)
    shown = [_short(line, width, font) for line in lines]
    whole = shown == lines and len(lines) <= rows
    return "\n".join(shown if len(shown) <= rows else [*shown[: rows - 1], "…"]), whole


def _short(line: str, width: int, font: Any) -> str:
    """A line without its beginning, if it is too wide: the end of a file's name tells more."""
    if font.getlength(line) <= width:
        return line
    kept = line
    while kept and font.getlength(f"…{kept}") > width:
        kept = kept[1:]
    return f"…{kept}"


def _cell(image: Tensor, side: int) -> Image:
    """A PIL image of at most ``side`` x ``side``; small ones are enlarged crisply."""
    from PIL import Image

    image = image.detach().cpu()
    if image.is_floating_point():
        image = to_bytes(image.float().nan_to_num(-1.0).clamp(-1, 1))
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous()
    picture = Image.fromarray(pixels.numpy())
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize(size, how)
