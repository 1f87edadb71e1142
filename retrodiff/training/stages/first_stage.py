"""Trains a first stage: an autoencoder whose latents a diffusion model then learns.

Esser et al. 2021 (arXiv 2012.09841) and Rombach et al. 2022 (arXiv 2112.10752): mean absolute
error, a perceptual distance where one is given, a discriminator where one is given, and a light
regularization of the latents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrodiff.components import where
from retrodiff.networks import KLAutoencoder, VQAutoencoder
from retrodiff.numbers import real, whole
from retrodiff.training.ema import NamedEMA
from retrodiff.training.images import Images, as_images, digest, pixels
from retrodiff.training.occasion import Order
from retrodiff.training.optimize import Part, Precision, optimize
from retrodiff.training.rates import LearningRate
from retrodiff.training.stages.adversarial import Adversarial
from retrodiff.training.stages.codebook import CodeUse
from retrodiff.training.stages.loss_parts import LossParts
from retrodiff.training.stages.stage_objective import Perceptual, StageObjective, Weights

FirstStage = KLAutoencoder | VQAutoencoder

MEASURED = 2048
"""Images at most that the latents' scale is measured on."""


@dataclass(frozen=True)
class StageResult:
    """A trained first stage.

    Args:
        autoencoder: with the averaged weights; its latents have unit variance.
        losses: of every step (steps,).
        parts: what they are made of, by name (steps,): ``l1``, ``kl`` or ``codebook`` and
            ``perplexity``, ``perceptual``, ``fooling`` (autoencoder against discriminator),
            ``telling`` (the reverse), ``adversarial_weight``.
        code_use: of a codebook, on the images that the scale was measured on; None: there is none.

    Examples:
        >>> import torch
        >>> from retrodiff.networks import KLAutoencoder
        >>> from retrodiff.training import fit_autoencoder
        >>> first_stage = KLAutoencoder(
        ...     channels=32, multipliers=(1, 2), blocks_per_level=1, latent_channels=4
        ... )
        >>> images = torch.rand(8, 3, 16, 16) * 2 - 1
        >>> result = fit_autoencoder(
        ...     first_stage, images, steps=2, batch_size=4, lr=1e-4, progress=False
        ... )
        >>> result.losses.shape
        torch.Size([2])
    """

    autoencoder: FirstStage
    losses: Tensor
    parts: dict[str, Tensor]
    code_use: CodeUse | None


def fit_autoencoder(
    autoencoder: FirstStage,
    images: Images | Any,
    *,
    steps: int,
    batch_size: int,
    lr: LearningRate | float,
    kl_weight: float = 1e-6,
    codebook_weight: float = 1.0,
    commitment: float = 0.25,
    restart_after: int = 100,
    latent_noise: float = 0.0,
    decoder_only: bool = False,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    adversarial: Adversarial | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ema: float = 0.999,
    weight_decay: float = 0.0,
    precision: Precision = "float32",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    overwrite: bool = False,
    after: Callable[[int, float, float], None] | None = None,
    progress: bool = True,
) -> StageResult:
    """Trains an autoencoder on images; the one that is given stays as it was.

    At the end the standard deviation of the latents is measured and put into ``scale_factor``, so
    that what `encode` returns has unit variance; with ``decoder_only`` it is kept.

    Args:
        autoencoder: `KLAutoencoder` or `VQAutoencoder`, new or trained before.
        images: n images: `FolderImages`, a tensor (n, c, h, w), or a list of pictures.
        steps: steps in all.
        batch_size: images per step.
        lr: learning rate: a number, or by step such as ``cosine(1e-3, steps, warmup=100)``.
        kl_weight: of the KL divergence, in nats per number of an image (KL only). 0: the latents
            are the means, and only ``latent_noise`` keeps them smooth.
        codebook_weight: of the distance between latents and codes (VQ only).
        commitment: share of it that moves the latents (VQ only).
        restart_after: steps after which an unused code is moved to a latent; 0: never (VQ only).
        latent_noise: standard deviation of noise that is added to the latents before they are
            decoded, as a share of their own. 0.05 makes decoding forgive what a diffusion model
            gets slightly wrong.
        decoder_only: train the decoder of an autoencoder that was trained before; its latents stay
            what they are, to the last bit, so that a network that was trained on them stays
            valid and its samples become sharper. Nothing then regularizes the latents.
        perceptual: a distance of images, such as `FeatureDistance` or what `lpips_distance`
            returns; its gradient reaches the images only if it is differentiable.
        perceptual_weight: of it.
        adversarial: a discriminator and its start; its weights are trained in place on a copy.
        augment: changes the images of a batch before they are seen.
        ema: decay of the weights' average.
        weight_decay: of AdamW.
        precision: as for `optimize`.
        seed: of everything random. The same seed gives the same weights.
        checkpoint: file that keeps the state, to resume from after an interruption.
        checkpoint_every: steps between checkpoints.
        resume: continue from the checkpoint; where there is none, start.
        overwrite: replace the checkpoint of another training.
        after: told the number of steps done, the loss of the last one, and its learning rate.
        progress: show a bar.

    Raises:
        ValueError: a number is out of range, the images do not fit the autoencoder, or the
            checkpoint is damaged or of another training.
        FloatingPointError: loss or gradient is not finite; the last checkpoint stays.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says how to continue.
    """
    steps, batch_size = whole("steps", steps), whole("batch_size", batch_size)
    seed = whole("seed", seed, 0)
    weights = Weights(
        kl=real("kl_weight", kl_weight, 0),
        codebook=real("codebook_weight", codebook_weight, 0),
        commitment=real("commitment", commitment, 0),
        noise=real("latent_noise", latent_noise, 0),
        perceptual=real("perceptual_weight", perceptual_weight, 0),
        restart_after=whole("restart_after", restart_after, 0),
        decoder_only=decoder_only,
    )
    shown = as_images(images)
    check_fit(autoencoder, shown, batch_size)
    device, _ = where(autoencoder) or (torch.device("cpu"), None)
    objective = StageObjective(
        copy.deepcopy(autoencoder), weights, perceptual, copy.deepcopy(adversarial)
    )
    objective.to(device).requires_grad_(False)
    for module in objective.trained():
        module.requires_grad_(True)
    trained = objective.autoencoder
    average = NamedEMA(trained, ema)
    parts, order = LossParts(steps), Order(len(shown), batch_size, seed)

    def loss(module: nn.Module, part: Part) -> Tensor:
        step, generator = part.step, part.generator
        batch = pixels(shown, order.rows(step))
        batch = batch if augment is None else augment(batch, generator)
        value, numbers = module(batch.to(device), step, generator)
        parts.record(step, **numbers)
        return value

    run = {
        "batch_size": batch_size,
        "images": digest(shown),
        "autoencoder": {"kind": type(autoencoder).__name__, **autoencoder.config()},
        # Without decoder_only as before there was this option: its checkpoints continue.
        "weights": {k: v for k, v in asdict(weights).items() if v is not False},
        "perceptual": _named(perceptual),
        "adversarial": None
        if adversarial is None
        else {"start": adversarial.start, "weight": adversarial.weight},
        "augment": _named(augment),
    }
    losses = optimize(
        objective,
        loss,
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        precision=precision,
        seed=seed,
        ema=average,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        overwrite=overwrite,
        run=run,
        kept={"parts": parts},
        after=after,
        progress=progress,
        what="first stage",
    )
    average.copy_to(trained).eval().requires_grad_(False)
    if not decoder_only:
        use = normalize_latents(trained, shown, batch_size)
    elif isinstance(trained, VQAutoencoder):
        _, use = measured_latents(trained, shown, batch_size)
    else:
        use = None
    return StageResult(trained, losses, parts.curves, use)


def normalize_latents(
    autoencoder: FirstStage, images: Images, batch_size: int = 64
) -> CodeUse | None:
    """Sets ``scale_factor`` so that the latents of some images have unit variance.

    Args:
        autoencoder: changed in place.
        images: 2,048 of them, evenly spaced, are looked at.
        batch_size: images at a time.

    Returns:
        How the codes are used, where there are any.

    Raises:
        ValueError: all latents are the same.
    """
    deviation, use = measured_latents(autoencoder, images, batch_size)
    if not deviation > 0:
        raise ValueError(
            "the latents of all images are the same, so nothing was learned: train longer, with a "
            "lower learning rate or a smaller kl_weight"
        )
    autoencoder.scale_factor = 1 / deviation
    return use


@torch.no_grad()
def measured_latents(
    autoencoder: FirstStage, images: Images, batch_size: int = 64
) -> tuple[float, CodeUse | None]:
    """Standard deviation of some images' latents before the scale, and how codes are used."""
    device, _ = where(autoencoder) or (torch.device("cpu"), None)
    rows = torch.linspace(0, len(images) - 1, min(len(images), MEASURED)).long()
    count, total, squares = 0, 0.0, 0.0
    counts = torch.zeros(0, dtype=torch.int64)
    for some in rows.split(batch_size):
        scaled = autoencoder.encode(pixels(images, some).to(device))
        latents = scaled.double() / autoencoder.scale_factor
        count, total = count + latents.numel(), total + float(latents.sum())
        squares += float(latents.square().sum())
        if isinstance(autoencoder, VQAutoencoder):
            codes = autoencoder.nearest(scaled).flatten().cpu()
            found = torch.bincount(codes, minlength=len(autoencoder.codebook.weight))
            counts = found if not len(counts) else counts + found
    variance = max(0.0, squares / count - (total / count) ** 2)
    return variance**0.5, CodeUse.of(counts) if len(counts) else None


def check_fit(autoencoder: FirstStage, images: Images, batch_size: int) -> None:
    """Raises a ValueError where images do not fit an autoencoder, before any work."""
    if not isinstance(autoencoder, (KLAutoencoder, VQAutoencoder)):
        raise ValueError(
            f"{type(autoencoder).__name__} is no KLAutoencoder and no VQAutoencoder: only these "
            "are trained here"
        )
    if len(images) < batch_size:
        raise ValueError(
            f"batch_size={batch_size}, but there are {len(images)} images: lower batch_size or "
            "give more images"
        )
    first = pixels(images, torch.tensor([0]))
    channels, height, width = first.shape[1:]
    factor = autoencoder.factor
    if channels != autoencoder.image_channels:
        raise ValueError(
            f"the images have {channels} channels, the autoencoder takes "
            f"{autoencoder.image_channels}: make one with image_channels={channels}"
        )
    if min(height, width) < factor:
        raise ValueError(
            f"images of {height}x{width} are smaller than the autoencoder's factor {factor}: give "
            "larger images, or an autoencoder of fewer levels"
        )
    if height % factor or width % factor:
        raise ValueError(
            f"images of {height}x{width} do not divide by the autoencoder's factor {factor}: crop "
            f"or resize them to multiples of {factor}"
        )


def _named(part: Any) -> str | None:
    """What a function or module of the user's is called, for the comparison on resume."""
    if part is None:
        return None
    described = getattr(part, "describe", None)
    return str(described()) if described else getattr(part, "__qualname__", type(part).__qualname__)
