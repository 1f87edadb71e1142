"""How images are resized and scaled before an encoder sees them.

A preprocessing is part of what an embedding *is*: the same CLIP weights give other vectors after
another resize. Three presets are named. ``rdm``: what the databases released with Blattmann et al.
2022 were made with (straight bicubic resize, corners aligned, no antialiasing, no crop).
``openai``: the transform that CLIP was trained with (Radford et al. 2021: bicubic resize of the
short side, center crop). ``plain``: for small encoders of one's own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from retrodiff.pictures import to_float

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
    """Resizes to ``size`` x ``size`` and changes the aspect ratio where it must."""

    size: int
    mode: str = "bilinear"
    antialias: bool = True
    align_corners: bool = False

    def apply(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> images (b, c, size, size)."""
        return _resize(
            images, (self.size, self.size), self.mode, self.antialias, self.align_corners
        )


@dataclass(frozen=True)
class ResizeShort:
    """Resizes the short side to ``size``, keeping the aspect ratio; stays within [-1, 1]."""

    size: int
    mode: str = "bicubic"

    def apply(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> images whose short side is ``size``."""
        h, w = images.shape[-2:]
        short = min(h, w)
        to = (int(self.size * h / short), int(self.size * w / short))
        return _resize(images, to, self.mode, True, False).clamp(-1, 1)


@dataclass(frozen=True)
class CenterCrop:
    """Cuts the central ``size`` x ``size`` out."""

    size: int

    def apply(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> images (b, c, size, size)."""
        h, w = images.shape[-2:]
        top, left = round((h - self.size) / 2), round((w - self.size) / 2)
        return images[..., top : top + self.size, left : left + self.size]


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
        return (images * 0.5 + 0.5 - mean) / std


_STEPS: dict[str, type[Any]] = {
    step.__name__: step for step in (Channels, Resize, ResizeShort, CenterCrop, Normalize)
}


@dataclass(frozen=True)
class Preprocessing:
    """A named chain of steps; the name says everything that changes its result.

    Args:
        name: goes into the fingerprint, such as ``rdm-224``.
        steps: applied in order to images (b, c, h, w) in [-1, 1] of any size.
    """

    name: str
    steps: tuple[Step, ...]

    def apply(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> what the network takes."""
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
        """The preprocessing that `config` described."""
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


def plain(size: int, channels: int = 3) -> Preprocessing:
    """Antialiased bilinear resize where the size differs; values stay in [-1, 1]."""
    name = f"plain-{size}" if channels == 3 else f"plain-{size}x{channels}"
    return Preprocessing(name, (Channels(channels), Resize(size)))


PRESETS = {"rdm": rdm, "openai": openai, "plain": plain}


def preprocessing_from(
    choice: str | Preprocessing | dict[str, Any], size: int, channels: int = 3
) -> Preprocessing:
    """The preprocessing that a preset's name, a config or a finished one stands for."""
    if isinstance(choice, Preprocessing):
        return choice
    if isinstance(choice, dict):
        return Preprocessing.from_config(choice)
    if choice not in PRESETS:
        raise ValueError(f"unknown preprocessing {choice!r}; presets: {', '.join(PRESETS)}")
    if choice == "plain":
        return plain(size, channels)
    return PRESETS[choice](size)


def _resize(
    images: Tensor, to: tuple[int, int], mode: str, antialias: bool, align_corners: bool
) -> Tensor:
    """Images (b, c, h, w), floats or uint8 -> floats in [-1, 1] of another size."""
    if images.shape[-2:] == torch.Size(to):
        return to_float(images)
    how: dict[str, Any] = {"mode": mode, "antialias": antialias, "align_corners": align_corners}
    if images.dtype == torch.uint8:  # channel by channel: floats take four times the memory
        return torch.cat([interpolate(to_float(c), to, **how) for c in images.split(1, 1)], 1)
    return interpolate(images, to, **how)
