"""Bounds on cosines from a few principal axes, so that most rows need no full product.

With q = q_p + q_r and x = x_p + x_r split into the part along p axes and the rest, Cauchy and
Schwarz give q . x <= q_p . x_p + |q_r| |x_r|. Both terms are one product of width p + 1: the rest's
norm is one more coordinate. Embeddings of pictures lie close to a few axes, so the bound is tight;
where it is not, `Projection.best` says so and there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PAIR = 12  # one product of a single pair costs as much as so many in a matrix product
_WORTH = 0.75  # of the full product's operations; above this a projection is not worth it


@dataclass(frozen=True)
class Projection:
    """Principal axes, and how far bounds from them may lie too low by rounding.

    Args:
        axes: (d, p) orthonormal up to rounding, float32.
        slack: to be added to a computed bound.
        rest: added to the square of a rest's norm.
    """

    axes: Tensor
    slack: float
    rest: float

    @classmethod
    def along(cls, axes: Tensor) -> Projection:
        """The projection on some axes (d, p)."""
        d, p = axes.shape
        gram = axes.double().T @ axes.double()
        skew = float((gram - torch.eye(p, dtype=torch.float64, device=gram.device)).norm())
        unit = (d + 32) * 2.0**-24  # a float32 dot product of unit vectors strays by less
        return cls(axes, 2 * skew + unit * (2 * p**0.5 + 2), skew + unit * (2 * p**0.5 + 4))

    def coordinates(self, unit: Tensor, out: Tensor | None = None) -> Tensor:
        """Unit vectors (n, d) -> (n, p + 1): along the axes, and the norm of the rest."""
        p = self.axes.shape[1]
        if out is None:
            out = unit.new_empty(len(unit), p + 1)
        torch.mm(unit, self.axes, out=out[:, :p])
        rest = 1 + self.rest - out[:, :p].square().sum(1)
        out[:, p] = rest.clamp_min_(self.rest).sqrt_()
        return out

    @classmethod
    def best(
        cls,
        axes: Tensor,
        sample: Tensor,
        queries: Tensor,
        least: Tensor,
        batch: int,
    ) -> Projection | None:
        """The number of axes that promises the least work, or None where all are too many.

        Args:
            axes: (d, p) the leading axes, as many as may be of use.
            sample: (s, d) some of the unit rows.
            queries: (b, d) some of the unit queries.
            least: (b,) cosine that a row must reach to be of interest.
            batch: queries there are in all.
        """
        d = axes.shape[0]
        found: tuple[float, Projection | None] = (_WORTH, None)
        for p in (d // 8, d // 4, d // 2):
            if p < 8 or p > axes.shape[1]:
                continue
            projection = cls.along(axes[:, :p].contiguous())
            bounds = projection.coordinates(queries) @ projection.coordinates(sample).T
            left = float((bounds >= least[:, None] - projection.slack).float().mean())
            work = p / d * (1 + d / batch) + PAIR * left
            if work < found[0]:
                found = (work, projection)
        return found[1]
