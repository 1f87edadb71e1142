"""The figures of the digits: a judge, copying, diversity, and what neighbors are worth to the loss.

The judge is an SVM trained on held-out images only: one trained on D would reward copies of D.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from retrodiff.demo.digit_scans import UNSEEN, WORDS, Split
from retrodiff.interfaces import Database, Query
from retrodiff.model import Model


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


def share_of(digits: np.ndarray, allowed: Sequence[int]) -> float:
    """The share of digits that are among the allowed ones."""
    return float(np.isin(digits, allowed).mean())


def spread(digits: np.ndarray) -> dict[str, float]:
    """The share of each digit, by its name."""
    return {WORDS[digit]: float((digits == digit).mean()) for digit in range(10)}
