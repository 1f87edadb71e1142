"""Reads any picture as RGB and refuses what is no picture.

The orientation that EXIF names is applied; palettes, CMYK and 16 bits become 8-bit RGB;
transparency lies on white; of an animation the first frame counts. Metadata that cannot be read
never costs the picture. A picture takes at most about ten bytes per pixel while it is read, and
Pillow's limit on pixels (``PIL.Image.MAX_IMAGE_PIXELS``, 89,478,485) is the limit here.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from retrodiff.text import printable

STRIP = 2**20
"""Pixels that are converted at a time."""

UNSUPPORTED = frozenset({"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "PDF", "FITS"})
"""Formats of Pillow that are not read: they start another program, hold no pixels, or (FITS) unfold
without a limit."""

FULL_SCALE = frozenset({"PNG", "PPM", "JPEG2000"})
"""Formats that say which value is white; in others 0..255 are taken as 8 bits, however stored."""


class UnreadableImage(ValueError):
    """A file that is no picture, or only a part of one, or too large to be decoded."""


def read_image(file: str | Path | bytes | BinaryIO) -> Tensor:
    """A picture as uint8 (3, h, w).

    Args:
        file: its path, its bytes, or an open file. Pipes, sockets and devices are never opened.

    Raises:
        UnreadableImage: truncated, not an image, or more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    if isinstance(file, str | Path):
        if (problem := not_a_file(file)) is not None:
            raise UnreadableImage(problem)
        try:
            with open(file, "rb") as opened:
                return _read(opened)
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from None
    return _read(io.BytesIO(file) if isinstance(file, bytes) else file)


def not_a_file(path: str | Path) -> str | None:
    """Why a path cannot be read as a file, found out without opening it; None where it can."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # a zero byte in the name
        return str(error)
    if stat.S_ISREG(mode):
        return None
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return f"{kinds.get(stat.S_IFMT(mode), 'something else')}, not a file"


def from_pil(image: Any) -> Tensor:
    """A PIL image, not yet loaded perhaps, as uint8 (3, h, w).

    Raises:
        UnreadableImage: its pixels cannot be decoded, or there are more than
            ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    try:
        return _decoded(image)
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(_reason(error)) from None


def looks_like_picture(head: bytes) -> bool:
    """Whether a file that begins with these bytes (16 or more) is of a format that is read."""
    from PIL import Image

    for name in formats():
        accept = Image.OPEN[name][1]
        if accept is not None and len(head) >= 4:
            try:
                if accept(head[:16]) is True:  # a string says that the format lacks its library
                    return True
            except Exception:
                continue
    return False


def formats() -> list[str]:
    """The formats that are read, as Pillow names them; plugins such as pillow-heif add theirs."""
    from PIL import Image

    Image.init()
    return [name for name in Image.ID if name not in UNSUPPORTED]


def _read(opened: BinaryIO) -> Tensor:
    from PIL import Image

    start = opened.tell()
    try:
        try:
            return _opened(opened)
        except (UnreadableImage, Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise
        except Exception:
            opened.seek(start)
            if (bare := _bare_png(opened)) is None:
                raise
            return _opened(io.BytesIO(bare))
    except UnreadableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large() from None
    except Image.UnidentifiedImageError:
        raise UnreadableImage("not an image") from None
    except Exception as error:
        # Pillow's decoders raise nearly anything on broken bytes.
        raise UnreadableImage(_reason(error)) from None


def _opened(opened: BinaryIO) -> Tensor:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(opened, formats=formats()) as image:
            return _decoded(image)


def _bare_png(opened: BinaryIO) -> bytes | None:
    """A PNG without what describes it (texts, profiles, Exif), as far as it goes; None: no PNG.

    Pillow refuses the picture for a damaged or large description.
    """
    signature = b"\x89PNG\r\n\x1a\n"
    if opened.read(8) != signature:
        return None
    kept = [signature]
    while len(head := opened.read(8)) == 8:
        (length,) = struct.unpack(">I", head[:4])
        if head[4:] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept += [head, opened.read(length + 4)]
        else:
            opened.seek(length + 4, os.SEEK_CUR)
    return b"".join(kept)


def _decoded(image: Any) -> Tensor:
    """The pixels of an image as RGB, upright; converted strip by strip into their place."""
    from PIL import Image

    w, h = image.size
    if Image.MAX_IMAGE_PIXELS is not None and w * h > Image.MAX_IMAGE_PIXELS:
        raise _too_large()
    if w * h == 0:
        raise UnreadableImage(f"{w} x {h} pixels")
    try:
        image.load()
    except (struct.error, SyntaxError, TypeError, KeyError, ValueError):
        # Pillow turns a TIFF upright at the end, and may stumble over another tag of its Exif.
        if image.format != "TIFF" or image.tile:
            raise
    w, h = image.size
    orientation = _orientation(image)
    upright = np.empty((3, w, h) if orientation >= 5 else (3, h, w), np.uint8)
    place = _as_stored(upright, orientation)
    scale = _scale(image)
    rows = max(STRIP // w, 1)
    for y in range(0, h, rows):
        strip = image.crop((0, y, w, min(y + rows, h)))
        place[:, y : y + rows] = np.moveaxis(_rgb(strip, scale), -1, 0)
    return torch.from_numpy(upright)


def _orientation(image: Any) -> int:
    """EXIF's number 1 to 8 of how the pixels are stored; 1, upright, where it cannot be read."""
    try:
        found = image.getexif().get(0x0112)
    except Exception:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """A view of the upright pixels (3, h, w), in the order in which the file stores them."""
    turned = upright.transpose(0, 2, 1)
    return {
        2: upright[:, :, ::-1],
        3: upright[:, ::-1, ::-1],
        4: upright[:, ::-1],
        5: turned,
        6: turned[:, ::-1],
        7: turned[:, ::-1, ::-1],
        8: turned[:, :, ::-1],
    }.get(orientation, upright)


def _scale(image: Any) -> float | None:
    """The value that is white, for an image of more than 8 bits; None for others."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return None
    bounds = _bounds(image)
    if not np.isfinite(bounds).all():
        raise UnreadableImage("holds values that are not finite")
    low, high = bounds
    if image.mode == "F":  # [0, 1] or [0, 255] by habit
        white = 1.0 if high <= 1 else 255.0
        if low < -white / 255 or high > white * 256 / 255:
            raise UnreadableImage(
                f"holds floats from {low:.4g} to {high:.4g}, neither 0 to 1 nor 0 to 255"
            )
        return white
    if low < 0 or high > 65535:
        raise UnreadableImage(f"holds integers from {low:.0f} to {high:.0f}, not 0 to 65535")
    if image.format in FULL_SCALE or high > 255:
        return 65535.0
    if high == 1:
        raise UnreadableImage("holds nothing but the integers 0 and 1, a mask and no picture")
    return 255.0


def _bounds(image: Any) -> tuple[float, float]:
    w, h = image.size
    rows = max(STRIP // w, 1)
    strips = (image.crop((0, y, w, min(y + rows, h))) for y in range(0, h, rows))
    lows, highs = zip(*((a.min(), a.max()) for a in map(np.asarray, strips)), strict=True)
    return float(np.min(lows)), float(np.max(highs))


def _rgb(image: Any, white: float | None) -> np.ndarray:
    """A PIL image -> uint8 (h, w, 3), or (h, w, 1) where it is gray."""
    from PIL import Image

    if white is not None:
        values = np.asarray(image).astype(np.float64)
        return (values / white * 255).round().clip(0, 255).astype(np.uint8)[..., None]
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _too_large() -> UnreadableImage:
    from PIL import Image

    return UnreadableImage(f"more than {Image.MAX_IMAGE_PIXELS} pixels")


def _reason(error: Exception) -> str:
    return f"broken image: {printable(' '.join(str(error).split()) or type(error).__name__)}"
