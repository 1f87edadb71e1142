"""Small encoders trained from scratch: CLIP on captioned images, SimCLR on images alone.

For data that no published encoder knows, and for machines that cannot download one. With a
published CLIP at hand, use that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrodiff.encoders import CLIPEncoder, TimmEncoder
from retrodiff.interfaces import unit
from retrodiff.numbers import real, whole
from retrodiff.training.images import as_images, pixels
from retrodiff.training.optimize import Part, optimize
from retrodiff.training.rates import LearningRate

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Images (b, c, h, w) and randomness -> other views of the same images."""


def fit_clip(
    encoder: CLIPEncoder,
    images: Tensor,
    captions: Sequence[str],
    *,
    steps: int,
    batch_size: int,
    lr: LearningRate | float,
    augment: Augment | None = None,
    weight_decay: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Trains a CLIP in place (Radford et al. 2021); images of the same caption are all right.

    With few distinct captions a batch holds many correct pairs; their targets share the
    probability (UniCL, Yang et al. 2022).

    Args:
        encoder: made by `CLIPEncoder.from_config`.
        images: (n, c, h, w) in [-1, 1].
        captions: n texts.
        steps: steps in all.
        batch_size: pairs per step.
        lr: learning rate: a number, or by step.
        augment: changes the images of a batch.
        weight_decay: of AdamW.
        seed: of everything random.
        progress: show a bar.

    Returns:
        The loss of every step (steps,).
    """
    if isinstance(captions, str):
        raise ValueError("captions is one text: give a list with one for each image")
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions: give one for each")
    batch_size = whole("batch_size", batch_size)
    shown = as_images(images)
    distinct = list(dict.fromkeys(captions))
    number = {text: i for i, text in enumerate(distinct)}
    which = torch.tensor([number[text] for text in captions])
    tokens = encoder.tokenize(distinct)

    def loss(_: nn.Module, part: Part) -> Tensor:
        generator = part.generator
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        batch = pixels(shown, rows)
        batch = batch if augment is None else augment(batch, generator)
        present, at = which[rows].unique(return_inverse=True)
        image = unit(encoder.image_features(batch))
        text = unit(encoder.text_features(tokens[present]))[at]
        logits = encoder.model.logit_scale.exp().clamp(max=100) * image @ text.T
        same = (at[:, None] == at[None, :]).float()
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return optimize(
        encoder,
        loss,
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        progress=progress,
        what="CLIP",
    )


def fit_views(
    encoder: TimmEncoder,
    images: Tensor,
    augment: Augment,
    *,
    steps: int,
    batch_size: int,
    lr: LearningRate | float,
    temperature: float = 0.2,
    weight_decay: float = 1e-4,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Trains an encoder in place so that two views of an image lie close (SimCLR: Chen 2020).

    Args:
        encoder: any timm network.
        images: (n, c, h, w) in [-1, 1].
        augment: makes a view.
        steps: steps in all.
        batch_size: images per step.
        lr: learning rate: a number, or by step.
        temperature: of the contrast.
        weight_decay: of AdamW.
        seed: of everything random.
        progress: show a bar.

    Returns:
        The loss of every step (steps,).
    """
    batch_size, temperature = (
        whole("batch_size", batch_size, 2),
        real("temperature", temperature, above=0),
    )
    shown = as_images(images)
    if len(images) < 2:
        raise ValueError("one image has no others to be compared with: give two or more")

    def loss(_: nn.Module, part: Part) -> Tensor:
        generator = part.generator
        rows = torch.randperm(len(images), generator=generator)[:batch_size]
        batch = pixels(shown, rows)
        views = torch.cat([augment(batch, generator), augment(batch, generator)])
        z = unit(encoder.features(views))
        logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
        n = len(rows)
        other = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
        return F.cross_entropy(logits, other)

    return optimize(
        encoder,
        loss,
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        progress=progress,
        what="encoder",
    )


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Three quarters of each image at a random place, half of them mirrored: views for `fit_views`.

    Args:
        images: (b, c, h, w) in [-1, 1].
        generator: of places and mirroring, one of each per image.

    Returns:
        (b, c, 3h/4, 3w/4).
    """
    b, _, h, w = images.shape
    high, wide = max(1, 3 * h // 4), max(1, 3 * w // 4)
    tops = torch.randint(h - high + 1, (b,), generator=generator).tolist()
    lefts = torch.randint(w - wide + 1, (b,), generator=generator).tolist()
    mirrored = (torch.rand(b, generator=generator) < 0.5).tolist()
    views = [
        image[:, top : top + high, left : left + wide]
        for image, top, left in zip(images, tops, lefts, strict=True)
    ]
    return torch.stack([v.flip(-1) if m else v for v, m in zip(views, mirrored, strict=True)])
