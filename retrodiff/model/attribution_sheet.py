"""Draws samples tinted by the neighbors that painted them, beside the neighbors in these colors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retrodiff.pictures.converting import to_bytes
from retrodiff.text import printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from retrodiff.model.generated import Generation

COLORS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2", "#999999")
"""Told apart by the color-blind, too (Okabe & Ito 2008); repeated beyond eight neighbors."""

SHOWN = 8
"""Images of a sheet, unless more are asked for."""

SHARPNESS = 3.0
"""Power of the shares in the tint, so that the larger share of a region shows its color."""

GAP, TEXT = 6, 14


def attribution_sheet(
    out: Generation, numbers: Sequence[int] | None = None, side: int = 144
) -> Image:
    """Two lines for each image: it and its neighbors; and below each what it has painted.

    The sample is tinted with the color of the neighbor that has the largest part in a region,
    with lines where that changes. Below a neighbor, bright regions are those where its share is
    high; all neighbors of an image have one scale. Its share in the whole image stands with it.

    Args:
        out: samples with attribution.
        numbers: of the images shown; None: the first eight.
        side: of a cell, in pixels.

    Raises:
        ValueError: there is no attribution.
    """
    if out.attribution is None:
        raise ValueError("these samples have no attribution: sample(..., attribution=True)")
    from PIL import Image, ImageDraw, ImageFont

    chosen = list(range(min(len(out), SHOWN))) if numbers is None else list(numbers)
    attribution = out.attribution.rows(torch.tensor(chosen, dtype=torch.int64))
    weights, means = attribution.weights, attribution.means
    columns = [(means[i] > 0).nonzero().flatten().tolist() for i in range(len(chosen))]
    width = 1 + max(map(len, columns), default=0)
    height = 2 * side + TEXT + 3 * GAP
    size = (width * (side + GAP) + 2 * GAP, max(1, len(chosen)) * height + GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for line, number in enumerate(chosen):
        y = GAP + line * height
        below = y + side + TEXT + GAP
        sample = _enlarged(_colored(out.images[number].cpu()), side)
        sheet.paste(_picture(sample), (GAP, y))
        own = 1 - float(attribution.streams["neighbors"][line].mean())
        told = f"sample {number}" + (f", query {own:.0%}" if own > 0.0005 else "")
        draw.text((GAP, y + side + 1), told, "black", font)
        if not columns[line]:
            continue
        shares = _enlarged(weights[line], side, smooth=True)
        sheet.paste(_picture(_tinted(sample, shares)), (GAP, below))
        top = float(shares.max())
        for column, j in enumerate(columns[line], 1):
            x = 2 * GAP + column * (side + GAP)
            color = COLORS[j % len(COLORS)]
            cell = _neighbor(out, number, j, side)
            if isinstance(cell, str):
                draw.multiline_text((x + 4, y + 4), _wrapped(cell, side // 7), "black", font)
            else:
                sheet.paste(_picture(cell), (x, y))
            draw.rectangle((x, y, x + side - 1, y + side - 1), outline=color, width=4)
            draw.text((x, y + side + 1), f"{float(means[line, j]):.0%}", "black", font)
            heat = _rgb(color) * (shares[j] / top) + 0.35 * sample.mean(0) * (1 - shares[j] / top)
            sheet.paste(_picture(heat), (x, below))
    return sheet


def _tinted(sample: Tensor, shares: Tensor) -> Tensor:
    """A picture (3, h, w) in the colors of the shares (k, h, w), with lines between regions."""
    mixed = shares**SHARPNESS
    mixed = mixed / mixed.sum(0).clamp(min=torch.finfo().tiny)
    colors = torch.stack([_rgb(COLORS[j % len(COLORS)])[:, 0, 0] for j in range(len(shares))])
    tint = torch.einsum("khw,kc->chw", mixed, colors)
    gray = sample.mean(0, keepdim=True)
    out = tint * (0.35 + 0.65 * gray)
    first = shares.argmax(0)
    edge = torch.zeros_like(first, dtype=torch.bool)
    edge[1:] |= first[1:] != first[:-1]
    edge[:, 1:] |= first[:, 1:] != first[:, :-1]
    return torch.where(edge, torch.ones_like(out), out)


def _neighbor(out: Generation, number: int, j: int, side: int) -> Tensor | str:
    """The picture of a neighbor; what its record says where there is none."""
    rows = out.neighbors.indices[number]
    row = int(rows[j] if rows.ndim == 1 else rows[0, j])
    image: Any = getattr(out.database, "image", None)
    if image is not None:
        try:
            return _enlarged(_colored(image(row)), side)
        except (OSError, ValueError):
            pass
    record = out.neighbors.records[number][j] if out.neighbors.records else {}
    return printable(record.get("file") or record.get("label") or f"row {row}")


def _colored(image: Tensor) -> Tensor:
    """An image (1 or 3, h, w) in [-1, 1] or uint8 as colors (3, h, w) in [0, 1]."""
    return (to_bytes(image.nan_to_num(-1)) if image.is_floating_point() else image).expand(
        3, -1, -1
    ) / 255


def _enlarged(image: Tensor, side: int, smooth: bool = False) -> Tensor:
    """An image (c, h, w) fitted into a square, small ones without smoothing."""
    c, h, w = image.shape
    to = (max(1, round(side * h / max(h, w))), max(1, round(side * w / max(h, w))))
    mode = "bilinear" if smooth or max(h, w) > side else "nearest"
    fitted = F.interpolate(image[None].float(), to, mode=mode, antialias=max(h, w) > side)[0]
    square = torch.zeros(c, side, side) if smooth else torch.ones(c, side, side)
    y, x = (side - to[0]) // 2, (side - to[1]) // 2
    square[:, y : y + to[0], x : x + to[1]] = fitted
    return square


def _picture(image: Tensor) -> Image:
    from PIL import Image

    data = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(data.movedim(0, -1).contiguous().numpy())


def _rgb(color: str) -> Tensor:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return torch.tensor(parts)[:, None, None]


def _wrapped(text: str, width: int) -> str:
    return "\n".join(text[i : i + width] for i in range(0, min(len(text), 6 * width), width))
