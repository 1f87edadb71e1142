"""FID, KID, inception score, precision and recall, computed by torch-fidelity.

torch-fidelity (Obukhov et al. 2020, https://github.com/toshas/torch-fidelity; extra
``retrodiff[eval]``) is the source of these numbers; what is here refuses too few images and says
what was computed. Features may be of any network.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from retrodiff.evaluation.metrics import Score, checked

MISSING = 'torch-fidelity is not installed: pip install "retrodiff[eval]"'

LEAST = 2000
"""Below this many images the Fréchet distance is mostly its own bias."""


def frechet_distance(generated: Tensor, reference: Tensor) -> Score:
    """Fréchet distance of two Gaussians fitted to the features (FID: Heusel et al. 2017, eq. 6).

    ``|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2))``.

    Args:
        generated: (n, d).
        reference: (m, d).

    Raises:
        ValueError: fewer images than features on either side: the estimate's bias then exceeds what
            it measures. Use `kernel_distance` or `mind`.
    """
    a, b = checked(generated, reference)
    n, m, d = len(a), len(b), a.shape[1]
    if min(n, m) <= d:
        raise ValueError(
            f"the Fréchet distance of {d} features needs more than {d} images on both sides, got "
            f"{n} generated and {m} reference: give more, or use kernel_distance (KID) or mind"
        )
    metric = _module("metric_fid")
    statistics = [metric.fid_features_to_statistics(part) for part in (a, b)]
    found = metric.fid_statistics_to_metric(*statistics, verbose=False)
    value = max(0.0, found["frechet_inception_distance"])
    few = ""
    if min(n, m) < max(LEAST, 10 * d):
        few = f"biased upward: few images for {d} features; compare only at the same numbers"
    return Score("Fréchet distance", value, n, m, "lower", note=few)


def kernel_distance(
    generated: Tensor, reference: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> Score:
    """Unbiased squared MMD with the kernel ``(x.y / d + 1)^3`` (KID: Bińkowski et al. 2018).

    Args:
        generated: (n, d).
        reference: (m, d).
        subsets: random subsets whose mean is returned.
        size: images per subset and side, at most all of them; with all of them there is one subset.
        seed: of the subsets, below 2³².
    """
    a, b = checked(generated, reference, least=2)
    size = min(size, len(a), len(b))
    whole = size == len(a) == len(b)
    subsets = 1 if whole else subsets
    found = _module("metric_kid").kid_features_to_metric(
        a, b, kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    spread = None if whole else found["kernel_inception_distance_std"]
    name = f"KID ({subsets} subset{'s' * (subsets > 1)} of {size:,})"
    mean = found["kernel_inception_distance_mean"]
    return Score(name, mean, len(a), len(b), "lower", spread, "can be slightly negative")


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
    a, b = checked(generated, reference, least=k + 1)
    found = _module("metric_prc").prc_features_to_metric(
        a, b, prc_neighborhood=k, prc_batch_size=2048, save_cpu_ram=True, verbose=False
    )
    few = "" if min(len(a), len(b)) >= 500 else "few images: compare only at the same numbers"
    return (
        Score(f"precision (k={k})", found["precision"], len(a), len(b), "higher", note=few),
        Score(f"recall (k={k})", found["recall"], len(a), len(b), "higher", note=few),
    )


def inception_score(logits: Tensor, *, splits: int = 1, seed: int = 0) -> Score:
    """Exp of the mean divergence of p(y|x) from p(y) (Salimans et al. 2016).

    Args:
        logits: (n, classes) of a classifier, before the softmax.
        splits: parts of the images whose scores are averaged; papers use 10 of 5,000.
        seed: of the split, below 2³².

    Raises:
        ValueError: not (n, classes), not finite, or fewer images than splits.
    """
    logits, _ = checked(logits, logits, least=max(2, splits))
    n, classes = logits.shape
    found = _module("metric_isc").isc_features_to_metric(logits, splits, True, seed)
    spread = None if splits == 1 else found["inception_score_std"]
    few = "" if n >= 10 * classes else f"biased: few images for {classes:,} classes"
    name = "inception score" if splits == 1 else f"inception score ({splits} splits)"
    return Score(name, found["inception_score_mean"], n, 0, "higher", spread, few)


def available() -> bool:
    """Whether torch-fidelity is installed."""
    try:
        _module("metric_fid")
    except ImportError:
        return False
    return True


def _module(name: str) -> Any:
    try:
        with torch.no_grad():
            return importlib.import_module(f"torch_fidelity.{name}")
    except ImportError as error:
        raise ImportError(MISSING) from error
