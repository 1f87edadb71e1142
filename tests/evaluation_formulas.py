"""Oracles of the metrics: their formulas in float64, written out without torch-fidelity."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frechet(a: Tensor, b: Tensor) -> float:
    """The trace of the root is the nuclear norm of the product of the covariances' roots."""

    def root(x: Tensor) -> Tensor:
        centered = (x - x.mean(0)) / math.sqrt(len(x) - 1)
        return torch.linalg.qr(centered, mode="r").R

    left, right = root(a.double()), root(b.double())
    means = (a.double().mean(0) - b.double().mean(0)).square().sum()
    cross = torch.linalg.matrix_norm(left @ right.T, "nuc")
    return (means + left.square().sum() + right.square().sum() - 2 * cross).item()


def kernel(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD of whole sets with the cubic kernel."""
    a, b = a.double(), b.double()
    d, n, m = a.shape[1], len(a), len(b)

    def k(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / d + 1) ** 3

    def mean(x: Tensor) -> Tensor:
        values = k(x, x)
        return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))

    return (mean(a) + mean(b) - 2 * k(a, b).sum() / (n * m)).item()


def covered(points: Tensor, centers: Tensor, k: int = 3) -> float:
    """Share of points within a ball of a center; radii by scikit-learn."""
    from sklearn.neighbors import NearestNeighbors

    found = NearestNeighbors(n_neighbors=k + 1).fit(centers.numpy()).kneighbors(centers.numpy())
    radius = torch.from_numpy(found[0][:, k])
    return (torch.cdist(points, centers) <= radius).any(1).double().mean().item()


def inception(logits: Tensor) -> float:
    """Exp of the mean divergence of p(y|x) from p(y), in one split."""
    p = logits.double().softmax(1)
    divergence = (p * (p.log() - p.mean(0, keepdim=True).log())).sum(1)
    return divergence.mean().exp().item()


def sliced(a: Tensor, b: Tensor, directions: int, seed: int) -> float:
    """MIND of two sets of one size, by numpy's sort, with the same directions."""
    import numpy as np

    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(a.shape[1], directions, generator=generator, dtype=torch.float64)
    axes = (axes / axes.norm(dim=0)).numpy()
    x, y = (np.sort(part.double().numpy() @ axes, axis=0) for part in (a, b))
    return float(3 * a.shape[1] * ((x - y) ** 2).mean())


def entropy_of_kernel(x: Tensor) -> float:
    """Vendi score from the eigenvalues of the whole kernel matrix."""
    units = x.double() / x.double().norm(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(units @ units.T / len(x)).clamp_min(1e-300)
    return torch.exp(-(values * values.log()).sum()).item()


def balls(a: Tensor, b: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage from the whole distance matrices."""
    a, b = a.double(), b.double()
    radius = torch.cdist(b, b).kthvalue(k + 1, dim=1).values
    within = torch.cdist(a, b) <= radius
    return within.sum().item() / (k * len(a)), within.any(0).double().mean().item()


def authentic(a: Tensor, b: Tensor) -> float:
    """AuthPct from the whole distance matrices."""
    a, b = a.double(), b.double()
    among = torch.cdist(b, b).fill_diagonal_(float("inf")).amin(1)
    distance, row = torch.cdist(a, b).min(1)
    return (distance > among[row]).double().mean().item()
