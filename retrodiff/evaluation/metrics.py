"""Distances between two sets of images, computed from features; float64 throughout.

Every function takes features (n, d) of generated images and (m, d) of reference images, from any
network, and returns a `Score`: the number with what it was computed from. A number that needs more
images than were given is refused, or the score says how far it is biased.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024
"""Rows of a distance matrix held at once."""


@dataclass(frozen=True)
class Score:
    """A number and what it was computed from.

    Args:
        name: of the metric, with its settings.
        value: the number.
        generated: how many generated images.
        reference: how many reference images; 0: the metric has no reference.
        better: ``lower`` or ``higher``.
        spread: standard deviation over random choices of the metric, where it makes any.
        note: what to keep in mind when reading it.
    """

    name: str
    value: float
    generated: int
    reference: int
    better: str
    spread: float | None = None
    note: str = ""

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.2g}"
        against = f" against {self.reference:,}" if self.reference else ""
        return f"{self.name}: {self.value:.4g}{spread} ({self.generated:,}{against}, {self.better})"


def frechet_distance(generated: Tensor, reference: Tensor) -> Score:
    """Fréchet distance of two Gaussians fitted to the features (FID: Heusel et al. 2017, eq. 6).

    ``|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2))``. The trace of the root is the nuclear norm of the
    product of the centered features, which is exact also where covariances are singular.

    Args:
        generated: (n, d).
        reference: (m, d).

    Raises:
        ValueError: fewer images than features on either side: the estimate's bias then exceeds what
            it measures. Use `kernel_distance` or `mind`.
    """
    a, b = _checked(generated, reference)
    n, m, d = len(a), len(b), a.shape[1]
    if min(n, m) <= d:
        raise ValueError(
            f"the Fréchet distance of {d} features needs more than {d} images on both sides, got "
            f"{n} generated and {m} reference: give more, or use kernel_distance (KID) or mind"
        )
    means = (a.mean(0) - b.mean(0)).square().sum()
    left, right = _root(a), _root(b)
    cross = torch.linalg.matrix_norm(left @ right.T, "nuc")
    value = means + left.square().sum() + right.square().sum() - 2 * cross
    few = "" if min(n, m) >= 10 * d else f"biased upward: fewer than ten images per feature (d={d})"
    return Score("Fréchet distance", max(0.0, value.item()), n, m, "lower", note=few)


def kernel_distance(
    generated: Tensor, reference: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> Score:
    """Unbiased squared MMD with the kernel ``(x.y / d + 1)^3`` (KID: Bińkowski et al. 2018).

    Args:
        generated: (n, d).
        reference: (m, d).
        subsets: random subsets whose mean is returned.
        size: images per subset and side, at most all of them; with all of them there is one subset.
        seed: of the subsets.
    """
    a, b = _checked(generated, reference, least=2)
    size = min(size, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    whole = size == len(a) == len(b)
    values = torch.stack(
        [
            _mmd(a, b) if whole else _mmd(_some(a, size, generator), _some(b, size, generator))
            for _ in range(1 if whole else subsets)
        ]
    )
    spread = None if whole else values.std(correction=0).item()
    name = f"kernel distance (KID, {len(values)} subsets of {size:,})"
    return Score(name, values.mean().item(), len(a), len(b), "lower", spread)


def mind(generated: Tensor, reference: Tensor, *, directions: int = 1000, seed: int = 0) -> Score:
    """Sliced squared Wasserstein distance times three times the width (MIND, arXiv 2605.06797).

    Both sets are projected on random directions and sorted; unlike sizes are compared at the
    quantiles of the smaller one. Meant for a thousand images and more, where the Fréchet distance
    is still biased.

    Args:
        generated: (n, d).
        reference: (m, d).
        directions: random unit vectors.
        seed: of the directions.
    """
    a, b = _checked(generated, reference, least=2)
    generator = torch.Generator().manual_seed(seed)
    d, n = a.shape[1], min(len(a), len(b))
    axes = torch.randn(d, directions, generator=generator, dtype=torch.float64)
    axes /= axes.norm(dim=0)
    x, y = ((part @ axes).sort(0).values for part in (a, b))
    if len(a) != len(b):
        at = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        x, y = (torch.quantile(part, at, dim=0) for part in (x, y))
    values = 3 * d * (x - y).square().mean(0)
    few = "" if n >= 1000 else "fewer than 1,000 images: compare only with the same numbers"
    spread = values.std().item() / math.sqrt(directions)
    return Score("MIND", values.mean().item(), len(a), len(b), "lower", spread, few)


def precision_recall(generated: Tensor, reference: Tensor, *, k: int = 3) -> tuple[Score, Score]:
    """Share of each set that lies within the other's manifold (Kynkäänniemi et al. 2019, eq. 2).

    The manifold is the union of balls around the images, each as wide as the distance to the k-th
    nearest image of the same set.

    Args:
        generated: (n, d).
        reference: (m, d).
        k: which neighbor sets the radius.

    Returns:
        Precision (generated images within the reference manifold) and recall (the reverse).
    """
    a, b = _checked(generated, reference, least=k + 1)
    precision = _covered(a, b, radii(b, k)).mean().item()
    recall = _covered(b, a, radii(a, k)).mean().item()
    return (
        Score(f"precision (k={k})", precision, len(a), len(b), "higher"),
        Score(f"recall (k={k})", recall, len(a), len(b), "higher"),
    )


def density_coverage(generated: Tensor, reference: Tensor, *, k: int = 5) -> tuple[Score, Score]:
    """Density and coverage (Naeem et al. 2020, eq. 3 and 5): less moved by outliers.

    Args:
        generated: (n, d).
        reference: (m, d).
        k: which neighbor sets the radius of a reference image.
    """
    a, b = _checked(generated, reference, least=k + 1)
    radius = radii(b, k)
    inside, hit = torch.zeros((), dtype=torch.float64), torch.zeros(len(b), dtype=torch.bool)
    for distance in _distances(a, b):
        within = distance <= radius
        inside += within.sum()
        hit |= within.any(0)
    density = (inside / (k * len(a))).item()
    coverage = hit.double().mean().item()
    return (
        Score(f"density (k={k})", density, len(a), len(b), "higher", note="can exceed 1"),
        Score(f"coverage (k={k})", coverage, len(a), len(b), "higher"),
    )


def vendi(generated: Tensor) -> Score:
    """Effective number of different images: exp of the entropy of K / n (Friedman & Dieng 2023).

    Args:
        generated: (n, d); similarity K is the cosine.
    """
    a, _ = _checked(generated, generated)
    units = a / a.norm(dim=1, keepdim=True).clamp_min(1e-300)
    small = units @ units.T if len(a) <= a.shape[1] else units.T @ units
    values = torch.linalg.eigvalsh(small / len(a)).clamp_min(0)
    values = values[values > 1e-12]
    value = torch.exp(-(values * values.log()).sum()).item()
    return Score("Vendi score", value, len(a), 0, "higher", note=f"at most {len(a):,}")


def inception_score(probabilities: Tensor) -> Score:
    """Exp of the mean divergence of p(y|x) from p(y) (Salimans et al. 2016), in one split.

    Args:
        probabilities: (n, classes) of a classifier; each row sums to 1.
    """
    p = probabilities.double()
    if p.ndim != 2 or not torch.allclose(p.sum(1), torch.ones(len(p), dtype=p.dtype), atol=1e-4):
        raise ValueError("inception_score takes probabilities (n, classes), each row summing to 1")
    mean = p.mean(0, keepdim=True)
    divergence = (p * (p.clamp_min(1e-300).log() - mean.clamp_min(1e-300).log())).sum(1)
    return Score("inception score", divergence.mean().exp().item(), len(p), 0, "higher")


def authenticity(generated: Tensor, training: Tensor) -> Score:
    """Share of images that are no noisy copy of a training image (AuthPct: Alaa et al. 2022).

    An image is a copy if it is nearer to its nearest training image than that one is to any other
    training image.

    Args:
        generated: (n, d).
        training: (m, d).
    """
    a, b = _checked(generated, training, least=2)
    nearest = radii(b, 1)
    authentic = []
    for distance in _distances(a, b):
        value, row = distance.min(1)
        authentic.append(value > nearest[row])
    share = torch.cat(authentic).double().mean().item()
    return Score("authentic share (AuthPct)", share, len(a), len(b), "higher")


def radii(features: Tensor, k: int) -> Tensor:
    """Distance (m,) of every image to its k-th nearest other image."""
    x = features.double()
    parts, start = [], 0
    for distance in _distances(x, x):
        rows = torch.arange(len(distance))
        distance[rows, rows + start] = float("inf")
        parts.append(distance.kthvalue(k, dim=1).values)
        start += len(distance)
    return torch.cat(parts)


def _checked(generated: Tensor, reference: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    for name, part in (("generated", generated), ("reference", reference)):
        if part.ndim != 2:
            raise ValueError(f"{name} features must be (n, d), got {tuple(part.shape)}")
        if len(part) < least:
            raise ValueError(f"{len(part)} {name} images, but at least {least} are needed")
        if not bool(torch.isfinite(part).all()):
            raise ValueError(f"the {name} features are not all finite: look for broken images")
    if generated.shape[1] != reference.shape[1]:
        raise ValueError(
            f"generated features have width {generated.shape[1]}, reference ones "
            f"{reference.shape[1]}: extract both with one network"
        )
    return generated.detach().cpu().double(), reference.detach().cpu().double()


def _root(x: Tensor) -> Tensor:
    """A square R (d, d) with R.T R = the covariance."""
    centered = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    return torch.linalg.qr(centered, mode="r").R


def _mmd(a: Tensor, b: Tensor) -> Tensor:
    d, n, m = a.shape[1], len(a), len(b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / d + 1) ** 3

    def mean(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return mean(a) + mean(b) - 2 * kernel(a, b).sum() / (n * m)


def _some(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=generator)[:size]]


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    for part in a.split(BLOCK):
        yield torch.cdist(part, b, compute_mode="use_mm_for_euclid_dist")


def _covered(points: Tensor, centers: Tensor, radius: Tensor) -> Tensor:
    parts = [(distance <= radius).any(1) for distance in _distances(points, centers)]
    return torch.cat(parts).double()
