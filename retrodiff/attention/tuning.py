"""Measures the launch sizes of the attention kernels on this machine, and keeps the fastest."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import astuple

import torch
from torch import Tensor

from retrodiff.attention import kernel_calls
from retrodiff.attention.fused import refusal_of
from retrodiff.attention.launches import Launch, Tile, launch, power_of_two
from retrodiff.attention.proving import judged_backward, judged_forward
from retrodiff.attention.tuned import Tuned, remember

Clock = Callable[[Callable[[], object]], float]
"""Seconds of one call."""

GAIN = 0.97
"""Another tile than that by rule has to take less than this share of its time."""


def tune_attention(
    *,
    width: int,
    heads: int,
    k: int,
    positions: int,
    batch: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
    backward: bool = False,
    clock: Clock | None = None,
    tiles: Iterator[Tile] | None = None,
) -> Tuned:
    """Finds the fastest launch sizes for one class of shapes, and keeps them for later processes.

    A minute or two, most of it compilation. A size counts only if its result agrees with the
    formula; what does not fit the device is passed over. Seeds are not touched.

    Args:
        width: c, channels of x.
        heads: h.
        k: neighbors.
        positions: n, of one region.
        batch: samples while measuring.
        dtype: of x and the tables.
        device: a GPU that the kernels run on.
        backward: the kernel of the gradient of x, in place of the forward one.
        clock: call -> seconds; None: the median of 20 launches, by the GPU's own clock.
        tiles: what is tried; None: the usual ones.

    Raises:
        ValueError: the kernels cannot run there.
        OSError: the cache folder cannot be written.
    """
    refused = refusal_of(torch.device(device), dtype, k)
    if refused is not None:
        raise ValueError(f"launch sizes cannot be measured here: {refused}")
    where = torch.empty(0, device=device).device  # with its index
    clock = clock or (lambda run: gpu_seconds(run, where))
    inputs, grad = _drawn(width, heads, k, positions, batch, dtype, where)
    x, m, offset, u, bias = inputs
    numbers = (1e-5, heads, 0, 0)

    def seconds(plan: Launch) -> float | None:
        """None where it does not run or is wrong."""
        if backward:
            run = lambda: kernel_calls.backward(grad, x, m, offset, u, *numbers, plan)  # noqa: E731
        else:
            run = lambda: kernel_calls.forward(*inputs, *numbers, plan)  # noqa: E731
        try:
            out = run()
            rest = (1e-5, heads, None, plan.precision)
            if isinstance(out, tuple):
                findings = judged_backward(out, grad, x, m, offset, u, *rest)
            else:
                findings = judged_forward(out, x, m, offset, u, bias, *rest)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # does not fit the device
            return None
        return clock(run) if all(finding.holds for finding in findings) else None

    usual = launch(size=positions, heads=heads, k=k, dtype=dtype, backward=backward)
    rule = Tile(bn=usual.bn, bc=usual.bc, warps=usual.warps, stages=usual.stages)
    by_rule = seconds(usual)
    best, least = rule, float("inf") if by_rule is None else GAIN * by_rule
    for tile in tiles or candidates():
        plan = launch(size=positions, heads=heads, k=k, dtype=dtype, backward=backward, tile=tile)
        if plan == usual or plan.bn != tile.bn:  # it is that one, or another one made smaller
            continue
        taken = seconds(plan)
        if taken is not None and taken < least:
            best, least = tile, taken
    if least == float("inf"):
        raise ValueError("no launch size gives the right result on this device")
    found = Tuned(
        kernel="backward" if backward else "forward",
        dtype=str(dtype).removeprefix("torch."),
        width=width,
        heads=heads,
        k=k,
        size=power_of_two(positions),
        tile=best,
        seconds=by_rule if best == rule and by_rule is not None else least,
        seconds_by_rule=least if by_rule is None else by_rule,
    )
    remember(where, [found])
    return found


def candidates() -> Iterator[Tile]:
    """The tiles that are tried."""
    for bn, bc, warps, stages in itertools.product((32, 64, 128), (32, 64), (4, 8), (2, 3, 4)):
        yield Tile(bn=bn, bc=bc, warps=warps, stages=stages)


def gpu_seconds(run: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median seconds of a call on a GPU, after one to warm up."""
    run()
    taken = []
    with torch.cuda.device(device):
        for _ in range(repeats):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            taken.append(first.elapsed_time(last) / 1e3)
    return statistics.median(taken)


def told(found: Tuned) -> str:
    """A line about what was found."""
    bn, bc, warps, stages = astuple(found.tile)
    return (
        f"{found.kernel} {found.dtype} width {found.width}, {found.heads} heads, k={found.k}, "
        f"up to {found.size} positions: {1e6 * found.seconds:.1f} µs with rows {bn}, channels "
        f"{bc}, warps {warps}, stages {stages} ({1e6 * found.seconds_by_rule:.1f} µs by rule)"
    )


def _drawn(
    width: int,
    heads: int,
    k: int,
    positions: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """x, m, offset, u, the bias, and a gradient; scores of about one."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(shape, generator=generator, device=device)

    x, grad = (normal(batch, positions, width).to(dtype) for _ in range(2))
    m = normal(batch, 1, heads * k, width, std=width**-0.5).to(dtype)
    u = normal(batch, 1, heads * k, width).to(dtype)
    return (x, m, normal(batch, 1, heads * k), u, normal(width).to(dtype)), grad
