"""Color photographs: a database of patches, a small model, and a database it never saw.

The photographs are scikit-image's own, public domain or CC0 by its documentation. Patches of the
database D and of the training set X come from disjoint tiles of the same photographs; the second
database holds photographs from which the model was never trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retrodiff.builder import Builder
from retrodiff.databases import EmbeddingDatabase, Images, Patchify, build_database
from retrodiff.encoders import TimmEncoder
from retrodiff.interfaces import Neighbors
from retrodiff.model import Model
from retrodiff.model.generated import Generation
from retrodiff.networks.principal import PrincipalPatches
from retrodiff.presets import rdm_small
from retrodiff.retrieval import NearestNeighbors
from retrodiff.training import TrainingSet, cosine, fit
from retrodiff.training.contrastive import fit_views

TRAINED = ("astronaut", "coffee", "rocket", "hubble_deep_field", "brick")
NEVER_TRAINED = ("chelsea", "retina")
LICENSE = "public domain or CC0 (scikit-image)"
SIZE, SHORT_SIDE, TILE = 32, 192, 64


@dataclass(frozen=True)
class Settings:
    """Sizes of the color half; smaller ones are for tests."""

    encoder: str = "test_resnet"
    encoder_steps: int = 100
    steps: int = 700
    batch_size: int = 32
    channels: int = 96
    sampling_steps: int = 12
    samples: int = 64
    stride: int = 4


def photograph(name: str) -> Tensor:
    """A photograph (3, h, w) uint8 of scikit-image."""
    from skimage import data

    pixels = torch.from_numpy(getattr(data, name)().copy())
    pixels = pixels[..., None].expand(-1, -1, 3) if pixels.ndim == 2 else pixels
    return pixels.permute(2, 0, 1)


def patches(
    names: tuple[str, ...], stride: int, parity: int | None = None
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Patches of photographs with their boxes, from every tile or from every second one.

    Args:
        names: of the photographs.
        stride: distance of the patches.
        parity: 0 or 1: only patches that lie within the light, or the dark, tiles of a
            checkerboard, so that two parities share no pixel; None: all patches.

    Returns:
        Patches (n, 3, 32, 32) uint8 and their records.
    """
    step = Patchify(size=SIZE, short_side=SHORT_SIDE, stride=stride)
    cut: list[Tensor] = []
    records: list[dict[str, Any]] = []
    for name in names:
        found, boxes, (_, _, w, h) = step.patches(photograph(name))
        for patch, box in zip(found, boxes, strict=True):
            corners = {
                (x // TILE, y // TILE) for x in (box[0], box[2] - 1) for y in (box[1], box[3] - 1)
            }
            column, row = min(corners)
            if parity is not None and (len(corners) > 1 or (column + row) % 2 != parity):
                continue
            cut.append(patch)
            records.append({"file": name, "box": list(box), "resized": [w, h], "license": LICENSE})
    return torch.stack(cut), records


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Another view: a crop of three quarters, mirrored or not, a little lighter or darker."""
    b, _, h, w = images.shape
    side = 3 * h // 4
    dx, dy = (torch.randint(h - side + 1, (b,), generator=generator) for _ in range(2))
    rows = (dy[:, None] + torch.arange(side))[:, None, :, None]
    columns = (dx[:, None] + torch.arange(side))[:, None, None, :]
    crop = images[
        torch.arange(b)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns
    ]
    mirror = torch.rand(b, generator=generator) < 0.5
    crop = torch.where(mirror[:, None, None, None], crop.flip(-1), crop)
    light = 0.1 * torch.randn(b, 1, 1, 1, generator=generator)
    crop = (crop + light).clamp(-1, 1)
    return F.interpolate(crop, (h, w), mode="bilinear", align_corners=False)


def to_float(images: Tensor) -> Tensor:
    """Bytes -> [-1, 1]."""
    return images.float() / 127.5 - 1


def encoder_of(images: Tensor, settings: Settings, seed: int, progress: bool) -> TimmEncoder:
    """A small network of timm, trained on two views of each patch."""
    torch.manual_seed(seed)
    encoder = TimmEncoder(settings.encoder, image_size=SIZE, preprocessing="plain")
    fit_views(
        encoder,
        images,
        view,
        steps=settings.encoder_steps,
        batch_size=128,
        lr=cosine(2e-3, settings.encoder_steps, 10),
        seed=seed,
        progress=progress,
    )
    return encoder


def likeness(images: Tensor, neighbors: Tensor) -> dict[str, float]:
    """How much nearer samples are to their own neighbors than to those of other samples.

    Args:
        images: (b, 3, h, w).
        neighbors: (b, k, 3, h, w).

    Returns:
        For mean color and for the 8x8 layout: mean distance to one's own neighbors, to shuffled
        ones, and shuffled over own (above 1: nearer to its own).
    """
    result: dict[str, float] = {}
    for what, side in (("mean_color", 1), ("layout_8x8", 8)):
        small = F.adaptive_avg_pool2d(images, side).flatten(1)
        near = F.adaptive_avg_pool2d(neighbors.flatten(0, 1), side).view(*neighbors.shape[:2], -1)
        distance = torch.stack(
            [
                (small.unsqueeze(1) - near.roll(shift, 0)).square().mean(-1).sqrt().mean(1)
                for shift in range(len(images))
            ]
        )
        own, others = float(distance[0].mean()), float(distance[1:].mean())
        result |= {f"{what}.own": own, f"{what}.shuffled": others, f"{what}.ratio": others / own}
    return result


def neighbor_images(database: EmbeddingDatabase, neighbors: Neighbors) -> Tensor:
    """The pictures of neighbors (b, k, 3, h, w)."""
    rows = [[database.image(j) for j in row] for row in neighbors.indices.tolist()]
    return torch.stack([torch.stack(row) for row in rows])


@dataclass(frozen=True)
class Color:
    """Results of the color half.

    Args:
        model: trained, with database D.
        swapped: the same weights with the database of photographs that were never in X.
        shown: for each of the two: queries, their neighbors' pictures, and samples.
        report: its figures.
    """

    model: Model
    swapped: Model
    shown: dict[str, tuple[Tensor, Tensor, Generation]]
    report: dict[str, Any]


def run(folder: Path, settings: Settings, seed: int = 0, progress: bool = True) -> Color:
    """Patches, encoder, databases on disk, training, samples with both databases."""
    held, held_records = patches(TRAINED, settings.stride, parity=0)
    training, _ = patches(TRAINED, settings.stride, parity=1)
    other, other_records = patches(NEVER_TRAINED, settings.stride, parity=0)
    asked, _ = patches(NEVER_TRAINED, settings.stride, parity=1)
    encoder = encoder_of(to_float(held), settings, seed, progress)

    def built(name: str, images: Tensor, records: list[dict[str, Any]]) -> EmbeddingDatabase:
        path = folder / name
        source = Images(images, records)
        build_database(path, source, encoder, thumbnails=SIZE, overwrite=True, progress=progress)
        return EmbeddingDatabase.at(path)

    database = built("photographs.rdb", held, held_records)
    never = built("photographs-never-trained.rdb", other, other_records)

    x = to_float(training)
    x = torch.cat([x, x.flip(-1)])
    torch.manual_seed(seed)
    first_stage = PrincipalPatches.fit(x, patch=4, components=16)
    model = (
        Builder.from_preset(
            rdm_small,
            encoder=encoder,
            first_stage=first_stage,
            database=database,
            channels=settings.channels,
        )
        .defaults(steps=settings.sampling_steps)
        .build()
    )
    data = TrainingSet.of(x, encoder, database, NearestNeighbors(), model.k, progress=progress)
    fitted = fit(
        model,
        data,
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=cosine(2e-3, settings.steps, 30),
        ema=0.99,
        seed=seed,
        progress=progress,
    )
    model = fitted.model
    swapped = model.replace(database=never)

    report: dict[str, Any] = {
        "rows": len(database),
        "rows_never_trained": len(never),
        "training_patches": len(x),
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),  # type: ignore[attr-defined]
        "training_steps": settings.steps,
        "final_loss": float(fitted.losses[-50:].mean()),
        "guidance": 1.5,
    }
    shown: dict[str, tuple[Tensor, Tensor, Generation]] = {}
    for name, which, queries in (
        ("trained", model, to_float(training)),
        ("never_trained", swapped, to_float(asked)),
    ):
        chosen = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed + 7))
        queries = queries[chosen[: settings.samples]]
        out = which.sample(images=queries, seed=seed, progress=progress)
        assert isinstance(which.database, EmbeddingDatabase)
        near = neighbor_images(which.database, out.neighbors)
        report[name] = likeness(out.images, near)
        shown[name] = (queries, near, out)
    return Color(model, swapped, shown, report)
