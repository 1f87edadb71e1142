"""Metrics that torch-fidelity lacks, computed from features; float64 throughout.

Every function takes features (n, d) of generated images and (m, d) of reference images, from any
network, and returns a `Score`: the number with what it was computed from. A number that needs more
images than were given is refused, or the score says how far it is biased. FID, KID, IS, precision
and recall are in ``fidelity.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from retrodiff.interfaces import unit

BLOCK = 1024
"""Rows of a distance matrix held at once."""


@dataclass(frozen=True)
class Score:
    """A number and what it was computed from.

    Args:
        name: of the metric, with its settings.
        value: the number.
        generated: number of generated images.
        reference: number of reference images; 0: the metric has no reference.
        better: ``lower`` or ``higher``.
        spread: standard deviation over random choices of the metric, or standard error of a mean.
        note: what to keep in mind when reading it.
        features: name of the network; empty where only features were given.
        against: name of the reference set, likewise.
        real: the same number for one half of the reference images (at most as many as there are
            generated ones) against the other half: what a perfect generator would get at these
            numbers of images; None: not computed.

    Examples:
        >>> import torch
        >>> from retrodiff.evaluation import vendi
        >>> print(vendi(torch.eye(10)))
        Vendi score: 10 (10 generated, higher is better)
    """

    name: str
    value: float
    generated: int
    reference: int
    better: str
    spread: float | None = None
    note: str = ""
    features: str = ""
    against: str = ""
    real: float | None = None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.2g}"
        facts = [self.images, f"{self.better} is better"]
        if self.features:
            facts.insert(1, f"features {self.features}")
        if self.real is not None:
            facts.append(f"real images {self.real:.4g}")
        return f"{self.name}: {self.value:.4g}{spread} ({', '.join(facts)})"

    @property
    def images(self) -> str:
        """How many images on both sides, and which reference, in words."""
        if not self.reference:
            return f"{self.generated:,} generated"
        of = f" of {self.against}" if self.against else ""
        return f"{self.generated:,} generated against {self.reference:,}{of}"


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
    a, b = checked(generated, reference, least=2)
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


def density_coverage(generated: Tensor, reference: Tensor, *, k: int = 5) -> tuple[Score, Score]:
    """Density and coverage (Naeem et al. 2020, eq. 3 and 5): less moved by outliers.

    Args:
        generated: (n, d).
        reference: (m, d).
        k: which neighbor sets the radius of a reference image.
    """
    a, b = checked(generated, reference, least=k + 1)
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
    a, _ = checked(generated, generated)
    units = a / a.norm(dim=1, keepdim=True).clamp_min(1e-300)
    small = units @ units.T if len(a) <= a.shape[1] else units.T @ units
    values = torch.linalg.eigvalsh(small / len(a)).clamp_min(0)
    values = values[values > 1e-12]
    value = torch.exp(-(values * values.log()).sum()).item()
    return Score("Vendi score", value, len(a), 0, "higher", note=f"at most {len(a):,}")


def authenticity(generated: Tensor, training: Tensor) -> Score:
    """Share of images that are no noisy copy of a training image (AuthPct: Alaa et al. 2022).

    An image is a copy if it is nearer to its nearest training image than that one is to any other
    training image.

    Args:
        generated: (n, d).
        training: (m, d).
    """
    a, b = checked(generated, training, least=2)
    nearest = radii(b, 1)
    authentic = []
    for distance in _distances(a, b):
        value, row = distance.min(1)
        authentic.append(value > nearest[row])
    share = torch.cat(authentic).double().mean().item()
    return Score("authentic share (AuthPct)", share, len(a), len(b), "higher")


def clip_score(images: Tensor, prompts: Tensor) -> Score:
    """Mean of 100 max(cos, 0) of each image and its own prompt (Hessel et al. 2021, w = 1).

    The note says what the same images get with each other's prompts: what is above that comes from
    following the prompt.

    Args:
        images: embeddings (n, d) of the images.
        prompts: embeddings (n, d) of their prompts, by the same encoder.

    Raises:
        ValueError: numbers of images and prompts differ.
    """
    a, b = checked(images, prompts, least=2)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} images and {len(b)} prompts: give one prompt for each image")
    cosines = 100 * (unit(a) @ unit(b).T).clamp_min(0) if len(a) <= 4 * BLOCK else None
    own = 100 * (unit(a) * unit(b)).sum(1).clamp_min(0)
    note = ""
    if cosines is not None:
        # Images that share a prompt are no chance pair.
        other = (b[:, None] != b[None]).any(-1) if len(b) <= 512 else torch.cdist(b, b) > 1e-9
        chance = cosines[other].mean().item() if bool(other.any()) else float("nan")
        note = f"{chance:.4g} with the prompts of other images" if math.isfinite(chance) else ""
    spread = own.std().item() / math.sqrt(len(own))
    return Score("CLIP score", own.mean().item(), len(a), 0, "higher", spread, note)


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


def checked(generated: Tensor, reference: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """Features of both sides as float64 on the CPU; refuses what cannot be compared."""
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


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    for part in a.split(BLOCK):
        yield torch.cdist(part, b, compute_mode="use_mm_for_euclid_dist")
