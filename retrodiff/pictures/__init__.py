"""Pictures as people have them, made into images: tensors in [-1, 1]."""

from retrodiff.pictures.converting import (
    PixelRange,
    to_batch,
    to_bytes,
    to_float,
    to_image,
    to_images,
)
from retrodiff.pictures.sheet import Line, Section, draw_sheet

__all__ = [
    "Line",
    "PixelRange",
    "Section",
    "draw_sheet",
    "to_batch",
    "to_bytes",
    "to_float",
    "to_image",
    "to_images",
]
