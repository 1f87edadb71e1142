"""Scanned digits: every mode of the paper, the database swap, and classes never trained on.

scikit-learn's 1,797 scans (8x8; Alpaydin & Kaynak 1998) are split into a database D, training
images X and held-out images H, all disjoint. A small CLIP is trained on D and X with captions. X
lacks two digits that D has: can the model draw them from their neighbors alone?

The judge is an SVM trained on held-out images only: one trained on D would reward copies of D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrodiff.builder import Builder
from retrodiff.databases import EmbeddingDatabase, Images, build_database
from retrodiff.diffusion import (
    ClassifierFree,
    DPMpp2M,
    Dropped,
    EDMDenoiser,
    NeighborEmbeddings,
)
from retrodiff.encoders import CLIPEncoder
from retrodiff.interfaces import Database, Mode, Query
from retrodiff.model import Model
from retrodiff.model.generated import Generation
from retrodiff.networks.unet import UNet
from retrodiff.retrieval import NearestNeighbors, NeighborCounts, TopM
from retrodiff.training import FitResult, TrainingSet, cosine, fit
from retrodiff.training.contrastive import fit_clip

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
UNSEEN = (8, 9)
"""In D and in the CLIP's training, never in X."""
SWAPPED_TO = (0, 1, 2, 3, 4)
CAPTION = "a photo of the digit {}"
CLASS = "the digit {}"
GUIDANCE = 2.0
TOP_M = 0.5


@dataclass(frozen=True)
class Settings:
    """Sizes of the digits half; smaller ones are for tests."""

    clip_steps: int = 400
    steps: int = 300
    batch_size: int = 64
    channels: int = 32
    sampling_steps: int = 10
    per_mode: int = 504
    unseen_per_mode: int = 100


@dataclass(frozen=True)
class Split:
    """Images (n, 1, 8, 8) in [-1, 1] and their digits (n,), three disjoint parts."""

    database: tuple[Tensor, Tensor]
    training: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


def split(seed: int) -> Split:
    """The scans, shuffled: 700 for D, 550 for X less the unseen digits, the rest held out."""
    from sklearn.datasets import load_digits

    scans: Any = load_digits()
    images = torch.from_numpy(scans.images).float().unsqueeze(1) / 8 - 1
    digits = torch.from_numpy(scans.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    d, x, held = order[:700], order[700:1250], order[1250:]
    x = x[~torch.isin(digits[x], torch.tensor(UNSEEN))]
    return Split(*((images[rows], digits[rows]) for rows in (d, x, held)))


def caption(digit: int) -> str:
    """Such as "a photo of the digit seven"."""
    return CAPTION.format(WORDS[digit])


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images shifted by up to a pixel and slightly noisy."""
    b, _, h, w = images.shape
    wide = F.pad(images, (1, 1, 1, 1), value=-1.0)[:, 0]
    dx, dy = (torch.randint(3, (b,), generator=generator) for _ in range(2))
    rows = (dy[:, None] + torch.arange(h))[:, :, None]
    columns = (dx[:, None] + torch.arange(w))[:, None, :]
    shifted = wide[torch.arange(b)[:, None, None], rows, columns].unsqueeze(1)
    return shifted + 0.1 * torch.randn(shifted.shape, generator=generator)


def clip_of(parts: Split, settings: Settings, seed: int, progress: bool) -> CLIPEncoder:
    """A CLIP of open_clip's own classes, trained from scratch on the captioned D and X."""
    torch.manual_seed(seed)
    encoder = CLIPEncoder.from_config(
        {
            "embed_dim": 32,
            "vision_cfg": {
                "image_size": 8,
                "patch_size": 4,
                "width": 64,
                "head_width": 32,
                "layers": 3,
            },
            "text_cfg": {"context_length": 12, "width": 64, "heads": 2, "layers": 1},
        }
    )
    images = torch.cat([parts.database[0], parts.training[0]])
    digits = torch.cat([parts.database[1], parts.training[1]]).tolist()
    fit_clip(
        encoder,
        images,
        [caption(digit) for digit in digits],
        steps=settings.clip_steps,
        batch_size=128,
        lr=cosine(3e-3, settings.clip_steps, 20),
        augment=moved,
        seed=seed,
        progress=progress,
    )
    return encoder


def model_of(encoder: CLIPEncoder, database: Database, settings: Settings) -> Builder:
    """The paper's UNet in small, on pixels, with EDM's preconditioning."""
    network = UNet(
        in_channels=1,
        out_channels=1,
        size=8,
        channels=settings.channels,
        multipliers=(1, 2),
        blocks_per_level=1,
        attention_factors=(1, 2),
        context_width=encoder.dim,
    )
    return (
        Builder()
        .encoder(encoder)
        .database(database)
        .conditioner(Dropped(NeighborEmbeddings("unit"), 0.1))
        .denoiser(EDMDenoiser(network, sigma_data=0.75, mean=-0.8, sigma_min=0.02, sigma_max=20.0))
        .sampler(DPMpp2M())
        .guidance(ClassifierFree(GUIDANCE))
        .defaults(k=4, steps=settings.sampling_steps, class_top=20)
    )


class Judge:
    """Says which digit an image shows; knows held-out images only."""

    def __init__(self, parts: Split) -> None:
        from sklearn.svm import SVC

        images, digits = parts.held_out
        self.svm = SVC(C=10.0).fit(images.flatten(1).numpy(), digits.numpy())

    def digits(self, images: Tensor) -> np.ndarray:
        """(n, 1, 8, 8) -> (n,)."""
        return self.svm.predict(images.flatten(1).numpy())

    def share(self, images: Tensor, asked: Sequence[int]) -> float:
        """The share of images that show what was asked."""
        return float((self.digits(images) == np.array(asked)).mean())


def sample_mode(
    model: Model, mode: Mode, digits: Sequence[int], seed: int, progress: bool
) -> Generation:
    """One image per digit, asked in one of the modes that text drives."""
    common: dict[str, Any] = {"seed": seed, "batch_size": 256, "progress": progress}
    if mode == "class":
        classes = [CLASS.format(WORDS[digit]) for digit in digits]
        return model.sample(classes=classes, **common)
    return model.sample(prompts=[caption(digit) for digit in digits], mode=mode, **common)


TEXT_MODES: tuple[tuple[str, Mode], ...] = (
    ("text", "text"),
    ("text_neighbors", "text+neighbors"),
    ("neighbors", "neighbors"),
    ("class", "class"),
)


def accuracy(
    model: Model, judge: Judge, digits: Sequence[int], n: int, seed: int, progress: bool
) -> tuple[dict[str, float], dict[str, Generation]]:
    """Share of the asked digit in every mode that text drives, and the samples."""
    asked = [digits[i % len(digits)] for i in range(n)]
    out = {name: sample_mode(model, mode, asked, seed, progress) for name, mode in TEXT_MODES}
    return {name: judge.share(g.images, asked) for name, g in out.items()}, out


def loss_gap(model: Model, parts: Split, database: Database, seed: int) -> dict[str, float]:
    """Held-out loss with the neighbors shuffled across images, minus with the right ones.

    Same noise and noise levels on both sides; unseen digits are left out.
    """
    images, digits = parts.held_out
    images = images[~torch.isin(digits, torch.tensor(UNSEEN))]
    assert model.encoder is not None
    query = Query(model.encoder.encode_image(images))
    right = model.retriever.retrieve(query, database, model.k)
    differences: list[Tensor] = []
    base: list[Tensor] = []
    with torch.no_grad():
        for repeat in range(4):
            generator = torch.Generator().manual_seed(seed + repeat)
            sigma = model.denoiser.draw_sigmas(len(images), generator)  # type: ignore[attr-defined]
            noise = torch.randn(images.shape, generator=generator)
            order = torch.randperm(len(images), generator=generator)
            fixed = {"sigma": sigma, "noise": noise, "drop": False}
            good = model.loss(images, query, right, **fixed)
            wrong = model.loss(images, query, right.rows(order), **fixed)
            differences.append(wrong - good)
            base.append(good)
    # The four repeats see the same images, so the images are the independent units.
    difference = torch.stack(differences).mean(0)
    error = float(difference.std() / len(difference) ** 0.5)
    loss = float(torch.stack(base).mean())
    return {
        "loss": loss,
        "gap": float(difference.mean()),
        "standard_errors": float(difference.mean()) / error,
        "ratio": float(difference.mean()) / loss,
    }


def copying(images: Tensor, parts: Split, threshold: float | None = None) -> dict[str, float]:
    """Nearest distances to D and X, against the same for real held-out images.

    A duplicate is an image nearer to a row of D or X than 99 in 100 held-out images are.
    """
    owned = torch.cat([parts.database[0], parts.training[0]]).flatten(1)

    def nearest(x: Tensor) -> Tensor:
        return torch.cdist(x.flatten(1), owned).min(1).values

    real = nearest(parts.held_out[0])
    threshold = float(real.quantile(0.01)) if threshold is None else threshold
    mine = nearest(images)
    n, m = len(mine), len(real)
    share, null = float((mine < threshold).float().mean()), float((real < threshold).float().mean())
    error = (null * (1 - null) * (1 / n + 1 / m)) ** 0.5
    return {
        "threshold": threshold,
        "share": share,
        "share_of_real": null,
        "standard_errors_above": (share - null) / error,
        "nearest": float(mine.mean()),
        "nearest_of_real": float(real.mean()),
    }


def diversity(images: Tensor, shown: Sequence[int], parts: Split) -> dict[str, float]:
    """Mean distance between two images of a digit, samples against real held-out ones."""

    def within(x: Tensor, digits: Tensor) -> float:
        each: list[float] = []
        for digit in digits.unique().tolist():
            group = x[digits == digit].flatten(1)
            if len(group) > 1:
                each.append(float(torch.pdist(group).mean()))
        return sum(each) / len(each)

    real, digits = parts.held_out
    seen = torch.isin(digits, torch.tensor(sorted(set(shown))))
    mine = within(images, torch.tensor(shown))
    theirs = within(real[seen], digits[seen])
    return {"samples": mine, "real": theirs, "ratio": mine / theirs}


@dataclass(frozen=True)
class Digits:
    """What the digits half made.

    Args:
        model: trained, with database D and a fitted, top-m proposal.
        swapped: the same weights with a database of the digits 0 to 4.
        fitted: the training run with its snapshot at half the steps.
        parts: the three disjoint sets.
        judge: of the digits.
        asked: the held-out images of the image queries.
        samples: by mode.
        report: its figures.
    """

    model: Model
    swapped: Model
    fitted: FitResult
    parts: Split
    judge: Judge
    asked: Tensor
    samples: dict[str, Generation]
    report: dict[str, Any]


def trained(
    folder: Path, settings: Settings, seed: int, progress: bool
) -> tuple[FitResult, Split, EmbeddingDatabase, TrainingSet]:
    """Split, CLIP, D on disk and reopened, neighbor ids, training."""
    parts = split(seed)
    encoder = clip_of(parts, settings, seed, progress)
    images, digits = parts.database
    records = [{"label": WORDS[digit], "caption": caption(digit)} for digit in digits.tolist()]
    path = folder / "digits.rdb"
    source = Images(images.expand(-1, 3, -1, -1), records)
    build_database(path, source, encoder, thumbnails=8, overwrite=True, progress=progress)
    database = EmbeddingDatabase.at(path)
    torch.manual_seed(seed)
    model = model_of(encoder, database, settings).build()
    data = TrainingSet.of(
        parts.training[0], encoder, database, NearestNeighbors(), model.k, progress=progress
    )
    fitted = fit(
        model,
        data,
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=cosine(2e-3, settings.steps, 30),
        ema=0.99,
        seed=seed,
        snapshots=[settings.steps // 2],
        checkpoint=folder / "digits-training.safetensors",
        overwrite=True,
        progress=progress,
    )
    return fitted, parts, database, data


def run(folder: Path, settings: Settings, seed: int = 0, progress: bool = True) -> Digits:
    """The whole digits half."""
    fitted, parts, database, data = trained(folder, settings, seed, progress)
    judge = Judge(parts)
    counts = NeighborCounts.from_table(data.table, database)
    model = fitted.model.replace(proposal=TopM(counts, fraction=TOP_M))
    seen = [digit for digit in range(10) if digit not in UNSEEN]
    n, sampling = settings.per_mode, {"batch_size": 256, "progress": progress}

    report: dict[str, Any] = {
        "rows": len(database),
        "training_images": len(data),
        "held_out_images": len(parts.held_out[0]),
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),  # type: ignore[attr-defined]
        "training_steps": settings.steps,
        "guidance": GUIDANCE,
        "n_per_mode": n,
        "judge_on_real_x": judge.share(parts.training[0], parts.training[1].tolist()),
    }
    report["accuracy"], samples = accuracy(model, judge, seen, n, seed, progress)
    (half,) = fitted.snapshots.values()
    report["accuracy_at_half_the_steps"], _ = accuracy(half, judge, seen, n, seed, progress)

    asked, asked_digits = parts.held_out
    known = ~torch.isin(asked_digits, torch.tensor(UNSEEN))
    asked, asked_digits = asked[known][:n], asked_digits[known][:n].tolist()
    samples["image"] = model.sample(images=asked, seed=seed, **sampling)
    report["accuracy"]["image"] = judge.share(samples["image"].images, asked_digits)

    samples["unconditional"] = model.sample(n=n, seed=seed, **sampling)
    report["unconditional"] = {
        "top_m": TOP_M,
        **_spread(judge.digits(samples["unconditional"].images)),
    }

    allowed = [WORDS[digit] for digit in SWAPPED_TO]
    smaller = database.subset(
        torch.tensor([i for i, label in enumerate(database.labels) if label in allowed])
    )
    query = Query(data.embeddings)
    swapped = model.replace(
        database=smaller,
        proposal=TopM(NeighborCounts.fit(query, smaller, model.k), fraction=TOP_M),
    )
    before = samples["unconditional"]
    samples["swapped"] = swapped.sample(n=n, seed=seed, **sampling)
    drawn = [database.labels[int(row)] for row in _drawn(before)]
    report["swap"] = {
        "digits": list(SWAPPED_TO),
        "share_before": _share(judge.digits(before.images), SWAPPED_TO),
        "share_of_draws_before": sum(label in allowed for label in drawn) / n,
        "share_allowed": _share(judge.digits(samples["swapped"].images), SWAPPED_TO),
    }

    unseen: dict[str, Any] = {"digits": list(UNSEEN)}
    report["unseen"] = unseen
    without = database.subset(
        torch.tensor([i for i, label in enumerate(database.labels) if label not in _words(UNSEEN)])
    )
    for name, which in (
        ("before_they_are_in_D", model.replace(database=without)),
        ("after", model),
    ):
        shares, made = accuracy(which, judge, UNSEEN, settings.unseen_per_mode, seed, progress)
        unseen[name] = shares
        samples[f"unseen.{name}"] = made["neighbors"]

    for_copying = torch.cat([samples[name].images for name, _ in TEXT_MODES])
    shown = [seen[i % len(seen)] for i in range(n)]
    report["copying"] = copying(for_copying, parts)
    report["diversity"] = {
        name: diversity(samples[name].images, shown, parts) for name, _ in TEXT_MODES
    }
    report["loss_gap"] = loss_gap(model, parts, database, seed)
    return Digits(model, swapped, fitted, parts, judge, asked, samples, report)


def _drawn(generation: Generation) -> list[int]:
    """The rows that unconditional sampling drew."""
    return [int(source.removeprefix("row ")) for source in generation.query.source]


def _share(digits: np.ndarray, allowed: Sequence[int]) -> float:
    return float(np.isin(digits, allowed).mean())


def _spread(digits: np.ndarray) -> dict[str, float]:
    return {WORDS[digit]: float((digits == digit).mean()) for digit in range(10)}


def _words(digits: Sequence[int]) -> list[str]:
    return [WORDS[digit] for digit in digits]
