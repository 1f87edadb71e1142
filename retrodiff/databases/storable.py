"""Embeddings as databases store them: float16, refused where that cannot hold them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from retrodiff.indexes.vectors import row_norms

STRAY = 0.01
"""How far a stored row may lie from the one that was given, as a fraction of its norm."""


def storable(embeddings: Tensor, encoder: str, name: Callable[[int], str]) -> tuple[Tensor, Tensor]:
    """Embeddings as they are stored, refused if float16 cannot hold them.

    Numbers above 65504 overflow. Below 6e-5 float16 loses digits, below 3e-8 everything: a row
    that is so small that this changes its direction by more than `STRAY` is refused. A row of
    zeros stays one.

    Args:
        embeddings: (n, d).
        encoder: who made them.
        name: row number -> what that row is called in an error.

    Returns:
        The embeddings (n, d) in float16, and the norms (n,) of these stored values.
    """
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings are {embeddings.dtype} of shape {tuple(embeddings.shape)}, "
            "expected floats (m, d)"
        )
    embeddings = embeddings.detach().cpu()
    stored = embeddings.to(torch.float16)
    norms = row_norms(stored)  # one pass over the rows serves both: a norm is finite iff its row is
    if not bool(norms.isfinite().all()):
        row = int((~norms.isfinite()).nonzero()[0, 0])
        what = "NaN or infinity" if not embeddings[row].isfinite().all() else "more than 65504"
        raise ValueError(
            f"the embedding of {name(row)} by {encoder} holds {what}: leave it out, or look at the "
            "encoder's weights and precision"
        )
    small = (norms < STRAY**-1 * 2.0**-25 * embeddings.shape[1] ** 0.5).nonzero().flatten()
    if len(small):
        given = embeddings[small].double()
        # Divided by the largest, so that no square underflows.
        largest = given.abs().amax(1, keepdim=True).clamp_min(5e-324)
        lost = (stored[small].double() - given) / largest
        stray = lost.norm(dim=1) > STRAY * (given / largest).norm(dim=1)
        if bool(stray.any()):
            row = int(small[stray][0])
            norm = float(embeddings[row].double().norm())
            raise ValueError(
                f"the embedding of {name(row)} by {encoder} has norm {norm:.3g}, too small for the "
                "float16 that rows are stored in: multiply all embeddings by one number (which "
                "leaves the cosine as it is), or look at the encoder's weights"
            )
    return stored, norms
