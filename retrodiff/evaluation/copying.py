"""Finds images that copy others: nearer to them than held-out real images ever come.

How near is too near depends on the data and the features: two photographs of one place are alike
without a copy. So the threshold comes from real images that the model never saw (the null), and
what is reported is the excess over them (after Somepalli et al. 2023, who compare with the same
distance among real images).
Use features of another network than the one that conditions the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retrodiff.interfaces import unit

BLOCK = 2048


@dataclass(frozen=True)
class Copying:
    """How near generated images come to the images of one source.

    Args:
        source: name of what may have been copied, such as ``training`` or ``database``.
        similarity: (n,) cosine of each generated image to its nearest image of the source.
        row: (n,) which image of the source that is.
        null: (h,) the same cosine for held-out real images.
        threshold: cosine above which an image counts as a near-duplicate.
        sensitivity: share of planted copies (slightly cropped source images) above the threshold;
            None: none were planted. Low values mean that these features would miss copies.
    """

    source: str
    similarity: Tensor
    row: Tensor
    null: Tensor
    threshold: float
    sensitivity: float | None = None

    @property
    def rate(self) -> float:
        """Share of generated images above the threshold."""
        return (self.similarity > self.threshold).double().mean().item()

    @property
    def null_rate(self) -> float:
        """Share of held-out real images above the threshold: the rate of false alarms."""
        return (self.null > self.threshold).double().mean().item()

    @property
    def excess(self) -> float:
        """Share of generated images above the threshold, less the rate of false alarms."""
        return self.rate - self.null_rate

    @property
    def copies(self) -> Tensor:
        """Generated images above the threshold, the worst first."""
        order = self.similarity.argsort(descending=True, stable=True)
        return order[self.similarity[order] > self.threshold]

    def worst(self, n: int = 20) -> list[tuple[int, int, float]]:
        """The n nearest pairs: generated image, source image, cosine."""
        order = self.similarity.argsort(descending=True, stable=True)[:n].tolist()
        return [(i, int(self.row[i]), float(self.similarity[i])) for i in order]

    def __str__(self) -> str:
        found = self.sensitivity
        planted = "" if found is None else f"; {found:.0%} of planted copies are found"
        return (
            f"near-duplicates of {self.source}: {self.rate:.1%} of {len(self.similarity):,} "
            f"generated against {self.null_rate:.1%} of {len(self.null):,} held-out images "
            f"(cosine above {self.threshold:.3f}{planted})"
        )


def copying(
    generated: Tensor,
    held_out: Tensor,
    sources: Mapping[str, Tensor],
    *,
    planted: Mapping[str, Tensor] | None = None,
    false_alarms: float = 0.01,
) -> dict[str, Copying]:
    """Near-duplicates among generated images, above what held-out real images show.

    Args:
        generated: features (n, d) of generated images.
        held_out: features (h, d) of real images that are in none of the sources.
        sources: features (m, d) by name: training images, the database, neighbors that were used.
        planted: features (p, d) of slightly changed copies of some images of a source, by name, to
            measure how many copies these features would find.
        false_alarms: share of held-out images that may lie above the threshold.

    Returns:
        One `Copying` for each source.

    Raises:
        ValueError: too few held-out images to set the threshold.
    """
    least = round(1 / false_alarms)
    if len(held_out) < least:
        raise ValueError(
            f"{len(held_out)} held-out images cannot set a threshold with {false_alarms:.1%} false "
            f"alarms: give at least {least}"
        )
    found = {}
    for name, features in sources.items():
        similarity, row = nearest(generated, features)
        null, _ = nearest(held_out, features)
        allowed = int(len(null) * false_alarms)
        threshold = null.sort(descending=True).values[allowed].item()
        sensitivity = None
        if planted is not None and name in planted:
            near, _ = nearest(planted[name], features)
            sensitivity = (near > threshold).double().mean().item()
        found[name] = Copying(name, similarity, row, null, threshold, sensitivity)
    return found


def nearest(queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine (n,) to the nearest of the rows, and which one that is (n,)."""
    if queries.shape[1] != rows.shape[1]:
        raise ValueError(
            f"features of width {queries.shape[1]} and {rows.shape[1]} cannot be compared: extract "
            "both with one network"
        )
    keys = unit(rows.detach().cpu().double())
    parts = [(unit(part) @ keys.T).max(1) for part in queries.detach().cpu().double().split(BLOCK)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
