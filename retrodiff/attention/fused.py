"""Fused neighbor cross-attention as two PyTorch operators, with their gradients.

`fused_attention` is absorbed neighbor cross-attention in one kernel. The operators are opaque to
torch.compile (they have fake kernels), so that nothing breaks the graph, and CUDA graphs record
them. Inside them each class of shapes is compared with the absorbed path once (see `proving`).
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from retrodiff.attention.absorbed import AttentionTables, absorbed_attention
from retrodiff.attention.launches import INTERPRETED
from retrodiff.attention.proving import proven_backward, proven_forward
from retrodiff.attention.reference import check_grid

MAX_K = 64
"""Most neighbors of one region that the kernels take."""

TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What x and the tables may be."""


def refusal(x: Tensor, tables: AttentionTables) -> str | None:
    """Why the fused kernels cannot take this call, in words; None if they can."""
    if x.dtype not in DTYPES:
        return f"{x.dtype} is not one of float32, bfloat16, float16"
    return refusal_of(x.device, tables.m.dtype, tables.k)


def refusal_of(device: torch.device, dtype: torch.dtype, k: int) -> str | None:
    """Why the fused kernels cannot run with such tables, in words; None if they can."""
    if not TRITON:
        return "triton is not installed"
    if device.type != "cuda" and not INTERPRETED:
        return f"no Triton kernels on device {device.type}, CUDA only"
    # Of the ways to ask, the one that torch.compile takes for a constant.
    if device.type == "cuda" and torch.cuda.get_device_properties(device.index or 0).major < 8:
        return "the GPU is older than compute capability 8.0"
    if dtype not in DTYPES:
        return f"{dtype} is not one of float32, bfloat16, float16"
    if k > MAX_K:
        return f"k={k} is above the kernels' limit of {MAX_K}"
    return None


def fused_attention(
    x: Tensor,
    tables: AttentionTables,
    bias: Tensor,
    eps: float = 1e-5,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """The same as `absorbed_attention`, in one kernel; (b, n, c) -> (b, n, c)."""
    if tables.m.shape[0] == 0:
        return absorbed_attention(x, tables, bias, eps, shape)
    n, r = x.shape[1], tables.regions
    if shape is not None:
        check_grid(n, r, shape)
    elif n % r:
        raise ValueError(f"{r} regions do not divide {n} positions evenly")
    height, width = shape or (0, 0)
    return torch.ops.retrodiff.neighbor_attention(
        x, tables.m, tables.offset, tables.u, bias, eps, tables.heads, height, width
    )


def _forward_fake(x, m, offset, u, bias, eps, heads, height, width):
    del m, offset, u, bias, eps, heads, height, width
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_fake(grad, x, m, offset, u, eps, heads, height, width):
    del grad, eps, heads, height, width
    like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    return like(x), like(m), like(offset), like(u), x.new_empty(x.shape[-1:], dtype=torch.float32)


def _setup(ctx, inputs, output) -> None:
    del output
    x, m, offset, u, bias, *ctx.constants = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, m, offset, u)


def _gradients(ctx, grad: Tensor):
    *grads, bias = torch.ops.retrodiff.neighbor_attention_backward(
        grad, *ctx.saved_tensors, *ctx.constants
    )
    return *grads, bias.to(ctx.bias_dtype), None, None, None, None


def _operator(name: str, run: Any, fake: Any) -> str:
    """Registers an operator; `torch.library.custom_op` would import torch._dynamo: seconds."""
    _LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=()))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"retrodiff::{name}", fake, lib=_LIBRARY)
    return f"retrodiff::{name}"


_LIBRARY = torch.library.Library("retrodiff", "FRAGMENT")
_operator("neighbor_attention_backward", proven_backward, _backward_fake)
torch.library.register_autograd(
    _operator("neighbor_attention", proven_forward, _forward_fake),
    _gradients,
    setup_context=_setup,
    lib=_LIBRARY,
)
