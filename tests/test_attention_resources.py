"""The kernels' machine code for A100 and H100, made without either: no spills, memory in bounds."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from retrodiff.attention.ahead import SHARED_LIMIT, compile_ahead

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
pytestmark = [
    pytest.mark.skipif(not TOOL.exists(), reason="this triton has no cuobjdump"),
    pytest.mark.skipif(VERSION < (3, 3), reason="triton before 3.3 compiles ahead differently"),
]

KERNELS = ("forward", "backward_rows", "backward_tables")
PRESETS = ((1024, 384), (256, 576), (64, 960), (1024, 448), (256, 672), (64, 896), (2304, 448),
           (576, 896), (144, 1344), (36, 1792))  # fmt: skip


def check(kernel: Any, n: int, c: int, k: int, dtype: torch.dtype, capability: int, **more) -> None:
    needed = compile_ahead(
        kernel, c=c, heads=c // 32, k=k, size=n, dtype=dtype, capability=capability, **more
    )
    where = f"{kernel} n={n} c={c} k={k} {dtype} sm_{capability}: {needed}"
    assert needed.stack == 0, where
    assert needed.local == 0, where
    assert needed.shared <= SHARED_LIMIT[capability], where
    assert needed.registers * 32 * needed.warps <= 65536, where


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("n", "c", "k", "dtype"),
    [
        (1024, 384, 4, torch.bfloat16),
        (144, 1344, 4, torch.bfloat16),
        (256, 576, 20, torch.bfloat16),
        (256, 672, 10, torch.float16),
        (64, 960, 4, torch.float32),
    ],
)
def test_no_spills(
    kernel: str, n: int, c: int, k: int, dtype: torch.dtype, capability: int
) -> None:
    check(kernel, n, c, k, dtype, capability)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_spills_under_autocast(kernel: str) -> None:
    check(kernel, 1024, 384, 4, torch.bfloat16, 90, x_dtype=torch.float32)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_spills_where_tf32_is_allowed(kernel: str) -> None:
    check(kernel, 1024, 384, 4, torch.float32, 80, precision="tf32")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_spills_at_any_shape_of_the_presets(
    kernel: str, dtype: torch.dtype, capability: int
) -> None:
    for (n, c), k in itertools.product(PRESETS, (1, 2, 4, 5, 10, 20, 40)):
        check(kernel, n, c, k, dtype, capability)
