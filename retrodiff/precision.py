"""How exactly devices compute: what is turned off where a result must be exact, what is fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

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


def best_precision(device: str | torch.device) -> Literal["float32", "bfloat16"]:
    """bfloat16 where the device multiplies it faster than float32, else float32.

    Args:
        device: of the network. A CPU has to have AVX512-BF16 or AMX, a GPU to have bfloat16 itself.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    found = [getattr(torch.cpu, probe, None) for probe in probes] if kind == "cpu" else []
    return "bfloat16" if any(probe is not None and probe() for probe in found) else "float32"
