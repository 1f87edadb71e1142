"""Turns pictures of any usual kind into tensors, and refuses those whose meaning is open.

Everything that takes pictures takes the same ones: `to_image` one of them, `to_images` several,
`to_batch` several of one size. What a number means follows from its type, in every place alike:

======================  ====================================================================
kind                    taken as
======================  ====================================================================
path, encoded bytes     the picture file, read by `read_image`
PIL image               its pixels, upright, on white
uint8                   0 to 255
bool                    black and white
uint16                  0 to 65535; refused if no value is above 255, unless all are 0
other integers          0 to 255; refused beyond, and where nothing but 0 and 1 occurs
floats                  -1 to 1, up to a quarter beyond, as resizing leaves it; refused further
                        out and where not finite; warned about where all lie in 0 to 1
======================  ====================================================================

Arrays are (c, h, w) or (h, w, c) with 1, 3 or 4 channels, or gray (h, w). Where both layouts fit, a
tensor is (c, h, w), and a numpy array or a list of numbers is refused. Four channels are uint8 or
bool RGBA and are laid on white.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.pictures.decoding import UnreadableImage, from_pil, read_image
from retrodiff.text import printable

CHANNELS = (1, 3, 4)
LEEWAY = 0.25
"""How far beyond [-1, 1] floats may lie: bicubic resizing overshoots by as much."""


class PixelRange(UserWarning):
    """Warning of pixels that are taken as [-1, 1], though they look like [0, 1].

    Examples:
        >>> import warnings
        >>> from retrodiff.pictures import PixelRange
        >>> warnings.simplefilter("error", PixelRange)  # refuse pixels that look like [0, 1]
        >>> warnings.simplefilter("default", PixelRange)
    """


def to_image(picture: Any, *, name: str = "image") -> Tensor:
    """One picture -> (c, h, w), uint8 in [0, 255] or float32 in [-1, 1]; c is 1 or 3.

    Tensors stay on their device, and keep their gradient.

    Args:
        picture: a path, encoded bytes, a PIL image, a tensor, an array, or nested lists of numbers.
        name: what errors call it.

    Raises:
        ValueError: its type, shape or range is none of those that the module's table names.
        UnreadableImage: a file or PIL image that cannot be decoded (a ValueError too).
    """
    if _is_file(picture) or _is_pil(picture):
        return _decoded(picture, name)
    array = _tensor(picture, name)
    if array.ndim not in (2, 3):
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}, expected one picture: (c, h, w), (h, w, c) or "
            "(h, w)"
        )
    numbers = not isinstance(picture, Tensor)
    return _pixels(_channels_first(array, numbers, name), name)


def to_images(pictures: Any, *, name: str = "images") -> list[Tensor]:
    """Pictures -> a list of (c, h, w), each uint8 in [0, 255] or float32 in [-1, 1]; c is 1 or 3.

    Gray ones become (3, h, w) where others of them have colors.

    Args:
        pictures: a list of whatever `to_image` takes, an array (b, c, h, w), (b, h, w, c) or
            (b, h, w), or a single path, bytes or PIL image.
        name: what errors call them.

    Raises:
        ValueError: as `to_image`, for the picture that its number names.
    """
    if _is_file(pictures) or _is_pil(pictures):
        return [_decoded(pictures, name)]
    if isinstance(pictures, Tensor | np.ndarray):
        images = list(_pixels(_batch(pictures, name), name))
    elif isinstance(pictures, Iterable) and not isinstance(pictures, dict):
        images = [to_image(one, name=f"{name}[{i}]") for i, one in enumerate(pictures)]
    else:
        raise _unknown(pictures, name)
    warn_of_range(images, name)
    colors = any(len(image) == 3 for image in images)
    return [image.expand(3, -1, -1) for image in images] if colors else images


def to_batch(pictures: Any, *, name: str = "images") -> Tensor:
    """Pictures of one size -> (b, c, h, w) float32 in [-1, 1]; c is 1 or 3.

    A float32 tensor that is right already is given back as it is, without a copy.

    Args:
        pictures: whatever `to_images` takes.
        name: what errors call them.

    Raises:
        ValueError: as `to_images`; or the sizes differ, or there are none.
    """
    if isinstance(pictures, Tensor | np.ndarray):
        batch = _pixels(_batch(pictures, name), name)
        warn_of_range([batch], name)
        return to_float(batch)
    images = to_images(pictures, name=name)
    if not images:
        raise ValueError(f"{name} is empty: give at least one picture")
    for i, image in enumerate(images):
        if image.shape != images[0].shape:
            (h, w), (h0, w0) = image.shape[-2:], images[0].shape[-2:]
            raise ValueError(
                f"{name}[0] has {w0} x {h0} pixels, {name}[{i}] {w} x {h}: give pictures of one "
                "size"
            )
    return torch.stack([to_float(image) for image in images])


def to_float(image: Tensor) -> Tensor:
    """Pixels (..., h, w) of uint8 in [0, 255], or floats in [-1, 1] -> float32 in [-1, 1]."""
    if image.dtype == torch.uint8:
        return image.float().div_(127.5).sub_(1)  # in place: large batches are bound by memory
    return image.float()


def to_bytes(image: Tensor) -> Tensor:
    """Pixels (..., h, w) of floats in [-1, 1], or uint8 in [0, 255] -> uint8 in [0, 255]."""
    if image.dtype == torch.uint8:
        return image
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def warn_of_range(images: Sequence[Tensor], name: str) -> None:
    """Warns where all floats lie in [0, 1]: right for bright pictures, wrong for most."""
    floats = [i.detach() for i in images if i.is_floating_point() and i.numel()]
    if not floats:
        return
    low = min(float(i.min()) for i in floats)
    high = max(float(i.max()) for i in floats)
    if 0 <= low < high <= 1:
        warnings.warn(
            f"{name} holds floats from {low:.4g} to {high:.4g} and is taken as -1 to 1: if 0 is "
            f"black, give {name} * 2 - 1",
            PixelRange,
            stacklevel=3,
        )


def _is_file(value: Any) -> bool:
    return isinstance(value, str | Path | bytes | bytearray | memoryview)


def _is_pil(value: Any) -> bool:
    return hasattr(value, "getexif") and hasattr(value, "mode")  # without importing Pillow


def _decoded(picture: Any, name: str) -> Tensor:
    try:
        if _is_pil(picture):
            return from_pil(picture)
        if isinstance(picture, str | Path):
            return read_image(picture)
        return read_image(bytes(picture))
    except UnreadableImage as error:
        if isinstance(picture, str | Path):
            shown = printable(picture)
            name = f"{name}={shown if len(shown) <= 100 else shown[:100] + '…'}"
        raise UnreadableImage(f"{name}: {error}") from None


def _tensor(value: Any, name: str) -> Tensor:
    """An array or nested lists as a tensor of the same numbers."""
    if isinstance(value, Tensor):
        return value.detach() if value.is_quantized else value
    if not isinstance(value, np.ndarray):
        if not isinstance(value, Sequence) and not hasattr(value, "__array__"):
            raise _unknown(value, name)
        try:
            value = np.asarray(value)
        except (ValueError, TypeError):
            raise _unknown(value, name) from None
    if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
        raise ValueError(
            f"{name} is an array of {value.dtype}, expected uint8 in 0 to 255 or floats in -1 to 1"
        )
    native = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def _channels_first(array: Tensor, numbers: bool, name: str) -> Tensor:
    """One picture of any layout -> (c, h, w)."""
    if array.ndim == 2:
        return array[None]
    first, last = array.shape[0] in CHANNELS, array.shape[-1] in CHANNELS
    if not first and not last:
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}, expected 1, 3 or 4 channels, first or last"
        )
    if first and last and numbers:
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}, which may be (c, h, w) or (h, w, c): give a "
            "torch tensor (c, h, w)"
        )
    return array if first else array.permute(2, 0, 1)


def _batch(pictures: Tensor | np.ndarray, name: str) -> Tensor:
    """An array of several pictures -> (b, c, h, w)."""
    array = _tensor(pictures, name)
    shape = tuple(array.shape)
    if array.ndim == 3 and not {shape[0], shape[-1]} & set(CHANNELS):
        return array[:, None]
    if array.ndim != 4:
        raise ValueError(
            f"{name} has shape {shape}, expected (b, c, h, w): add the batch axis with {name}[None]"
        )
    first, last = shape[1] in CHANNELS, shape[-1] in CHANNELS
    if first and (isinstance(pictures, Tensor) or not last):
        return array
    if first or not last:
        raise ValueError(
            f"{name} has shape {shape}, expected (b, c, h, w) with 1, 3 or 4 channels"
            + (": give a torch tensor, since (b, h, w, c) fits too" if first else "")
        )
    return array.permute(0, 3, 1, 2)


def _pixels(array: Tensor, name: str) -> Tensor:
    """Numbers (..., c, h, w) -> uint8 in [0, 255] or float32 in [-1, 1], with 1 or 3 channels."""
    if array.is_complex():
        raise ValueError(f"{name} holds {array.dtype}, expected uint8 or floats in -1 to 1")
    if array.is_floating_point():
        pixels = _floats(array, name)
    else:
        pixels = _bytes(array, name)
    if pixels.shape[-3] == 4:
        if pixels.is_floating_point():
            raise ValueError(f"{name} has 4 channels of floats: give 3, laid on a background")
        colors, alpha = pixels[..., :3, :, :].float(), pixels[..., 3:, :, :].float() / 255
        pixels = (colors * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    return pixels


def _floats(array: Tensor, name: str) -> Tensor:
    array = array.float()
    if array.numel():
        low, high = (float(v) for v in torch.aminmax(array.detach()))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"{name} holds values that are not finite")
        if max(-low, high) > 1 + LEEWAY:
            raise ValueError(
                f"{name} holds floats from {low:.4g} to {high:.4g}, expected -1 to 1: divide 0 to "
                "255 by 127.5 and subtract 1"
            )
    return array


def _bytes(array: Tensor, name: str) -> Tensor:
    if array.dtype == torch.uint8 or not array.numel():
        return array.to(torch.uint8)
    if array.dtype == torch.bool:
        return array.to(torch.uint8) * 255
    kind = str(array.dtype).removeprefix("torch.")
    array = array.to(torch.int64)  # of uint16 and its like torch knows little
    low, high = (int(v) for v in torch.aminmax(array))
    if kind == "uint16" and high > 255:
        return (array + 128).div(257, rounding_mode="floor").to(torch.uint8)
    if low == high == 0 or (kind != "uint16" and low >= 0 and 1 < high <= 255):
        return array.to(torch.uint8)
    raise ValueError(
        f"{name} holds {kind} from {low} to {high}, which is no clear range of pixels: give uint8 "
        "in 0 to 255, or floats in -1 to 1"
    )


def _unknown(value: Any, name: str) -> ValueError:
    return ValueError(
        f"{name} is {type(value).__name__}, expected a picture: a path, encoded bytes, a PIL "
        "image, a tensor, or an array of numbers"
    )
