"""Small copies of pictures, kept to be shown."""

from __future__ import annotations

import io

from torch import Tensor

from retrodiff.pictures.converting import to_bytes, to_float
from retrodiff.pictures.decoding import UnreadableImage, from_pil, read_image

__all__ = ["UnreadableImage", "from_pil", "read_image", "thumbnail", "to_bytes", "to_float"]


def thumbnail(image: Tensor, side: int, quality: int | None = None) -> bytes:
    """A small copy of an image (c, h, w).

    Args:
        image: bytes, or in [-1, 1].
        side: the longest side of the copy.
        quality: of a WebP file, 1 to 100; None: PNG up to 64 pixels, larger ones JPEG.
    """
    from PIL import Image

    channels = []
    for channel in to_bytes(image).expand(3, -1, -1).cpu():  # one at a time: pictures are large
        small = Image.fromarray(channel.contiguous().numpy())
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        channels.append(small)
    small = Image.merge("RGB", channels)
    out = io.BytesIO()
    if quality is not None:
        small.save(out, "WEBP", quality=quality, method=6)
    elif max(small.size) <= 64:
        small.save(out, "PNG")
    else:
        small.save(out, "JPEG", quality=90)
    return out.getvalue()
