"""A linear layer whose product is oneDNN's where that is faster than torch's own choice.

On a CPU torch multiplies float32 with MKL, whose kernels for processors of AMD are up to a third
slower than oneDNN's, which torch has, too, and takes for bfloat16 and for convolutions.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 64
"""Rows of a product from which it is worth the way to another library."""


class Linear(nn.Linear):
    """`torch.nn.Linear`: the same parameters, the same numbers up to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of (..., in), by oneDNN where that is faster."""
    product = _product() if _plain(x) and x.dtype == weight.dtype else None
    if product is None:
        return F.linear(x, weight, bias)
    return product(x, weight, bias, "none", [], "")


def _plain(x: Tensor) -> bool:
    """Whether a product is a large one of float32 on a CPU, of which no gradient is wanted."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[:-1].numel() >= ROWS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def _product() -> Any:
    """OneDNN's product, where this torch has it and the processor is AMD's; else None."""
    if not torch.backends.mkldnn.is_available() or not _made_by_amd():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _made_by_amd() -> bool:
    about = platform.processor()
    try:
        with Path("/proc/cpuinfo").open("rb") as file:
            about += file.read(4096).decode("ascii", "replace")
    except OSError:
        pass
    return "AuthenticAMD" in about
