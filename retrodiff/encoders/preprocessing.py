"""Resizes and scales images before an encoder takes them.

A preprocessing is part of what an embedding *is*: the same CLIP weights give other vectors after
another resize. Published weights come with one of their own (`trained.py`), which is the default.
Three presets have names. ``rdm``: of the databases released with Blattmann et al. 2022 (straight
bicubic resize, corners aligned, no antialiasing, no crop). ``openai``: the transform that CLIP was
trained with (Radford et al. 2021: bicubic resize of the short side, center crop). ``plain``: for
encoders that you train yourself.

torchvision's transforms are not used, by measurement (benchmarks/preprocessing_parity.py). Against
Pillow, which published weights were trained with, these steps differ by rounding alone (at most 1.1
of 255 levels; 0.5 of it from not rounding). torchvision's differ as little on bytes, but by up to
22 levels on floats cut off at the end and 34 without, since Pillow cuts bicubic overshoot off after
each direction; bytes and the same picture as floats would then have two embeddings. Sizes and
offsets of crops are torchvision's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from retrodiff.pictures.converting import to_float

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

NARROWEST = 100
"""How many times longer than the other one side may be where the short side sets the size."""

LARGE = 2**20
"""Bytes of images from which their channels are resized one after the other."""

Size = int | tuple[int, int]
"""A side, or height and width."""


class Step(Protocol):
    """One step of a preprocessing, from images to images, working on each image alone."""

    def apply(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> images."""
        ...


@dataclass(frozen=True)
class Channels:
    """Repeats a single channel ``n`` times."""

    n: int = 3

    def apply(self, images: Tensor) -> Tensor:
        """Images (b, 1 or n, h, w) -> images (b, n, h, w)."""
        c = images.shape[1]
        if c not in (1, self.n):
            raise ValueError(f"images have {c} channels, the encoder takes 1 or {self.n}")
        return images.expand(-1, self.n, -1, -1)


@dataclass(frozen=True)
class Resize:
    """Resizes to ``size`` and changes the aspect ratio where it must; bicubic may overshoot."""

    size: Size
    mode: str = "bilinear"
    antialias: bool = True
    align_corners: bool = False

    def apply(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> images (b, c, *size)."""
        how: dict[str, Any] = {"antialias": self.antialias, "align_corners": self.align_corners}
        return _resize(images, [_sides(self.size)], {"mode": self.mode, **how})


@dataclass(frozen=True)
class Squash:
    """Resizes to ``size`` and changes the aspect ratio where it must, as Pillow does."""

    size: Size
    mode: str = "bicubic"

    def apply(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> images (b, c, *size) in [-1, 1]."""
        return _like_pillow(images, _sides(self.size), self.mode)


@dataclass(frozen=True)
class ResizeShort:
    """Resizes the short side to ``size``, keeping the aspect ratio, as Pillow does."""

    size: int
    mode: str = "bicubic"

    def apply(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> images in [-1, 1] whose short side is ``size``."""
        h, w = _not_too_narrow(images)
        short = min(h, w)
        to = (int(self.size * h / short), int(self.size * w / short))
        return _like_pillow(images, to, self.mode)


@dataclass(frozen=True)
class ResizeAround:
    """Resizes to cover ``size`` (or to fit into it), keeping the aspect ratio, as Pillow does."""

    size: tuple[int, int]
    mode: str = "bicubic"
    inside: bool = False

    def apply(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> images in [-1, 1], one side of which is that of ``size``."""
        h, w = _not_too_narrow(images)
        ratios = h / self.size[0], w / self.size[1]
        ratio = max(ratios) if self.inside else min(ratios)
        return _like_pillow(images, (max(1, round(h / ratio)), max(1, round(w / ratio))), self.mode)


@dataclass(frozen=True)
class CenterCrop:
    """Cuts the central ``size`` out, and pads where the image is smaller.

    Args:
        size: of the result.
        fill: what is padded with, in [-1, 1]: one number, or one per channel.
    """

    size: Size
    fill: float | tuple[float, ...] = -1.0

    def apply(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> images (b, c, *size)."""
        height, width = _sides(self.size)
        h, w = images.shape[-2:]
        if h < height or w < width:
            images = self._padded(to_float(images), max(height, h), max(width, w))
            h, w = images.shape[-2:]
        top, left = round((h - height) / 2), round((w - width) / 2)
        return images[..., top : top + height, left : left + width]

    def _padded(self, images: Tensor, height: int, width: int) -> Tensor:
        b, c, h, w = images.shape
        fill = images.new_tensor(self.fill).reshape(-1, 1, 1)
        wide = fill.expand(b, c, height, width).clone()
        top, left = (height - h) // 2, (width - w) // 2
        wide[..., top : top + h, left : left + w] = images
        return wide


@dataclass(frozen=True)
class Normalize:
    """From [-1, 1] to ``((x + 1) / 2 - mean) / std``, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> standardized images."""
        images = to_float(images)
        mean = images.new_tensor(self.mean).view(-1, 1, 1)
        std = images.new_tensor(self.std).view(-1, 1, 1)
        return (images * 0.5).add_(0.5).sub_(mean).div_(std)


_STEPS: dict[str, type[Any]] = {
    step.__name__: step
    for step in (Channels, Resize, Squash, ResizeShort, ResizeAround, CenterCrop, Normalize)
}


@dataclass(frozen=True)
class Preprocessing:
    """A named chain of steps; the name tells of everything that changes its result.

    Args:
        name: goes into the fingerprint, such as ``rdm-224``.
        steps: applied in order to images (b, c, h, w) in [-1, 1] of any size.

    Examples:
        >>> import torch
        >>> from retrodiff.encoders import TimmEncoder
        >>> preprocessing = TimmEncoder("test_resnet", image_size=32).preprocessing
        >>> preprocessing.name, preprocessing.apply(torch.zeros(1, 3, 48, 64)).shape
        ('short-32-0.95-bilinear-half', torch.Size([1, 3, 32, 32]))
    """

    name: str
    steps: tuple[Step, ...]

    def apply(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> what the network takes.

        Raises:
            ValueError: images are not (b, c, h, w), or no floats.
        """
        if images.ndim != 4:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected (b, c, h, w): "
                "add the batch axis with image[None]"
            )
        if not images.is_floating_point() and images.dtype != torch.uint8:
            raise ValueError(
                f"images are {images.dtype}, expected floats in [-1, 1]: images / 127.5 - 1"
            )
        for step in self.steps:
            images = step.apply(images)
        return to_float(images)

    def config(self) -> dict[str, Any]:
        """The preprocessing as JSON-able values; `from_config` is the way back."""
        steps = [
            {"step": type(step).__name__, **{f.name: getattr(step, f.name) for f in fields(step)}}  # pyright: ignore[reportArgumentType]
            for step in self.steps
        ]
        return {"name": self.name, "steps": steps}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Preprocessing:
        """The preprocessing that `config` described.

        Raises:
            ValueError: a step is not known.
        """
        steps: list[Step] = []
        for step in config["steps"]:
            values: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in step.items()
            }
            kind = values.pop("step")
            if kind not in _STEPS:
                raise ValueError(f"unknown preprocessing step {kind!r}; known: {', '.join(_STEPS)}")
            steps.append(_STEPS[kind](**values))
        return cls(config["name"], tuple(steps))


def rdm(size: int) -> Preprocessing:
    """Straight bicubic resize, corners aligned, no antialiasing, no crop (Blattmann et al.)."""
    resize = Resize(size, "bicubic", antialias=False, align_corners=True)
    return Preprocessing(f"rdm-{size}", (Channels(), resize, Normalize(CLIP_MEAN, CLIP_STD)))


def openai(size: int) -> Preprocessing:
    """Antialiased bicubic resize of the short side, then center crop (Radford et al. 2021)."""
    steps = (Channels(), ResizeShort(size), CenterCrop(size), Normalize(CLIP_MEAN, CLIP_STD))
    return Preprocessing(f"openai-{size}", steps)


def plain(size: Size, channels: int = 3) -> Preprocessing:
    """Antialiased bilinear resize where the size differs; values stay in [-1, 1]."""
    name = f"plain-{shown(size)}" + ("" if channels == 3 else f"x{channels}")
    return Preprocessing(name, (Channels(channels), Resize(size)))


PRESETS = {"rdm": rdm, "openai": openai, "plain": plain}


def preprocessing_from(
    choice: str | Preprocessing | dict[str, Any] | None,
    size: Size,
    own: Preprocessing,
    channels: int = 3,
) -> Preprocessing:
    """The preprocessing that a choice stands for.

    Args:
        choice: name of a preset, a finished one, the ``config()`` of one; ``own`` or None: ``own``.
        size: of the images that the network takes.
        own: that of the weights.
        channels: of an image.
    """
    if choice is None or choice == "own":
        return own
    if isinstance(choice, Preprocessing):
        return choice
    if isinstance(choice, dict):
        return Preprocessing.from_config(choice)
    if choice not in PRESETS:
        raise ValueError(
            f"unknown preprocessing {choice!r}; known: own (that of the weights), "
            f"{', '.join(PRESETS)}"
        )
    if choice == "plain":
        return plain(size, channels)
    height, width = _sides(size)
    if height != width:
        raise ValueError(f"preprocessing {choice!r} makes squares, the network takes {size}")
    return PRESETS[choice](height)


def shown(size: Size) -> str:
    """A size as names have it: ``224``, or ``1024x768`` for height and width."""
    height, width = _sides(size)
    return str(height) if height == width else f"{height}x{width}"


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _not_too_narrow(images: Tensor) -> tuple[int, int]:
    """Height and width, where a side set by the other one stays of a sensible length."""
    h, w = images.shape[-2:]
    if max(h, w) > NARROWEST * min(h, w):
        raise ValueError(
            f"an image has {w} x {h} pixels: one side is more than {NARROWEST} times the other"
        )
    return h, w


def _like_pillow(images: Tensor, to: tuple[int, int], mode: str) -> Tensor:
    """Antialiased; rows first, and cut off at -1 and 1 after each direction; without rounding."""
    if mode == "bilinear":
        return _resize(images, [to], {"mode": mode, "antialias": True})
    steps = [(images.shape[-2], to[1]), to]
    return _resize(images, steps, {"mode": mode, "antialias": True}, clamp=True)


def _resize(
    images: Tensor, steps: list[tuple[int, int]], how: dict[str, Any], clamp: bool = False
) -> Tensor:
    """Images (b, c, h, w), floats or uint8 -> floats of another size, by way of some sizes."""

    def resized(part: Tensor) -> Tensor:
        part = to_float(part)
        for to in steps:
            if part.shape[-2:] != torch.Size(to):
                part = interpolate(part, to, **how)
                part = part.clamp(-1, 1) if clamp else part
        return part

    changes = images.shape[-2:] != torch.Size(steps[-1])
    if images.dtype == torch.uint8 and images.numel() > LARGE and changes:
        # Channel by channel: floats take four times the memory.
        return torch.cat([resized(channel) for channel in images.split(1, 1)], 1)
    return resized(images)
