"""Pictures as people have them, made into images: tensors in [-1, 1]."""

from retrodiff.pictures.converting import (
    PixelRange,
    to_batch,
    to_bytes,
    to_float,
    to_image,
    to_images,
)

__all__ = [
    "PixelRange",
    "to_batch",
    "to_bytes",
    "to_float",
    "to_image",
    "to_images",
]
