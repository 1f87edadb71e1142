"""Launches the attention kernels on tensors: no check, no gradient, no way back."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from retrodiff.attention.launches import Launch, most_registers, table_tile
from retrodiff.attention.reference import check_grid


def geometry(n: int, regions: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(size, block_width, row_width, grid_width) of the regions, as the kernels count them."""
    size = n // regions
    if regions == 1 or height == 0:
        return size, size, size, 1
    side = check_grid(n, regions, (height, width))
    return size, width // side, width, side


def forward(
    x: Tensor,
    m: Tensor,
    offset: Tensor,
    u: Tensor,
    bias: Tensor,
    eps: float,
    heads: int,
    height: int,
    width: int,
    plan: Launch,
) -> Tensor:
    """The block's output; all tensors contiguous."""
    from retrodiff.attention import triton_kernel

    kernel: Any = triton_kernel.forward_kernel
    b, n, c = x.shape
    live, r, j, _ = m.shape
    size, *places = geometry(n, r, height, width)
    out = torch.empty_like(x)
    scratch = m.new_empty((live, n, j)) if plan.groups > 1 else m
    with _device(x):
        kernel[(-(-size // plan.bn), r, b)](
            x, m, offset, u, bias, out, scratch, n, size, live, *places, eps,
            C=c, K=j // heads, H=heads, KP=plan.kp, HG=plan.hg, GROUPS=plan.groups,
            BN=plan.bn, BC=plan.bc, BJ=plan.bj, PRECISION=plan.precision,
            STAGES=plan.stages, num_warps=plan.warps, num_stages=plan.stages,
            maxnreg=most_registers(plan.warps),
        )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    m: Tensor,
    offset: Tensor,
    u: Tensor,
    eps: float,
    heads: int,
    height: int,
    width: int,
    plan: Launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, m, offset, u and the bias (float32); all tensors contiguous."""
    from retrodiff.attention import triton_kernel

    backward_rows: Any = triton_kernel.backward_rows_kernel
    backward_tables: Any = triton_kernel.backward_tables_kernel
    b, n, c = x.shape
    live, r, j, _ = m.shape
    size, *places = geometry(n, r, height, width)
    k = j // heads
    grad_x = torch.empty_like(x)
    attention = m.new_empty((live, n, j))
    grad_scores = torch.empty_like(attention)
    mean_of, rstd_of = x.new_empty((2, live, n), dtype=torch.float32)
    grad_m, grad_u = torch.empty_like(m), torch.empty_like(u)
    grad_offset = torch.empty_like(offset)
    grad_bias = x.new_empty((live, r, c), dtype=torch.float32)
    tile = table_tile(size, m.dtype)
    with _device(x):
        backward_rows[(-(-size // plan.bn), r, b)](
            grad, x, m, m.mean(-1, dtype=torch.float32), offset, u, grad_x,
            attention, grad_scores, mean_of, rstd_of, n, size, live, *places, eps,
            C=c, K=k, H=heads, KP=plan.kp, HG=plan.hg, GROUPS=plan.groups,
            BN=plan.bn, BC=plan.bc, BJ=plan.bj, PRECISION=plan.precision,
            STAGES=plan.stages, num_warps=plan.warps, num_stages=plan.stages,
            maxnreg=most_registers(plan.warps),
        )  # fmt: skip
        backward_tables[(-(-c // tile.bc), -(-j // tile.bj), live * r)](
            grad, x, attention, grad_scores, mean_of, rstd_of,
            grad_m, grad_offset, grad_u, grad_bias, n, size, r, *places,
            C=c, J=j, BN=tile.bn, BC=tile.bc, BJ=tile.bj, PRECISION=plan.precision,
            STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
            maxnreg=most_registers(tile.warps),
        )  # fmt: skip
    bias = grad_bias.sum((0, 1))
    if b > live:
        bias = bias + grad[live:].sum((0, 1), dtype=torch.float32)
    return grad_x, grad_m, grad_offset, grad_u, bias


def _device(x: Tensor):
    """Triton launches on the current device: make that the one of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
