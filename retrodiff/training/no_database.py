"""The database of a training that retrieves nothing: no rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retrodiff.interfaces import Database, Fingerprint, Neighbors, Query, Record


@dataclass(frozen=True)
class NoDatabase(Database):
    """No rows, of a width.

    Args:
        dim: of the training images' own embeddings.
    """

    dim: int

    @property
    def fingerprint(self) -> Fingerprint:
        """Of no encoder."""
        return Fingerprint(encoder="none", weights="", preprocessing="none", dim=self.dim)

    def __len__(self) -> int:
        return 0

    def embeddings(self, indices: Tensor) -> Tensor:
        """None of them."""
        return torch.zeros(*indices.shape, self.dim)

    def search(self, query: Query, k: int) -> Neighbors:
        """Refused."""
        raise ValueError(
            f"k={k} neighbors of {len(query)} images, but this training set has no database: make "
            "it with TrainingSet.of"
        )

    def records(self, indices: Tensor) -> list[Record]:
        """Of no rows."""
        return [{}] * len(indices)
