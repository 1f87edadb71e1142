"""Which image's condition goes with which image: for models conditioned on an instance."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairing:
    """Pairs of training images: one gives query and neighbors, the other one is drawn.

    Without it, an image is drawn from its own embedding and neighbors. With it, a network learns
    the neighborhood of an instance (IC-GAN: Casanova et al. 2021): the condition is image i's, the
    target one of the images near to it.

    Args:
        condition: (p,) numbers of training images.
        target: (p,) numbers of training images.

    Raises:
        ValueError: numbers of conditions and targets differ, there are none, or they are no whole
            numbers.

    Examples:
        >>> import torch
        >>> from retrodiff.training import Pairing
        >>> table = torch.tensor([[1, 2], [0, 2], [0, 1]])
        >>> Pairing.from_table(table).target.tolist()
        [1, 2, 0, 2, 0, 1]
    """

    condition: Tensor
    target: Tensor

    def __post_init__(self) -> None:
        for name in ("condition", "target"):
            rows = torch.as_tensor(getattr(self, name))
            if rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
                raise ValueError(
                    f"{name} is {rows.dtype} of shape {tuple(rows.shape)}: give whole numbers (p,)"
                )
            object.__setattr__(self, name, rows.long().cpu())
        if len(self.condition) != len(self.target):
            raise ValueError(
                f"{len(self.condition)} conditions and {len(self.target)} targets: give one for "
                "each"
            )
        if not len(self):
            raise ValueError("a pairing has no pairs: give at least one")

    def __len__(self) -> int:
        return len(self.condition)

    @classmethod
    def from_table(cls, table: Tensor) -> Pairing:
        """Each training image with each of its neighbors among the training images.

        Args:
            table: (n, k) numbers of training images, as `neighbor_table` finds them where the
                database holds the training images in their order.

        Raises:
            ValueError: the table is not (n, k).
        """
        if table.ndim != 2:
            raise ValueError(f"the table has shape {tuple(table.shape)}, expected (n, k)")
        n, k = table.shape
        return cls(torch.arange(n).repeat_interleave(k), table.reshape(-1))

    def check(self, n: int) -> None:
        """Refuses pairs of images that a set of n images does not have.

        Raises:
            ValueError: an image is named that does not exist.
        """
        for name in ("condition", "target"):
            rows: Tensor = getattr(self, name)
            low, high = int(rows.min()), int(rows.max())
            if low < 0 or high >= n:
                raise ValueError(
                    f"{name} of the pairing names image {low if low < 0 else high}, but there are "
                    f"{n} training images, 0 to {n - 1}"
                )

    def digest(self) -> str:
        """Hash of all pairs."""
        both = torch.stack([self.condition, self.target]).contiguous()
        return hashlib.sha256(both.numpy().data).hexdigest()[:32]
