"""Reads any picture as RGB, refuses what is no picture, and keeps small copies to be shown.

EXIF rotation is applied; palettes, CMYK and 16 bit become 8-bit RGB; transparency lies on white; of
an animation the first frame counts.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor


class UnreadableImage(ValueError):
    """A file that is no picture, or only a part of one, or too large to be decoded."""


def read_image(file: str | Path | bytes | BinaryIO) -> Tensor:
    """A picture as uint8 (3, h, w).

    Raises:
        UnreadableImage: truncated, not an image, or larger than Pillow's limit against bombs.
    """
    from PIL import Image

    source: Any = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                return from_pil(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImage(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise UnreadableImage("not an image") from None
    except (FileNotFoundError, PermissionError) as error:
        raise UnreadableImage(str(error.strerror)) from None
    except Exception as error:
        # Pillow's decoders raise nearly anything on broken bytes.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"broken image: {reason}") from None


def from_pil(image: Any) -> Tensor:
    """A PIL image, not yet loaded perhaps, as uint8 (3, h, w)."""
    from PIL import ImageOps

    image.load()
    upright = ImageOps.exif_transpose(image)
    rgb = np.array(_rgb(image if upright is None else upright))
    return torch.from_numpy(rgb).permute(2, 0, 1).contiguous()


def _rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        # "F" holds [0, 1] or [0, 255] by habit, "I" and "I;16" hold 16 bits.
        top = 65535.0 if image.mode != "F" else (1.0 if values.max(initial=0) <= 1 else 255.0)
        image = Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_float(image: Tensor) -> Tensor:
    """An image of uint8 in [0, 255], or of floats in [-1, 1] -> float32 in [-1, 1]."""
    if image.dtype == torch.uint8:
        return image.float().div_(127.5).sub_(1)  # in place: large batches are bound by memory
    return image.float()


def to_bytes(image: Tensor) -> Tensor:
    """An image of floats in [-1, 1], or of uint8 in [0, 255] -> uint8 in [0, 255]."""
    if image.dtype == torch.uint8:
        return image
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def thumbnail(image: Tensor, side: int) -> bytes:
    """A small copy of an image (c, h, w): PNG where nothing is lost by it, else JPEG."""
    from PIL import Image

    pixels = to_bytes(image).expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    small = Image.fromarray(pixels)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if max(small.size) <= 64:
        small.save(out, "PNG")
    else:
        small.save(out, "JPEG", quality=90)
    return out.getvalue()
