"""Evaluates a folder of images of any generator: all numbers, the copying report, one page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrodiff.evaluation.copying import copying
from retrodiff.evaluation.metrics import (
    Score,
    authenticity,
    density_coverage,
    frechet_distance,
    kernel_distance,
    mind,
    precision_recall,
    vendi,
)
from retrodiff.evaluation.report import Report
from retrodiff.evaluation.sets import ImageSet, planted_copies, read_database, read_folder
from retrodiff.interfaces import Encoder

FEW = 2000
"""Below this many images the Fréchet distance is mostly its own bias."""

ENOUGH = 0.8
"""Below this share of planted copies found, the copying report warns."""


def evaluate(
    images: str | Path,
    reference: str | Path,
    encoder: Encoder,
    *,
    training: str | Path | None = None,
    database: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Compares a folder of generated images with real ones, in the features of an encoder.

    The reference images must be held out: neither trained on nor in the database. They are what
    the generator should look like, and the null of the copying report.

    Args:
        images: folder of generated images; one written by ``retrodiff sample`` brings its settings.
        reference: folder of held-out real images.
        encoder: makes the features; best not the one that conditions the model.
        training: folder of the training images, to look for copies of them.
        database: a database, to look for copies of its rows.
        progress: show bars.

    Raises:
        ValueError: too few images on one side for any number.
    """
    generated = read_folder(images, encoder, progress=progress)
    real = read_folder(reference, encoder, progress=progress)
    settings = sampling_settings(Path(images))
    notes = []
    if (used := settings.get("database")) and used.get("encoder") == encoder.fingerprint.encoder:
        notes.append(
            f"The features are of {encoder.fingerprint.encoder}, which also conditions the model: "
            "take another network for numbers to be published."
        )
    sources: dict[str, ImageSet] = {}
    if training is not None:
        sources["training"] = read_folder(training, encoder, progress=progress)
    if database is not None:
        sources["database"] = read_database(database, encoder, progress=progress)
    scores, missing = _scores(generated, real, sources.get("training"))
    notes += missing
    found = {}
    if sources and len(real) >= 100:
        features = {name: source.features for name, source in sources.items()}
        planted = {name: planted_copies(source, encoder) for name, source in sources.items()}
        found = copying(generated.features, real.features, features, planted=planted)
        notes += [
            f"These features find only {copies.sensitivity:.0%} of planted copies of the {name} "
            "images: take another network before trusting the copying report."
            for name, copies in found.items()
            if copies.sensitivity is not None and copies.sensitivity < ENOUGH
        ]
    elif sources:
        notes.append(
            f"No copying report: {len(real)} held-out images cannot set its threshold, at least "
            "100 are needed."
        )
    return Report(
        generated=generated,
        reference=real,
        features=encoder.fingerprint.encoder,
        scores=scores,
        copying=found,
        sources=sources,
        conditions=settings,
        notes=notes,
    )


def sampling_settings(folder: Path) -> Mapping[str, Any]:
    """The settings that ``generation.json`` keeps beside sampled images; empty without one."""
    file = folder / "generation.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text("utf-8"))["settings"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{file} is damaged: delete it to evaluate the images alone") from None
    return settings if isinstance(settings, dict) else {}


def _scores(
    generated: ImageSet, real: ImageSet, training: ImageSet | None
) -> tuple[list[Score], list[str]]:
    """Every number that these many images allow, and why others are missing."""
    a, b = generated.features, real.features
    least = min(len(a), len(b))
    if least < 8:
        raise ValueError(
            f"{len(a)} generated and {len(b)} reference images: at least 8 of each are needed"
        )
    scores, notes = [kernel_distance(a, b), mind(a, b)], []
    if least > a.shape[1] and least >= FEW:
        scores.insert(0, frechet_distance(a, b))
    else:
        notes.append(
            f"No Fréchet distance (FID): {least:,} images are too few, at least "
            f"{max(FEW, a.shape[1] + 1):,} are needed. KID and MIND take its place."
        )
    scores += [*precision_recall(a, b), *density_coverage(a, b), vendi(a)]
    if training is not None:
        scores.append(authenticity(a, training.features))
    return scores, notes
