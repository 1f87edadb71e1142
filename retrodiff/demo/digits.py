"""Scanned digits: every mode of the paper, the database swap, and classes never trained on.

scikit-learn's 1,797 scans (8x8; Alpaydin & Kaynak 1998) are split into a database D, training
images X and held-out images H, all disjoint. A small CLIP is trained on D and X with captions. X
lacks two digits that D has: can the model draw them from their neighbors alone?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.builder import Builder
from retrodiff.databases import EmbeddingDatabase, Images, build_database
from retrodiff.demo.digit_figures import Judge, copying, diversity, loss_gap, share_of, spread
from retrodiff.demo.digit_scans import UNSEEN, WORDS, Split, caption, moved, split
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

SWAPPED_TO = (0, 1, 2, 3, 4)
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


@dataclass(frozen=True)
class Digits:
    """Results of the digits half.

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
    """Runs the digits half."""
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
        **spread(judge.digits(samples["unconditional"].images)),
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
        "share_before": share_of(judge.digits(before.images), SWAPPED_TO),
        "share_of_draws_before": sum(label in allowed for label in drawn) / n,
        "share_allowed": share_of(judge.digits(samples["swapped"].images), SWAPPED_TO),
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


def _words(digits: Sequence[int]) -> list[str]:
    return [WORDS[digit] for digit in digits]
