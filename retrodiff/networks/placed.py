"""Where a network's weights are and in which precision, and tensors brought there."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from retrodiff.components import size


class Placed(nn.Module):
    """A module that says its dtype and device, and takes inputs of any floating dtype."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: that of the first floating-point parameter or buffer."""
        return self._first().dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._first().device

    def __repr__(self) -> str:
        return size(self)

    def _first(self) -> Tensor:
        tensors = chain(self.parameters(), self.buffers())
        return next(t for t in tensors if t.is_floating_point())


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers in float32; float64 stays. What leaves a first stage is never narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_floating(x: Tensor, name: str, shape: str) -> None:
    """Raises a ValueError for integers, booleans and complex numbers.

    Args:
        x: to be checked.
        name: what it is.
        shape: what is expected, for the error.
    """
    if not x.is_floating_point():
        raise ValueError(f"{name} have dtype {x.dtype}, expected floating-point {shape}")


def check_rows(x: Tensor, rows: int) -> None:
    """Raises a ValueError where a context of ``rows`` rows does not fit the batch x.

    A context may have a whole multiple of x's rows: the branches of guidance. 0 rows: no context.
    """
    if rows and (len(x) == 0 or rows % len(x)):
        raise ValueError(
            f"x has {len(x)} rows, the context {rows}: hand in as many of both, or a whole "
            "multiple for the branches of guidance"
        )
