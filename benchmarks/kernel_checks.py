"""The hand-written kernels against float64 on the device at hand: for benchmarks/gpu.py.

The tests marked gpu do the same with pytest; this needs torch and triton alone. Every kernel runs
unchecked here (`check_kernels(False)`): what is judged is the kernel and not what replaces it.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from retrodiff.attention import (
    KernelWarning,
    NeighborAttention,
    check_kernels,
    kernel_calls,
    proving,
    reference_attention,
)
from retrodiff.attention.fused import refusal_of
from retrodiff.indexes import tile_maxima as tiles
from retrodiff.interfaces import Tokens

SHAPES = (
    (1024, 384, 4),
    (256, 576, 4),
    (64, 960, 10),
    (100, 192, 20),
    (144, 1344, 4),
    (64, 384, 1),
)
"""Positions, width, neighbors."""


def units(device: str, small: bool) -> Iterator[tuple[str, Any]]:
    """Name and function of each check; a check returns its numbers and whether they hold."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    shapes, more = SHAPES, ((1, 0, False), (4, 1, True))
    if small:
        dtypes, shapes, more = dtypes[:2], ((16, 32, 4),), more[1:]
    for (n, c, k), dtype, (regions, nulls, masked) in itertools.product(shapes, dtypes, more):
        name = f"attention-{n}x{c}-k{k}-r{regions}-{str(dtype).removeprefix('torch.')}"
        yield name, partial(attention, device, n, c, k, dtype, regions, nulls, masked)
    yield "compiled-and-recorded", partial(compiled, device, small)
    yield "planted-fault", partial(planted, device, small)
    yield "first-call", partial(first_call, device, small)
    halves = (torch.float16,) if small else (torch.float16, torch.bfloat16)
    for dtype in (*halves, torch.int8):
        name = str(dtype).removeprefix("torch.")
        yield f"search-{name}", partial(search, device, dtype, 300 if small else 100_000, small)


def attention(
    device: str,
    n: int,
    c: int,
    k: int,
    dtype: torch.dtype,
    regions: int,
    nulls: int,
    masked: bool,
) -> dict[str, Any]:
    """Errors of output and gradients, as a multiple of those of the block in PyTorch."""
    torch.manual_seed(0)
    module = NeighborAttention(c, 512, c // 32).to(device, dtype)
    x = torch.randn(3, n, c, device=device, dtype=dtype, requires_grad=True)
    values = torch.randn(3, regions, k, 512, device=device, dtype=dtype)
    values[3 - nulls :] = 0
    mask = torch.rand(3, regions, k, device=device) > 0.3
    mask[..., 0] = True
    tokens = Tokens(values, mask if masked else None, nulls)
    wide = Tokens(values.double(), tokens.mask)
    exact = reference_attention(x.double(), wide, module.weights.to(torch.float64))
    inputs, grad = [x, *module.parameters()], torch.randn_like(x)
    right = (exact, *torch.autograd.grad(exact, inputs, grad.double()))
    path: Any = "fused" if refusal_of(x.device, dtype, k) is None else "absorbed"
    errors = {}
    with check_kernels(False):
        for name in ("standard", path):
            module.path = name
            out = module(x, tokens)
            found = (out, *torch.autograd.grad(out, inputs, grad))
            errors[name] = [
                ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
                for a, b in zip(found, right, strict=True)
            ]
    slack = torch.finfo(dtype).eps
    allowed = [2 * theirs + slack for theirs in errors["standard"]]
    worst = max(mine / most for mine, most in zip(errors[path], allowed, strict=True))
    return {"path": path, "error": errors[path][0], "of_allowed": worst, "holds": worst <= 1}


def _drawn(device: str, small: bool) -> tuple[NeighborAttention, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    n, c = (16, 32) if small else (1024, 384)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    module = NeighborAttention(c, 512, c // 32).to(device, dtype)
    x = torch.randn(4, n, c, device=device, dtype=dtype)
    return module, x, torch.randn(4, 4, 512, device=device, dtype=dtype)


@torch.no_grad()
def compiled(device: str, small: bool) -> dict[str, Any]:
    """Compiled without a break, replayed from a CUDA graph: the same numbers as a plain call."""
    module, x, values = _drawn(device, small)
    tables = module.prepare(Tokens(values, None, 2), 1024)
    proving.TRIALS.forget()
    options = {"backend": "aot_eager"} if device == "cpu" else {"mode": "reduce-overhead"}
    run = torch.compile(module, fullgraph=True, **options)
    outs = [run(x, tables).clone() for _ in range(3)]  # its first run is the check
    expected = module(x, tables)
    for out in outs:
        torch.testing.assert_close(out, expected)
    verdicts = proving.TRIALS.verdicts()
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x, tables)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(out, module(x, tables))
    return {"verdicts": verdicts, "holds": set(verdicts.values()) <= {"proven"}}


@torch.no_grad()
def planted(device: str, small: bool) -> dict[str, Any]:
    """A kernel that is off by one percent is caught, told about once, and replaced."""
    module, x, values = _drawn(device, small)
    tables = module.prepare(values, 1024)
    module.path = "absorbed"
    expected = module(x, tables)
    module.path = None
    if module.explain(x, tables).path != "fused":
        return {"left_out": "no kernels here"}
    usual = kernel_calls.forward
    proving.TRIALS.forget()
    with patch.object(kernel_calls, "forward", lambda *a: usual(*a) * 1.01):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            outs = [module(x, tables) for _ in range(3)]
    proving.TRIALS.forget()
    lines = [str(w.message) for w in told if issubclass(w.category, KernelWarning)]
    right = all(torch.equal(out, expected) for out in outs)
    return {"told": lines, "holds": len(lines) == 1 and right}


@torch.no_grad()
def first_call(device: str, small: bool) -> dict[str, Any]:
    """Milliseconds of a call with the check, and of the next one (compiled before)."""
    module, x, values = _drawn(device, small)
    tables = module.prepare(values, 1024)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    taken = []
    module(x, tables)  # compiles
    for _ in range(2):  # the second time with every PyTorch kernel loaded
        proving.TRIALS.forget()
        for _ in range(2):
            wait()
            began = time.perf_counter()
            module(x, tables)
            wait()
            taken.append(1e3 * (time.perf_counter() - began))
    return {"first_ms": taken[2], "first_of_the_process_ms": taken[0], "next_ms": taken[3]}


def search(device: str, dtype: torch.dtype, rows: int, small: bool) -> dict[str, Any]:
    """The search kernel's tile maxima against float64, by the check's own bound."""
    width = 64 if small else 512
    values = (torch.randn(rows, width, device=device) * 20).to(dtype)
    scale = torch.rand(rows, device=device)
    scale[::7] = -1
    queries = torch.randn(16 if small else 128, width, device=device)
    queries = queries.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    if not tiles._triton(values):
        return {"left_out": "no kernels here"}
    found = tiles.judged(tiles.launched(values, scale, queries), values, scale, queries)
    return {"error": found.error, "allowed": found.allowed, "holds": found.holds}
