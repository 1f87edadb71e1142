"""Small copies of pictures, kept to be shown."""

from __future__ import annotations

import io

from torch import Tensor

from retrodiff.pictures.converting import to_bytes, to_float
from retrodiff.pictures.decoding import UnreadableImage, from_pil, read_image

__all__ = ["UnreadableImage", "from_pil", "read_image", "thumbnail", "to_bytes", "to_float"]


def thumbnail(image: Tensor, side: int) -> bytes:
    """A small copy of an image (c, h, w): PNG where nothing is lost by it, else JPEG."""
    from PIL import Image

    channels = []
    for channel in to_bytes(image).expand(3, -1, -1).cpu():  # one at a time: pictures are large
        small = Image.fromarray(channel.contiguous().numpy())
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        channels.append(small)
    small = Image.merge("RGB", channels)
    out = io.BytesIO()
    if max(small.size) <= 64:
        small.save(out, "PNG")
    else:
        small.save(out, "JPEG", quality=90)
    return out.getvalue()
