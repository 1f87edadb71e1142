"""Turns autocast and narrowed products off where a result must be exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in on a device; None: it is off, or unknown there (meta)."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turns autocast off for a device until the end of the block."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def full_precision() -> Iterator[None]:
    """No autocast, and float32 products of float32 on a CPU, until the end of the block.

    Also a decorator: ``@full_precision()``. What `torch.set_float32_matmul_precision` allows a CPU
    (products in bfloat16) is off meanwhile. TF32 on a GPU is not touched: code that may run there
    must not rely on float32 products.
    """
    with ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
        if torch.compiler.is_compiling():
            matmul = None  # it cannot be traced
        allowed = getattr(matmul, "fp32_precision", "none")
        if allowed not in ("none", "ieee"):
            matmul.fp32_precision = "ieee"
            stack.callback(setattr, matmul, "fp32_precision", allowed)
        yield
