"""Compiles the Triton kernels without a GPU, and reports the resources that they need.

Registers that spill to memory (STACK or LOCAL above zero) or shared memory beyond what a
multiprocessor has are a kernel's commonest silent faults; both show in the binary. Used by the
tests and by the benchmark's ``--resources``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from retrodiff.attention.launches import Launch, launch, most_registers, table_tile

Kernel = Literal["forward", "backward_rows", "backward_tables"]

SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may have, by compute capability."""

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel needs.

    Args:
        registers: per thread.
        stack: bytes per thread; above zero: registers spill.
        local: bytes per thread; above zero: registers spill.
        shared: bytes per program.
        warps: of a program.
    """

    registers: int
    stack: int
    local: int
    shared: int
    warps: int


def compile_ahead(
    kernel: Kernel,
    *,
    c: int,
    heads: int,
    k: int,
    size: int,
    dtype: torch.dtype,
    capability: int = 90,
    x_dtype: torch.dtype | None = None,
    plan: Launch | None = None,
    precision: str = "ieee",
) -> Resources:
    """Compiles one kernel as it would be launched.

    Args:
        kernel: which of the three.
        c: channels.
        heads: h.
        k: neighbors.
        size: positions of a region.
        dtype: of the tables.
        capability: of the GPU, as in sm_90.
        x_dtype: of x; None: that of the tables.
        plan: sizes; None: those of a real launch.
        precision: of float32 products, ``ieee`` or ``tf32``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from retrodiff.attention import triton_kernel

    function = getattr(triton_kernel, f"{kernel}_kernel")
    if kernel == "backward_tables":
        tile = table_tile(size, dtype)
        constants = dict(C=c, J=heads * k, BN=tile.bn, BC=tile.bc, BJ=tile.bj)
        warps, stages = tile.warps, tile.stages
    else:
        plan = plan or launch(
            size=size, heads=heads, k=k, dtype=dtype, backward=kernel == "backward_rows"
        )
        constants = dict(C=c, K=k, H=heads, KP=plan.kp, HG=plan.hg, GROUPS=plan.groups)
        constants |= dict(BN=plan.bn, BC=plan.bc, BJ=plan.bj)
        warps, stages = plan.warps, plan.stages
    constants |= dict(PRECISION=precision, STAGES=stages)
    like_x = {"x", "out", "grad", "grad_x"}
    full = {"offset", "m_mean", "mean_of", "rstd_of", "grad_offset", "grad_bias"}
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "eps":
            signature[name] = "fp32"
        elif name in {"n", "size", "live", "regions", "block_width", "row_width", "grid_width"}:
            signature[name] = "i32"
        else:
            kind = torch.float32 if name in full else x_dtype or dtype if name in like_x else dtype
            signature[name] = "*" + _NAMES[kind]
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    options = {
        "num_warps": warps,
        "num_stages": stages,
        "maxnreg": most_registers(warps),
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(source, target=target, options=options)
    used = _usage(compiled.asm["cubin"])
    return Resources(
        registers=used["REG"],
        stack=used["STACK"],
        local=used["LOCAL"],
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
    )


def _usage(binary: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", told)}
