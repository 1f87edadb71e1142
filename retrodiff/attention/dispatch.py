"""Chooses the path of a neighbor cross-attention by its estimated cost.

The decision counts what each path computes and moves, per evaluation, with what is computed once
spread over the evaluations that share it, and takes the path of least time = max(operations / peak,
bytes / bandwidth) + launches. Peaks are rough per kind of device: only their ratios matter.
A backward pass costs every path about twice more, so it changes no comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from retrodiff.attention.fused import MAX_K
from retrodiff.attention.launches import launch

Path = Literal["one", "fused", "absorbed", "standard"]
"""``one``: a single neighbor, an addition. ``fused``: Triton on thin tables. ``absorbed``: PyTorch
on thin tables. ``standard``: PyTorch's attention on cached keys and values."""

STEPS = 50
"""Evaluations that share one preparation when sampling; in training it is one."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen path, and why.

    Args:
        path: the one taken.
        reason: why.
        estimates: seconds per evaluation that were compared; empty where nothing was to compare.

    Examples:
        >>> import torch
        >>> from retrodiff.attention import NeighborAttention
        >>> block = NeighborAttention(width=64, context_width=32, heads=2)
        >>> choice = block.explain(torch.randn(2, 256, 64), torch.randn(2, 4, 32))
        >>> choice.path in ("one", "fused", "absorbed", "standard")
        True
    """

    path: Path
    reason: str
    estimates: Mapping[Path, float] = field(default_factory=dict)

    def __str__(self) -> str:
        told = ", ".join(f"{path} {1e6 * t:.3g} µs" for path, t in self.estimates.items())
        return f"{self.path}: {self.reason}" + (f" (estimated: {told})" if told else "")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes that the cost of one block's attention depends on.

    Args:
        batch: b, rows that are not null.
        positions: n.
        width: c.
        context_width: d.
        heads: h.
        k: neighbors of a region.
        regions: r.
        dtype: computed in.
        device: ``cuda``, ``cpu``, ...
        evaluations: that share one preparation.
    """

    batch: int
    positions: int
    width: int
    context_width: int
    heads: int
    k: int
    regions: int = 1
    dtype: torch.dtype
    device: str
    evaluations: int = STEPS


@dataclass(frozen=True)
class Machine:
    """Operations and bytes per second, seconds per launch."""

    operations: float
    bandwidth: float
    launch: float


def machine(device: str, dtype: torch.dtype) -> Machine:
    """Roughly what a kind of device reaches."""
    if device != "cuda":
        return Machine(1e11, 1e10, 5e-6)
    return Machine(2e14 if dtype.itemsize == 2 else 2e13, 1.5e12, 4e-6)


def choose(problem: Problem, refused: str | None = None, gradients: bool = False) -> Choice:
    """The path for a problem.

    Args:
        problem: its size.
        refused: why the fused kernels cannot run; None if they can.
        gradients: whether gradients are wanted (the path ``one`` leaves norm and to_q without any).
    """
    if problem.k == 1 and not gradients:
        return Choice(path="one", reason="the softmax over a single neighbor is 1")
    times = estimates(problem)
    if refused is not None:
        times.pop("fused", None)
    path = min(times, key=times.__getitem__)
    reasons: dict[Path, str] = {
        "fused": "one kernel, x is read and written once",
        "absorbed": "thin tables save the projections",
        "standard": f"thin tables cost more at k={problem.k}, {problem.positions} positions, "
        f"heads {problem.width // problem.heads} wide, {problem.evaluations} evaluation(s)",
    }
    reason = reasons[path] if refused is None else f"{reasons[path]}; not fused: {refused}"
    return Choice(path=path, reason=reason, estimates=times)


def estimates(p: Problem) -> dict[Path, float]:
    """Seconds per evaluation of the paths that compute an attention."""
    rates = machine(p.device, p.dtype)
    size, j, c = p.dtype.itemsize, p.heads * p.k, p.width
    rows, sets = p.batch * p.positions, p.batch * p.regions

    def seconds(operations: float, moved: float, launches: int) -> float:
        return max(operations / rates.operations, size * moved / rates.bandwidth) + (
            launches * rates.launch
        )

    projected = 4 * sets * p.k * c * p.context_width
    keys = seconds(projected, 2 * c * p.context_width + 2 * sets * p.k * c, 2)
    # The tables' products are a head wide, which halves their speed; gain and shift look at c x c
    # weights again. Both by measurement (benchmarks/attention_dispatch.py).
    tables = seconds(
        projected + 2 * 4 * sets * p.k * c * c,
        2 * c * p.context_width + 5 * c * c + 6 * sets * j * c,
        8,
    )
    plan = launch(size=p.positions // p.regions or 1, heads=p.heads, k=p.k, dtype=p.dtype)
    once = {"fused": tables, "absorbed": tables, "standard": keys}
    every = {
        "fused": seconds(2 * rows * c * (plan.columns + j), 2 * rows * c + 2 * sets * j * c, 1),
        "absorbed": seconds(4 * rows * c * j, 6 * rows * c + 5 * rows * j + 2 * sets * j * c, 10),
        "standard": seconds(
            4 * rows * c * c + 4 * rows * p.k * c, 9 * rows * c + 2 * c * c + 2 * sets * p.k * c, 5
        ),
    }
    paths: tuple[Path, ...] = ("fused", "absorbed", "standard")
    return {
        path: every[path] + once[path] / p.evaluations
        for path in paths
        if path != "fused" or p.k <= MAX_K
    }
