"""Evaluates images of any generator: all numbers, the copying report, one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.databases import Images, encode_images, open_database
from retrodiff.evaluation import fidelity
from retrodiff.evaluation.copying import Copying, copying, nearest, neighbor_echo
from retrodiff.evaluation.judges import (
    Judge,
    class_accuracy,
    judged_accuracy,
    labels_of_prompts,
)
from retrodiff.evaluation.metrics import (
    Score,
    authenticity,
    clip_score,
    density_coverage,
    mind,
    vendi,
)
from retrodiff.evaluation.report import Report
from retrodiff.evaluation.retrieved import Retrieved, read_retrieved
from retrodiff.evaluation.run_curves import read_curves
from retrodiff.evaluation.sampled import Sampled, read_sampled
from retrodiff.evaluation.sets import (
    ImageSet,
    planted_copies,
    read_images,
    read_source,
)
from retrodiff.evaluation.views import Views
from retrodiff.interfaces import Encoder
from retrodiff.model.generated import Generation
from retrodiff.pictures.converting import to_bytes

LEAST = 8
"""Images of each side below which there is no number at all."""

HELD_OUT = 100
"""Held-out images below which there is no copying report."""

ENOUGH = 0.8
"""Below this share of planted copies found, the copying report warns."""


def evaluate(
    images: str | Path | Generation,
    reference: str | Path,
    features: Encoder,
    *,
    training: str | Path | None = None,
    database: Any = None,
    conditioning: Encoder | None = None,
    clip: Encoder | None = None,
    judge: Judge | None = None,
    run: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Compares generated images with real ones, looks for copies, and makes a report of it.

    The reference images must be held out: neither trained on nor in the database. They are what
    the generator should look like, and the null of the copying report. Images of another size than
    the generated ones are cut to their shape and brought to their size.

    Args:
        images: what ``Model.sample`` returned, or a folder of images (also tars, zips, parquet
            files). A folder written by ``retrodiff sample`` brings its settings, prompts and
            neighbors.
        reference: held-out real images, likewise; sub-folders, or a column ``label``, are classes.
        features: makes the features; best not the encoder that conditions the model.
        training: the training images, to look for copies of them.
        database: a database or its path, to look for copies of its rows and of the neighbors used.
        conditioning: the model's own encoder, to find the neighbors that held-out images would
            have; None: those nearest in ``features`` stand for them, so that fewer echoes count.
        clip: an encoder with a text tower, for the CLIP score of prompts; None: ``features``, where
            it has one.
        judge: a classifier, for the class accuracy; None: the nearest class mean of the reference.
        run: folder of the training, whose ``metrics.csv`` is drawn.
        progress: show bars.

    Raises:
        ValueError: too few images on one side for any number; pictures missing.
    """
    # What can fail at once comes before the long work.
    curves = [] if run is None else read_curves(run)
    opened = _opened(database, images)
    notes: list[str] = []
    views = Views(features, mirrored=True)
    generated, sampled = _generated(images, views, progress)
    _check_number(len(generated), "generated")
    size = next(iter(generated.sizes)) if len(generated.sizes) == 1 else None
    real = read_images(reference, views, size=size, progress=progress)
    _check_number(len(real), "reference")
    plain = Views(features)
    sources: dict[str, ImageSet] = {}
    if training is not None:
        sources["training"] = read_images(training, plain, size=size, progress=progress)
    known: Retrieved | None = None
    if opened is not None:
        try:
            known = read_retrieved(opened, real, sampled, plain, conditioning, size, progress)
        except ValueError as error:
            if isinstance(database, (str, Path)):
                raise
            notes.append(f"No copies of the model's database: {error}")
        else:
            if known.whole:
                sources["database"] = known.images
    notes += _remarks(features, sampled, generated, {"reference": real, **sources})
    scores = _numbers(generated, real, sources.get("training"), notes)
    scores += _prompted(generated, sampled, clip, features, notes)
    scores += _classified(generated, real, sampled, judge, notes)
    found = _copies(generated, real, sources, known, views, notes)
    neighbors = {}
    if known is not None and any(known.used):
        sources["neighbors"], neighbors = known.images, known.by_row()
    name = _short(features)
    scores = [_told(score, name, real.name) for score in scores]
    return Report(
        generated=generated,
        reference=real,
        features=name,
        scores=scores,
        copying=found,
        sources=sources,
        sampled=sampled,
        neighbors=neighbors,
        curves=curves,
        details=views.detail,
        notes=notes,
    )


# --- reading --------------------------------------------------------------------------------------


def _opened(database: Any, images: Any) -> Any:
    if isinstance(database, (str, Path)):
        return open_database(database, "exact")
    if database is None and isinstance(images, Generation):
        return images.database
    return database


def _generated(
    images: str | Path | Generation, views: Views, progress: bool
) -> tuple[ImageSet, Sampled]:
    if not isinstance(images, Generation):
        sampled = read_sampled(images)
        only = sampled.files or None
        found = read_images(images, views, only=only, progress=progress)
        return found, sampled.of(found.files) if only else sampled
    files = [f"{i:05d}.png" for i in range(len(images))]
    pixels = to_bytes(images.images.nan_to_num(-1.0))
    source = Images(pixels, [{"file": file} for file in files])
    found = read_source("the samples", source, views, progress=progress)
    rows = [[r for r in mine.flatten().tolist() if r >= 0] for mine in images.neighbors.indices]
    records = [
        [r for r, row in zip(mine, at.flatten().tolist(), strict=True) if row >= 0]
        for mine, at in zip(
            images.neighbors.records or [()] * len(files),
            images.neighbors.indices if images.neighbors.records else [torch.empty(0)] * len(files),
            strict=True,
        )
    ]
    sampled = Sampled(
        images.settings,
        tuple(files),
        tuple(images.query.source) or (None,) * len(files),
        tuple(map(tuple, rows)),
        tuple(map(tuple, records)),
        tuple(files[i] for i in images.not_finite()),
    )
    return found, sampled


def _check_number(n: int, what: str) -> None:
    if n < LEAST:
        raise ValueError(f"{n} {what} images: at least {LEAST} are needed for any number")


def _remarks(
    features: Encoder, sampled: Sampled, generated: ImageSet, others: dict[str, ImageSet]
) -> list[str]:
    """What to keep in mind of how the images were made and read."""
    notes = list[str]()
    name = features.fingerprint.encoder
    if sampled.encoder is not None and sampled.encoder == name:
        notes.append(
            f"The features are of {name}, which also conditions the model: all numbers flatter it. "
            "Take another network for numbers to be published."
        )
    if sampled.broken:
        notes.append(f"{len(sampled.broken)} generated images were not finite and count as black.")
    if len(generated.sizes) > 1:
        notes.append(f"The generated images have {len(generated.sizes)} different sizes.")
        return notes
    [(h, w)] = generated.sizes
    for kind, images in others.items():
        if other := sorted(images.sizes - {(h, w)}):
            shown = ", ".join(f"{b}x{a}" for a, b in other[:3]) + ", ..." * (len(other) > 3)
            notes.append(
                f"The {kind} images ({shown}) were cut to the shape of the generated ones around "
                f"their middle and brought to {w}x{h} pixels."
            )
    return notes


# --- numbers --------------------------------------------------------------------------------------


def _numbers(
    generated: ImageSet, real: ImageSet, training: ImageSet | None, notes: list[str]
) -> list[Score]:
    """Every number that these many images allow; why others are missing is noted."""
    a, b = generated.features, real.features
    least, d = min(len(a), len(b)), a.shape[1]
    scores: list[Score] = []
    pairs: list[Callable[[Tensor, Tensor], Sequence[Score]]] = []
    if fidelity.available():
        if least > d and least >= fidelity.LEAST:
            scores.append(fidelity.frechet_distance(a, b))
        else:
            notes.append(
                f"No Fréchet distance (FID): {least:,} images are too few for {d:,} features, at "
                f"least {max(fidelity.LEAST, d + 1):,} on both sides are needed. KID and MIND take "
                "its place."
            )
        pairs.append(lambda x, y: [fidelity.kernel_distance(x, y)])
        pairs.append(fidelity.precision_recall)
    else:
        notes.append(f"No FID, KID, precision and recall: {fidelity.MISSING}.")
    pairs += [lambda x, y: [mind(x, y)], density_coverage]
    order = torch.randperm(len(b), generator=torch.Generator().manual_seed(0))
    # No more of them than there are generated images, on which these numbers depend.
    left, right = b[order[::2]][: len(a)], b[order[1::2]]
    bias = {"MIND": (1 / len(a) + 1 / len(b)) / (1 / len(left) + 1 / len(right))}
    for metric in pairs:
        found = metric(a, b)
        halves = metric(left, right) if len(right) >= LEAST else [None] * len(found)
        scores += [
            score if half is None else replace(score, real=half.value * bias.get(score.name, 1))
            for score, half in zip(found, halves, strict=True)
        ]
    scores.append(replace(vendi(a), real=vendi(b).value))
    if generated.logits is not None and fidelity.available():
        scores.append(fidelity.inception_score(generated.logits))
    if training is not None:
        near = authenticity(a, training.features)
        truth = authenticity(b, training.features).value
        scores.append(replace(near, real=truth, against=training.name))
    return scores


def _prompted(
    generated: ImageSet,
    sampled: Sampled,
    clip: Encoder | None,
    features: Encoder,
    notes: list[str],
) -> list[Score]:
    """The CLIP score, where there are prompts and an encoder of text."""
    encoder: Any = clip or features
    if not sampled.prompts:
        if clip is not None:
            notes.append("No CLIP score: the images do not say their prompts (generation.json).")
        return []
    if not hasattr(encoder, "encode_text"):
        if clip is not None:
            raise ValueError(f"{_short(clip)} has no text tower: a CLIP score needs one")
        notes.append("No CLIP score: the features have no text tower, give an encoder of text.")
        return []
    if clip is None or clip is features:
        embedded = generated.features
    else:
        assert generated.image is not None
        parts = [generated.image(i) for i in range(len(generated))]
        embedded = torch.cat(
            [encode_images(encoder, parts[i : i + 64]) for i in range(0, len(parts), 64)]
        )
    words = list(dict.fromkeys(sampled.prompts))
    texts = encoder.encode_text(words)
    at = {word: i for i, word in enumerate(words)}
    score = clip_score(embedded.cpu(), texts[[at[p] for p in sampled.prompts]].cpu())
    if sampled.encoder == encoder.fingerprint.encoder:
        score = replace(score, note=f"{score.note}; by the encoder that conditions the model")
        notes.append(
            f"The CLIP score is by {encoder.fingerprint.encoder}, which also conditions the model: "
            "it says that the model obeys its condition, not that others see the prompt."
        )
    return [replace(score, features=_short(encoder))]


def _classified(
    generated: ImageSet,
    real: ImageSet,
    sampled: Sampled,
    judge: Judge | None,
    notes: list[str],
) -> list[Score]:
    """Class accuracy, where the images say which class they should show."""
    there = [label for label in real.labels if label is not None]
    names = [n.strip() for c in judge.classes for n in c.split(",")] if judge else there
    wanted: Sequence[str | None] = generated.labels
    if not any(wanted) and sampled.prompts:
        wanted = labels_of_prompts(sampled.prompts, names)
    mine = [i for i, label in enumerate(wanted) if label is not None]
    if not mine:
        if judge is not None:
            notes.append(
                "No class accuracy: neither prompts nor sub-folders of the images name a class."
            )
        return []
    labels = [str(wanted[i]) for i in mine]
    with_label = [i for i, label in enumerate(real.labels) if label is not None]
    if judge is not None:
        logits = _logits(judge, generated, mine)
        truth = None
        try:
            judge.numbers(there)
        except ValueError:
            pass
        else:
            if there:
                truth = _logits(judge, real, with_label), there
        found = [replace(judged_accuracy(judge, logits, labels, truth), features=judge.name)]
        if fidelity.available():
            found.append(replace(fidelity.inception_score(logits), features=judge.name))
        return found
    if len(set(there)) < 2 or not set(labels) <= set(there):
        return []
    score = class_accuracy(generated.features[mine], labels, real.features[with_label], there)
    return [score]


def _logits(judge: Judge, images: ImageSet, chosen: Sequence[int]) -> Tensor:
    assert images.image is not None
    found = []
    with torch.no_grad():
        for start in range(0, len(chosen), 64):
            some = [images.image(i) for i in chosen[start : start + 64]]
            found.append(judge.head(encode_images(judge.encoder, some)).cpu())
    return torch.cat(found)


def _told(score: Score, features: str, against: str) -> Score:
    """A score with the names of features and reference."""
    return replace(
        score,
        features=score.features or features,
        against=score.against or (against if score.reference else ""),
        name=_name(score.name, score.features or features),
    )


def _name(name: str, features: str) -> str:
    """``FID`` and ``FD-DINOv2`` only for the features that papers mean by them."""
    if name != "Fréchet distance":
        return name
    if features == "fidelity:inception-v3-compat:2048":
        return "FID"
    large = features.startswith(("fidelity:dinov2-vit-l-14", "timm:vit_large_patch14_dinov2"))
    return "FD-DINOv2" if large else name


def _short(encoder: Encoder) -> str:
    return encoder.fingerprint.encoder


# --- copies ---------------------------------------------------------------------------------------


def _copies(
    generated: ImageSet,
    real: ImageSet,
    sources: dict[str, ImageSet],
    known: Retrieved | None,
    views: Views,
    notes: list[str],
) -> dict[str, Copying]:
    """The copying report of every source, and of the neighbors that were used."""
    if not sources and known is None:
        return {}
    if len(real) < HELD_OUT:
        notes.append(
            f"No copying report: {len(real)} held-out images cannot set its threshold, at least "
            f"{HELD_OUT} are needed."
        )
        return {}
    assert generated.mirrored is not None
    assert real.mirrored is not None
    mirrored = generated.mirrored, real.mirrored
    found = copying(
        generated.details,
        real.details,
        {name: source.details for name, source in sources.items()},
        planted={name: planted_copies(source, views) for name, source in sources.items()},
        mirrored=mirrored,
    )
    notes += [
        f"These features find only {copies.sensitivity:.0%} of planted copies of the {name} images "
        "at 1 % false alarms: held-out images are nearly copies themselves, or the features are "
        "too coarse. Read both rates at the looser threshold, and look at the pairs."
        for name, copies in found.items()
        if copies.sensitivity is not None and copies.sensitivity < ENOUGH
    ]
    if known is None or not any(known.used):
        if known is not None:
            notes.append(
                "No neighbor echo: the images do not say which rows of this database they used."
            )
        return found
    held_out = known.held_out
    if held_out is None and not known.whole:
        notes.append(
            "No neighbor echo: of so large a database only the neighbors used were read, and "
            "without the model's encoder nothing says which ones held-out images would have."
        )
        return found
    if held_out is None:
        _, row = nearest(torch.stack([real.details, real.mirrored], 1), known.images.details)
        held_out = [[int(i)] for i in row]
        notes.append(
            "Neighbor echo: held-out images are compared with the rows nearest to them in these "
            "features, since the model's encoder was not at hand. Fewer echoes count so."
        )
    found["neighbors"] = neighbor_echo(
        generated.details,
        known.used,
        real.details,
        held_out,
        known.images.details,
        mirrored=mirrored,
    )
    return found
