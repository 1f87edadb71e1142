"""Training images: any sequence that gives several at once, brought to one type and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from retrodiff.interfaces import Encoder
from retrodiff.pictures.converting import CHANNELS, LEEWAY, to_batch, to_float

LOOKED_AT = 64
"""Images that stand for all where a sequence has no ``digest``."""


class Images(Protocol):
    """Training images: any sequence that gives several at once.

    Three more methods are used where a class has them: ``embed(encoder, rows)`` -> (b, d), for
    images whose embeddings come from more than the pixels that are trained on; ``digest()`` -> str,
    a hash of all of them; and ``name(row)`` -> str, where each is read from a file of its own when
    it is asked for. What has a member ``latents`` gives latents, which may have any values.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Row numbers (b,) -> images (b, c, h, w) in [-1, 1], or uint8."""
        ...


def as_images(images: Any) -> Images:
    """Training images of any usual kind -> something that gives several at once.

    Tensors and lists are what `retrodiff.pictures.to_batch` takes; bytes stay bytes until they are
    asked for. Tensors of other than 1, 3 or 4 channels are taken as latents, of any finite values.
    """
    if isinstance(images, Tensor) and images.ndim == 4:
        if not len(images):
            raise ValueError("there are no training images: give at least one")
        if images.dtype == torch.uint8 and images.shape[1] in (1, 3):
            return images  # type: ignore[return-value]
        if images.is_floating_point():
            finite = images.isfinite().flatten(1).all(1).cpu()
            _refuse(torch.arange(len(images)), finite, "is not finite: leave it out")
        picture = images.shape[1] in CHANNELS and not _latents(images)
        return to_batch(images) if picture else images.float()  # type: ignore[return-value]
    if isinstance(images, (Tensor, np.ndarray, list, tuple, str)):
        return to_batch(images)  # type: ignore[return-value]
    if not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
        raise ValueError(
            f"{type(images).__name__} holds no training images: give a tensor (n, c, h, w) in "
            "[-1, 1], a list of pictures, or FolderImages"
        )
    if not len(images):
        raise ValueError("there are no training images: give at least one")
    return images


def pixels(images: Images, rows: Tensor) -> Tensor:
    """Some images (b, c, h, w), float32 in [-1, 1].

    Raises:
        ValueError: one is not finite, or lies far outside of [-1, 1]; it is named by its number.
    """
    batch: Any = images[rows]
    if not isinstance(batch, Tensor) or batch.ndim != 4 or len(batch) != len(rows):
        shape = tuple(getattr(batch, "shape", ()))
        raise ValueError(
            f"{len(rows)} training images have shape {shape}, expected a tensor "
            f"({len(rows)}, c, h, w)"
        )
    if batch.dtype == torch.uint8:
        return to_float(batch)
    if not batch.is_floating_point():
        raise ValueError(f"training images are {batch.dtype}: give uint8, or floats in -1 to 1")
    batch = batch.float()
    if isinstance(images, Tensor):
        return batch  # checked by `as_images`
    worst = batch.detach().abs().flatten(1).amax(1).cpu()
    _refuse(rows, worst.isfinite(), "is not finite: leave it out")
    if batch.shape[1] in (1, 3) and not hasattr(images, "latents"):
        most = f"has values up to {float(worst.max()):.4g}, expected -1 to 1"
        _refuse(rows, worst <= 1 + LEEWAY, f"{most}: divide 0 to 255 by 127.5 and subtract 1")
    return batch


def embedded(images: Images, encoder: Encoder, rows: Tensor) -> Tensor:
    """Embeddings (b, d) of some images, all finite."""
    own = getattr(images, "embed", None)
    found: Tensor = (
        encoder.encode_image(pixels(images, rows)) if own is None else own(encoder, rows)
    )
    found = found.detach().float().cpu()
    finite = found.flatten(1).isfinite().all(1)
    _refuse(rows, finite, "has an embedding that is not finite: look at the encoder's weights")
    return found


def digest(images: Images) -> str:
    """Hash of training images: of all of them where that is quick, else of some."""
    own = getattr(images, "digest", None)
    if own is not None:
        return str(own())
    n = len(images)
    found = hashlib.sha256(str(n).encode())
    if isinstance(images, Tensor):
        parts: Sequence[Tensor] = images.split(1024)
    else:
        parts = [images[torch.linspace(0, n - 1, min(LOOKED_AT, n)).long()]]
    for part in parts:
        found.update(f"{tuple(part.shape)} {part.dtype}".encode())
        found.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def _refuse(rows: Tensor, good: Tensor, why: str) -> None:
    """Names the first image that is not good."""
    if not bool(good.all()):
        raise ValueError(f"training image {int(rows.cpu()[~good][0])} {why}")


def _latents(images: Tensor) -> bool:
    """Whether a tensor of four channels holds floats, which pictures with transparency never do."""
    return images.shape[1] == 4 and images.is_floating_point()
