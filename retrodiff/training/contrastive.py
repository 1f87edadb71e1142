"""Small encoders trained from scratch: CLIP on captioned images, SimCLR on images alone.

For data that no published encoder knows, and for machines that cannot download one. With a
published CLIP at hand, use that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrodiff.encoders import CLIPEncoder, TimmEncoder
from retrodiff.interfaces import unit
from retrodiff.numbers import real, whole
from retrodiff.training.augment import Augmentation
from retrodiff.training.distillation import Taught, Teachers
from retrodiff.training.ema import NamedEMA
from retrodiff.training.images import as_images, digest, pixels
from retrodiff.training.optimize import Part, optimize
from retrodiff.training.phrasings import Phrasings
from retrodiff.training.rates import LearningRate

DISTANCE = 10.0
"""Weight of a cosine distance beside cross-entropies, which are some ten times larger."""


def fit_clip(
    encoder: CLIPEncoder,
    images: Any,
    captions: Sequence[str] | Sequence[Sequence[str]],
    *,
    steps: int,
    batch_size: int,
    lr: LearningRate | float,
    augment: Augmentation | None = None,
    teachers: Teachers | None = None,
    ema: float | None = None,
    weight_decay: float = 0.1,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Tensor:
    """Trains a CLIP in place (Radford et al. 2021); images of the same caption are all right.

    A batch may hold more than one right caption for an image; their targets share the probability
    (UniCL, Yang et al. 2022).

    Args:
        encoder: made by `CLIPEncoder.from_config`.
        images: (n, c, h, w) in [-1, 1], or whatever `fit` takes as training images.
        captions: n texts; or n lists of them, of which each step takes one at random. A text that
            is in the lists of several images is right for all of them.
        steps: steps in all.
        batch_size: pairs per step.
        lr: learning rate: a number, or by step.
        augment: changes the images of a batch.
        teachers: features of other networks to learn from.
        ema: decay of an average of the weights, which the encoder has in the end; None: the last
            weights.
        weight_decay: of AdamW.
        seed: of everything random.
        checkpoint: file that keeps the state; see `optimize`.
        checkpoint_every: steps between checkpoints.
        resume: continue from the checkpoint if it exists.
        overwrite: replace the checkpoint of another training.
        progress: show a bar.

    Returns:
        The loss of every step (steps,).

    Raises:
        ValueError: not one caption, or one row of the teacher's features, for each image; a
            checkpoint of other captions, images or teachers.
    """
    batch_size = whole("batch_size", batch_size)
    shown = as_images(images)
    phrasings = Phrasings(captions, len(shown))
    tokens = encoder.tokenize(phrasings.texts)
    teachers = teachers or Teachers()
    if teachers.images is not None and len(teachers.images) != len(shown):
        raise ValueError(
            f"{len(shown)} images and {len(teachers.images)} rows of the teacher's features of "
            "them: give one for each"
        )
    taught = Taught(encoder, teachers)
    others = encoder.tokenize(teachers.texts) if taught.text_head is not None else None
    known = phrasings.numbers_in(teachers.texts)

    def loss(_: nn.Module, part: Part) -> Tensor:
        generator = part.generator
        rows = torch.randint(len(shown), (batch_size,), generator=generator)
        batch = pixels(shown, rows)
        batch = batch if augment is None else augment(batch, generator)
        chosen = phrasings.choose(rows, generator)
        right = phrasings.match(rows, chosen).float().to(encoder.device)
        present, at = chosen.unique(return_inverse=True)
        image = unit(encoder.image_features(batch))
        text = unit(encoder.text_features(tokens[present]))
        scale = encoder.model.logit_scale.exp().clamp(max=100)
        total = _contrast(scale * image @ text[at].T, right)
        total = total + DISTANCE * teachers.image_weight * taught.image_loss(image, rows)
        if others is None:
            return total
        place = known[chosen]
        if bool((here := place >= 0).any()):
            aimed = taught.text_targets(place[here])
            guided = _contrast(scale * image @ aimed.T, right[:, here])
            total = total + teachers.text_weight * guided
        more = torch.randint(len(others), (teachers.texts_per_step,), generator=generator)
        told = torch.cat([text[at][here], unit(encoder.text_features(others[more]))])
        aimed = taught.text_targets(torch.cat([place[here], more])).detach()
        return total + DISTANCE * teachers.text_weight * (1 - (told * aimed).sum(-1)).mean()

    module = taught if taught.heads() else encoder
    average = None if ema is None else NamedEMA(module, ema)
    run: dict[str, Any] = {"batch_size": batch_size}
    if checkpoint is not None:  # hashes take a while
        run |= {"images": digest(shown), "captions": phrasings.digest()}
        run |= {"teachers": teachers.describe()}
    losses = optimize(
        module,
        loss,
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        ema=[] if average is None else [average],
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        overwrite=overwrite,
        run=run,
        progress=progress,
        what="CLIP",
    )
    if average is not None:
        average.copy_to(module)
    return losses


def _contrast(logits: Tensor, right: Tensor) -> Tensor:
    """Cross-entropy from images to texts and back; what is right shares the probability."""
    losses: list[Tensor] = []
    for scores, target in ((logits, right), (logits.T, right.T)):
        share = target.sum(1, keepdim=True)
        losses.append(F.cross_entropy(scores, target / share.clamp(min=1)))
    return (losses[0] + losses[1]) / 2


def fit_views(
    encoder: TimmEncoder,
    images: Tensor,
    augment: Augmentation,
    *,
    steps: int,
    batch_size: int,
    lr: LearningRate | float,
    temperature: float = 0.2,
    weight_decay: float = 1e-4,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    overwrite: bool = False,
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
        checkpoint: file that keeps the state; see `optimize`.
        checkpoint_every: steps between checkpoints.
        resume: continue from the checkpoint if it exists.
        overwrite: replace the checkpoint of another training.
        progress: show a bar.

    Returns:
        The loss of every step (steps,).

    Raises:
        ValueError: there are fewer than two images.
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

    run: dict[str, Any] = {"batch_size": batch_size, "temperature": temperature}
    if checkpoint is not None:
        run["images"] = digest(shown)
    return optimize(
        encoder,
        loss,
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        overwrite=overwrite,
        run=run,
        progress=progress,
        what="encoder",
    )


def crop_and_flip(images: Tensor, generator: torch.Generator | None) -> Tensor:
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
