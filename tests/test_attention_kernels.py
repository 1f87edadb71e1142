"""The Triton kernels: in the interpreter everywhere, on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from retrodiff.attention import NeighborAttention, reference_attention
from retrodiff.interfaces import Tokens

CHECKS = Path(__file__).with_name("attention_kernel_checks.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_in_the_interpreter() -> None:
    """The checks of attention_kernel_checks.py, where triton is imported as an interpreter."""
    options = ["--noconftest", "-q", "-x", "-rs", "--tb=short"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(CHECKS)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        cwd=CHECKS.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TRITON_INTERPRET" not in done.stdout, done.stdout  # the reason to skip them all


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "c", "k"), [(1024, 384, 4), (256, 576, 4), (64, 960, 10), (100, 192, 20)]
)
def test_on_the_gpu(n: int, c: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    fused = NeighborAttention(c, 512, c // 32, path="fused").to("cuda", dtype)
    x = torch.randn(2, n, c, device="cuda", dtype=dtype, requires_grad=True)
    values = torch.randn(2, k, 512, device="cuda", dtype=dtype)
    exact = reference_attention(x.double(), values.double(), fused.weights.to(torch.float64))
    grad = torch.randn_like(x)
    inputs = [x, *fused.parameters()]
    right = torch.autograd.grad(exact, inputs, grad.double())
    errors = []
    for path in ("standard", "fused"):
        fused.path = path
        out = fused(x, values)
        found = torch.autograd.grad(out, inputs, grad)
        errors.append(
            [(a - b).norm().item() for a, b in zip((out, *found), (exact, *right), strict=True)]
        )
    for theirs, ours, size in zip(*errors, (exact, *right), strict=True):
        assert ours <= 2 * theirs + torch.finfo(dtype).eps * size.norm().item()


@pytest.mark.gpu
@needs_gpu
def test_in_a_cuda_graph_and_compiled() -> None:
    fused = NeighborAttention(384, 512, 12, path="fused").to("cuda", torch.bfloat16)
    x = torch.randn(4, 1024, 384, device="cuda", dtype=torch.bfloat16)
    values = torch.randn(4, 4, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        tables = fused.prepare(Tokens(values, None, 2), 1024)
        expected = fused(x, tables)
        compiled = torch.compile(fused, mode="reduce-overhead", fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(compiled(x, tables), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused(x, tables)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(out, fused(x, tables))
