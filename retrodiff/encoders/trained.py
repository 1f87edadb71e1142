"""The preprocessing that published weights were trained with, from their own configuration.

timm keeps it in ``pretrained_cfg`` (input size, interpolation, crop, mean and deviation), open_clip
in the entry of a tag, or in the ``open_clip_config.json`` of a repository. The steps are those of
the two packages' own evaluation transforms, on tensors in [-1, 1] and without rounding to bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from math import floor
from typing import Any

from retrodiff.encoders.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    CenterCrop,
    Channels,
    Normalize,
    Preprocessing,
    ResizeAround,
    ResizeShort,
    Size,
    Squash,
    Step,
    openai,
    shown,
)

_STATISTICS: dict[tuple[tuple[float, ...], tuple[float, ...]], str] = {
    (CLIP_MEAN, CLIP_STD): "clip",
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)): "imagenet",
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)): "half",
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)): "unit",
}
"""Names of the usual means and deviations."""


def of_timm(config: Mapping[str, Any], size: Size, channels: int = 3) -> Preprocessing:
    """What timm's evaluation transform does.

    Args:
        config: from `timm.data.resolve_data_config`.
        size: of the images that the network takes.
        channels: of an image; where they are not those of the configuration, the average of its
            mean and deviation stands for each.
    """
    mean, std = (_each(config[name], channels) for name in ("mean", "std"))
    mode = str(config["crop_mode"])
    return trained(
        size,
        mean,
        std,
        str(config["interpolation"]),
        {"center": "short", "border": "inside"}.get(mode, mode),
        crop=float(config["crop_pct"]),
        fill=tuple(round(255 * m) / 127.5 - 1 for m in mean),
    )


def of_open_clip(config: Mapping[str, Any], size: Size) -> Preprocessing:
    """What open_clip's evaluation transform does.

    Args:
        config: ``preprocess_cfg`` of the weights; what it lacks is as open_clip takes it.
        size: of the images that the network takes.
    """
    modes = {"shortest": "short", "longest": "inside"}
    mode = str(config.get("resize_mode") or "shortest")
    return trained(
        size,
        _each(config.get("mean") or CLIP_MEAN, 3),
        _each(config.get("std") or CLIP_STD, 3),
        str(config.get("interpolation") or "bicubic"),
        modes.get(mode, mode),
        fill=(int(config.get("fill_color") or 0) / 127.5 - 1,),
    )


def trained(
    size: Size,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    mode: str,
    *,
    crop: float = 1.0,
    fill: tuple[float, ...] = (-1.0,),
) -> Preprocessing:
    """A resize, a central crop, mean and deviation.

    Args:
        size: of the result.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        interpolation: ``bicubic`` or ``bilinear``, antialiased.
        mode: ``short``: the short side sets the scale; ``inside``: the long side, and the rest is
            padded; ``squash``: both do.
        crop: share of the resized image's side that is kept.
        fill: what is padded with, in [-1, 1].
    """
    if interpolation not in ("bicubic", "bilinear") or mode not in ("short", "inside", "squash"):
        raise ValueError(
            f"the weights ask for a resize by {interpolation!r} and {mode!r}, which is not known "
            'here: choose a preprocessing yourself, preprocessing="openai" for example'
        )
    height, width = (size, size) if isinstance(size, int) else size
    around = floor(height / crop), floor(width / crop)
    side: Size = height if height == width else (height, width)
    resize: Step
    if mode == "squash":
        resize = Squash(around if height != width else around[0], interpolation)
    elif mode == "short" and height == width:
        resize = ResizeShort(around[0], interpolation)
    else:
        resize = ResizeAround(around, interpolation, mode == "inside")
    cut = CenterCrop(side) if mode == "short" else CenterCrop(side, fill)
    steps = (Channels(len(mean)), resize, cut, Normalize(mean, std))
    if height == width and steps == openai(height).steps:
        return openai(height)
    share = "" if crop == 1 else f"-{crop:g}"
    name = f"{mode}-{shown(size)}{share}-{interpolation}-{_named(mean, std)}"
    return Preprocessing(name, steps)


def _each(value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    """One number per channel."""
    numbers = [float(value)] if isinstance(value, int | float) else [float(v) for v in value]
    if len(numbers) == channels:
        return tuple(numbers)
    return (sum(numbers) / len(numbers),) * channels


def _named(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    known = _STATISTICS.get((mean, std))
    text = json.dumps([mean, std])
    return known or hashlib.sha256(text.encode()).hexdigest()[:8]
