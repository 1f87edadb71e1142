"""Queries between two embeddings, for pictures that turn from one into another."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import torch
from torch import Tensor

from retrodiff.interfaces import Query, unit
from retrodiff.numbers import whole


def interpolated(one: Tensor, other: Tensor, n: int) -> Query:
    """Queries on the arc from one embedding to another, both ends with them.

    Spherical interpolation (Shoemake 1985), as unCLIP blends two pictures (Ramesh et al. 2022,
    section 3.2); the norm changes evenly.

    Args:
        one: (d,), raw scale.
        other: (d,).
        n: queries, 2 or more.

    Raises:
        ValueError: the embeddings have other shapes, or point in opposite directions.
    """
    n = whole("n", n, 2)
    if one.shape != other.shape or one.ndim != 1:
        raise ValueError(
            f"embeddings of shapes {tuple(one.shape)} and {tuple(other.shape)}: give two of one "
            "encoder, each (d,)"
        )
    a, b = one.double(), other.double()
    share = torch.linspace(0, 1, n, dtype=torch.float64, device=a.device).unsqueeze(1)
    angle = (unit(a) @ unit(b)).clamp(-1, 1).acos()
    if float(angle) > 3.14:
        raise ValueError("the embeddings are opposite, with no shortest arc between them")
    direction = (1 - share) * unit(a) + share * unit(b)
    if float(angle) > 1e-6:
        direction = ((1 - share) * angle).sin() * unit(a) + (share * angle).sin() * unit(b)
    norm = (1 - share) * a.norm() + share * b.norm()
    source = tuple(f"{100 * i // (n - 1)} %" for i in range(n))
    return Query((unit(direction) * norm).to(one.dtype), source, torch.full((n,), -1))
