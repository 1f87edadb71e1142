"""Fused neighbor cross-attention as two PyTorch operators, with their gradients and launch sizes.

`fused_attention` is absorbed neighbor cross-attention in one kernel. The operators are opaque to
torch.compile (they have fake kernels), so that nothing breaks the graph, and CUDA graphs record
them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrodiff.attention.absorbed import AttentionTables, absorbed_attention
from retrodiff.attention.reference import check_grid

MAX_K = 64
"""Most neighbors of one region that the kernels take."""

TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels (it takes CPU tensors)."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What x and the tables may be."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Sizes of one launch.

    Args:
        kp: columns of a head, a power of two.
        hg: heads of a group, a power of two.
        groups: of heads.
        bn: rows of a tile.
        bc: channels of a chunk.
        bj: columns of a chunk where heads play no role.
        warps: of a program.
        stages: of software pipelining.
        precision: of products, see `products`.
    """

    kp: int
    hg: int
    groups: int
    bn: int
    bc: int
    bj: int
    warps: int
    stages: int
    precision: str

    @property
    def columns(self) -> int:
        """Columns that the padded score product runs over."""
        return self.groups * self.hg * self.kp


def power_of_two(number: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (number - 1).bit_length()


def launch(*, size: int, heads: int, k: int, dtype: torch.dtype, backward: bool = False) -> Launch:
    """Sizes for regions of ``size`` positions.

    Args:
        size: positions of a region.
        heads: h.
        k: neighbors.
        dtype: of the tables.
        backward: for the kernel that gives the gradient of x.
    """
    kp = power_of_two(k)
    narrow = dtype == torch.float32
    widest = 128 if backward or narrow else 256
    hg = max(power_of_two(heads), -(-16 // kp))
    if hg * kp > widest:
        hg = 1 if kp > 32 else 128 // kp
    groups = -(-heads // hg)
    # rows, channels, warps, stages: no spills on sm_80 and sm_90, two programs at a time where the
    # registers allow it (see tests/test_attention_resources.py).
    if narrow and backward:
        sizes = (32, 32, 8, 2) if hg * kp <= 64 else (32, 16, 8, 2)
    elif narrow:
        sizes = (32, 32, 8, 2) if hg * kp <= 64 else (32, 32, 8, 1)
    elif backward:  # an odd k leaves rows unaligned, and their addresses cost registers
        sizes = (32, 32, 8, 2) if groups > 1 and k % 2 else (64, 32, 8, 2)
    elif groups > 1:
        sizes = (64, 64, 8, 2)
    else:
        sizes = {256: (64, 32, 8, 2), 128: (64, 64, 8, 3)}.get(hg * kp, (128, 32, 8, 4))
    bn, bc, warps, stages = sizes
    return Launch(
        kp=kp,
        hg=hg,
        groups=groups,
        bn=min(bn, max(16, power_of_two(size))),
        bc=bc,
        bj=32 if narrow else 64,
        warps=warps,
        stages=stages,
        precision=products(),
    )


def products() -> str:
    """Precision of float32 products in the kernels: torch's own, exact unless TF32 is allowed."""
    if INTERPRETED:
        return "interpreted"
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    if precision is None:  # before torch 2.9
        return "tf32" if matmul.allow_tf32 else "ieee"
    return "tf32" if precision == "tf32" else "ieee"


@dataclass(frozen=True, kw_only=True)
class TableTile:
    """Sizes of a launch that sums over rows.

    Args:
        bn: positions at a time.
        bc: channels of a program.
        bj: table rows of a program.
        warps: of a program.
        stages: of software pipelining.
    """

    bn: int
    bc: int
    bj: int
    warps: int
    stages: int


def table_tile(size: int, dtype: torch.dtype) -> TableTile:
    """Sizes for the gradients of the tables."""
    if dtype == torch.float32:
        bn, edge, stages = 16, 32, 2
    else:
        bn, edge, stages = 32, 64, 3
    bn = min(bn, max(16, power_of_two(size)))
    return TableTile(bn=bn, bc=edge, bj=edge, warps=4, stages=stages)


def most_registers(warps: int) -> int:
    """Registers that a thread may have at one program per multiprocessor.

    Said to the assembler, because left to itself it spills to let more programs run at a time.
    """
    return min(255, 65536 // (32 * warps))


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


def _geometry(n: int, regions: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(size, block_width, row_width, grid_width) of the regions, as the kernels count them."""
    size = n // regions
    if regions == 1 or height == 0:
        return size, size, size, 1
    side = check_grid(n, regions, (height, width))
    return size, width // side, width, side


def _forward(
    x: Tensor,
    m: Tensor,
    offset: Tensor,
    u: Tensor,
    bias: Tensor,
    eps: float,
    heads: int,
    height: int,
    width: int,
) -> Tensor:
    from retrodiff.attention import triton_kernel

    forward: Any = triton_kernel.forward_kernel
    x, m, offset, u = (t.contiguous() for t in (x, m, offset, u))
    b, n, c = x.shape
    live, r, j, _ = m.shape
    size, *geometry = _geometry(n, r, height, width)
    plan = launch(size=size, heads=heads, k=j // heads, dtype=m.dtype)
    out = torch.empty_like(x)
    scratch = m.new_empty((live, n, j)) if plan.groups > 1 else m
    with _device(x):
        forward[(-(-size // plan.bn), r, b)](
            x, m, offset, u, bias.contiguous(), out, scratch, n, size, live, *geometry, eps,
            C=c, K=j // heads, H=heads, KP=plan.kp, HG=plan.hg, GROUPS=plan.groups,
            BN=plan.bn, BC=plan.bc, BJ=plan.bj, PRECISION=plan.precision,
            STAGES=plan.stages, num_warps=plan.warps, num_stages=plan.stages,
            maxnreg=most_registers(plan.warps),
        )  # fmt: skip
    return out


def _forward_fake(x, m, offset, u, bias, eps, heads, height, width):
    del m, offset, u, bias, eps, heads, height, width
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(
    grad: Tensor,
    x: Tensor,
    m: Tensor,
    offset: Tensor,
    u: Tensor,
    eps: float,
    heads: int,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from retrodiff.attention import triton_kernel

    backward_rows: Any = triton_kernel.backward_rows_kernel
    backward_tables: Any = triton_kernel.backward_tables_kernel
    grad, x, m, offset, u = (t.contiguous() for t in (grad, x, m, offset, u))
    b, n, c = x.shape
    live, r, j, _ = m.shape
    size, *geometry = _geometry(n, r, height, width)
    k = j // heads
    plan = launch(size=size, heads=heads, k=k, dtype=m.dtype, backward=True)
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
            attention, grad_scores, mean_of, rstd_of, n, size, live, *geometry, eps,
            C=c, K=k, H=heads, KP=plan.kp, HG=plan.hg, GROUPS=plan.groups,
            BN=plan.bn, BC=plan.bc, BJ=plan.bj, PRECISION=plan.precision,
            STAGES=plan.stages, num_warps=plan.warps, num_stages=plan.stages,
            maxnreg=most_registers(plan.warps),
        )  # fmt: skip
        backward_tables[(-(-c // tile.bc), -(-j // tile.bj), live * r)](
            grad, x, attention, grad_scores, mean_of, rstd_of,
            grad_m, grad_offset, grad_u, grad_bias, n, size, r, *geometry,
            C=c, J=j, BN=tile.bn, BC=tile.bc, BJ=tile.bj, PRECISION=plan.precision,
            STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
            maxnreg=most_registers(tile.warps),
        )  # fmt: skip
    bias = grad_bias.sum((0, 1))
    if b > live:
        bias = bias + grad[live:].sum((0, 1), dtype=torch.float32)
    return grad_x, grad_m, grad_offset, grad_u, bias


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
_operator("neighbor_attention_backward", _backward, _backward_fake)
torch.library.register_autograd(
    _operator("neighbor_attention", _forward, _forward_fake),
    _gradients,
    setup_context=_setup,
    lib=_LIBRARY,
)


def _device(x: Tensor):
    """Triton launches on the current device: make that the one of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
