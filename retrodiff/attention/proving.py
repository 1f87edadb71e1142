"""The attention kernels, each class of shapes held against the absorbed path at its first call.

The formula is computed in float64 from the caller's own tensors, and the absorbed path in the types
that the kernel had: the kernel's error may be twice that of the absorbed path (four times for
gradients, which are sums with more cancellation) and some roundings of the result, over the whole
and in the worst row. Of large batches some samples are compared, the last one always.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from retrodiff.attention import kernel_calls
from retrodiff.attention.absorbed import AttentionTables, absorbed_attention
from retrodiff.attention.absorbed_gradients import absorbed_gradients
from retrodiff.attention.launches import Launch, TableTile, table_tile
from retrodiff.attention.tuned import tuned_launch
from retrodiff.kernel_trials import Finding, Trials
from retrodiff.precision import no_autocast

COMPARED = 1 << 22
"""Numbers of x that a check looks at, at most (a whole sample at least)."""

TOLERANCE = {"ieee": 1e-5, "interpreted": 1e-5, "tf32": 1e-3}
"""Error beyond that of the absorbed path, as a share of the result, of float32 products."""

NARROW = {torch.float16: 5e-4, torch.bfloat16: 2e-3}
"""The same where the tables or x are narrower: about half a rounding."""

TRIALS = Trials(
    "the fused attention kernel",
    "The absorbed path (the same result, slower)",
    "Another version of triton or torch may mend it",
)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
PARTS = ("the gradient of x", "that of m", "that of the offset", "that of u", "that of the bias")


class KernelClass(NamedTuple):
    """What decides which code is compiled, and which of its branches run.

    Args:
        kernel: ``forward`` or ``backward``.
        device: where.
        dtypes: of x, the tables, the offset and the bias.
        width: c.
        heads: h.
        k: neighbors.
        sizes: of the launch, or launches.
        kinds: of the whole numbers handed over, of which Triton treats 1 and multiples of 16 apart.
        aligned: whether every tensor begins at a multiple of 16 bytes, likewise.
        nulls: whether there are null rows.
    """

    kernel: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    width: int
    heads: int
    k: int
    sizes: tuple[Launch | TableTile, ...]
    kinds: tuple[int, ...]
    aligned: bool
    nulls: bool

    def __str__(self) -> str:
        place = str(self.device)
        if self.device.type == "cuda":
            place = torch.cuda.get_device_name(self.device)
        x, tables = (str(dtype).removeprefix("torch.") for dtype in self.dtypes[:2])
        types = x if x == tables else f"{x} with tables in {tables}"
        return (
            f"{self.kernel} on {place} in {types}, width {self.width}, {self.heads} heads, "
            f"k={self.k}"
        )


def proven_forward(
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
    """The operator: the kernel where it is right, else the absorbed path."""
    x, m, offset, u, bias = (t.contiguous() for t in (x, m, offset, u, bias))
    c, size, k = x.shape[2], x.shape[1] // m.shape[1], m.shape[2] // heads
    plan = tuned_launch(x.device, size=size, width=c, heads=heads, k=k, dtype=m.dtype)
    shape = (height, width) if height else None
    numbers = (eps, heads, height, width)

    def plain() -> Tensor:
        with no_autocast(x.device):
            tables = _tables(m, offset, u, heads, len(x))
            return absorbed_attention(x, tables, bias, eps, shape).contiguous()

    return TRIALS.run(
        _class("forward", (plan,), heads, height, width, x, m, offset, u, bias),
        x.device,
        lambda: kernel_calls.forward(x, m, offset, u, bias, *numbers, plan),
        plain,
        lambda out: judged_forward(out, x, m, offset, u, bias, eps, heads, shape, plan.precision),
    )


def proven_backward(
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
    """The operator of the gradients: the kernels where they are right, else the formula."""
    grad, x, m, offset, u = (t.contiguous() for t in (grad, x, m, offset, u))
    c, size, k = x.shape[2], x.shape[1] // m.shape[1], m.shape[2] // heads
    plan = tuned_launch(
        x.device, size=size, width=c, heads=heads, k=k, dtype=m.dtype, backward=True
    )
    shape = (height, width) if height else None
    numbers = (eps, heads, height, width)

    def plain() -> Gradients:
        with no_autocast(x.device):
            tables = _tables(m, offset, u, heads, len(x))
            *grads, bias = absorbed_gradients(grad, x, tables, eps, shape)
            grad_x, grad_m, grad_offset, grad_u = (t.contiguous() for t in grads)
            return grad_x, grad_m, grad_offset, grad_u, bias.float()

    sizes = (plan, table_tile(size, m.dtype))
    return TRIALS.run(
        _class("backward", sizes, heads, height, width, x, m, offset, u, grad),
        x.device,
        lambda: kernel_calls.backward(grad, x, m, offset, u, *numbers, plan),
        plain,
        lambda out: judged_backward(out, grad, x, m, offset, u, eps, heads, shape, plan.precision),
    )


def why_not(x: Tensor, tables: AttentionTables) -> str | None:
    """What a check found against the forward kernel for tensors like these; None: nothing."""
    wanted = (x.device, x.dtype, tables.m.dtype, x.shape[-1], tables.heads, tables.k)

    def matches(key: Hashable) -> bool:
        return isinstance(key, KernelClass) and key.kernel == "forward" and wanted == (
            key.device, *key.dtypes[:2], key.width, key.heads, key.k
        )  # fmt: skip

    return TRIALS.refusal(matches)


# --- comparing ----------------------------------------------------------------------------------


def judged_forward(
    found: Tensor,
    x: Tensor,
    m: Tensor,
    offset: Tensor,
    u: Tensor,
    bias: Tensor,
    eps: float,
    heads: int,
    shape: tuple[int, int] | None,
    precision: str,
) -> list[Finding]:
    """How far an output (b, n, c) is from the formula."""
    few, live = _samples(x, len(m))
    found, x, m, offset, u = found[few], x[few], m[live], offset[live], u[live]
    with no_autocast(x.device):
        own = absorbed_attention(x, _tables(m, offset, u, heads, len(x)), bias, eps, shape)
        wide = _tables(m.double(), offset.double(), u.double(), heads, len(x))
        exact = absorbed_attention(x.double(), wide, bias.double(), eps, shape)
        nothing = x.double() + bias.double()
    tolerance = _tolerance(precision, x, m)
    return [_compared("the output", found, own, exact, nothing, tolerance, 2)]


def judged_backward(
    found: Gradients,
    grad: Tensor,
    x: Tensor,
    m: Tensor,
    offset: Tensor,
    u: Tensor,
    eps: float,
    heads: int,
    shape: tuple[int, int] | None,
    precision: str,
) -> list[Finding]:
    """How far gradients are from those of the formula."""
    few, live = _samples(x, len(m))
    whole = [grad.sum((0, 1), dtype=dtype) for dtype in (torch.float32, torch.float64)]
    *parts, bias = found
    grad, x, m, offset, u = grad[few], x[few], m[live], offset[live], u[live]
    with no_autocast(x.device):
        own = absorbed_gradients(grad, x, _tables(m, offset, u, heads, len(x)), eps, shape)
        wide = _tables(m.double(), offset.double(), u.double(), heads, len(x))
        exact = absorbed_gradients(grad.double(), x.double(), wide, eps, shape)
    tolerance = 4 * _tolerance(precision, x, m)
    # Equal neighbors have no gradient but what rounding leaves of the terms.
    terms = 1e-6 * grad.double().norm() * u.double().norm(dim=-1).amax()
    least = (0, terms, terms / m.shape[-1] ** 0.5, 0)
    rows = (few, live, live, live)
    nothing = (grad.double(), *(torch.zeros_like(part) for part in exact[1:4]))
    findings = [
        _compared(name, part[which], mine, right, none, tolerance, 4, zero)
        for name, part, which, mine, right, none, zero in zip(
            PARTS, parts, rows, own, exact, nothing, least, strict=False
        )
    ]
    of_bias = _compared(PARTS[4], bias, whole[0], whole[1], 0 * whole[1], tolerance, 4)
    # One neighbor's weight is 1 whatever its score is: most gradients are zero, rightly.
    shown = (3,) if m.shape[2] == heads else (0, 1, 3)
    conclusive = all(findings[i].conclusive for i in shown)
    return [
        Finding(part=f.part, error=f.error, allowed=f.allowed, conclusive=conclusive)
        for f in (*findings, of_bias)
    ]


def _compared(
    part: str,
    found: Tensor,
    own: Tensor,
    exact: Tensor,
    nothing: Tensor,
    tolerance: float,
    factor: float,
    zero: float | Tensor = 0,
) -> Finding:
    """A result against the exact one.

    Args:
        part: its name.
        found: what the kernel gave.
        own: what the absorbed path gives in the same types.
        exact: in float64.
        nothing: what a kernel would give that does nothing.
        tolerance: allowed beyond ``factor`` times the error of ``own``, as a share of the result.
        factor: see there.
        zero: error that is allowed in any case, where all of the result may cancel.
    """
    found, own = found.double(), own.double()
    seen = own.isfinite() & exact.isfinite()
    finite = bool((found.isfinite() | ~seen).all())
    wrong, usual, right, effect = (
        torch.where(seen, numbers, 0).reshape(-1, numbers.shape[-1]).norm(dim=1)
        for numbers in (found - exact, own - exact, exact, exact - nothing)
    )
    size = right.norm().clamp_min(zero / tolerance).clamp_min(1e-300)
    allowed = factor * usual.norm() / size + tolerance
    # Any row may be off by more than the mean row, and one that is nearly zero by what others are.
    rows = (wrong / (4 * (usual + allowed * (right + size / len(right) ** 0.5)))).nan_to_num().max()
    error, most, worst, share = torch.stack(
        [wrong.norm() / size, allowed, rows, effect.norm() / size]
    ).tolist()
    if not finite:
        return Finding(part=f"{part} (not finite)", error=float("inf"), allowed=most)
    if worst > 1 and error <= most:
        part, error = f"a row of {part}", most * worst
    return Finding(part=part, error=error, allowed=most, conclusive=share > 2 * most)


def _tolerance(precision: str, *tensors: Tensor) -> float:
    return max([TOLERANCE[precision]] + [NARROW.get(t.dtype, 0.0) for t in tensors])


def _samples(x: Tensor, live: int) -> tuple[Tensor, Tensor]:
    """Rows of the batch to compare, the last live one and the last null one among them."""
    most = max(1, COMPARED // (x.shape[1] * x.shape[2]))
    some = torch.linspace(live - 1, 0, min(live, most), device=x.device).round().long()
    null = torch.arange(len(x) - 1, len(x), device=x.device)[: len(x) - live]
    return torch.cat([some, null]), some


def _tables(m: Tensor, offset: Tensor, u: Tensor, heads: int, b: int) -> AttentionTables:
    return AttentionTables(m=m, offset=offset, u=u, hidden=None, heads=heads, null_rows=b - len(m))


# --- classes ------------------------------------------------------------------------------------


def _class(
    kernel: str,
    sizes: tuple[Launch | TableTile, ...],
    heads: int,
    height: int,
    width: int,
    x: Tensor,
    *others: Tensor,
) -> KernelClass:
    m = others[0]
    b, n, c = x.shape
    live, r, j, _ = m.shape
    numbers = (n, live, r, *kernel_calls.geometry(n, r, height, width))
    return KernelClass(
        kernel=kernel,
        device=x.device,
        dtypes=(x.dtype, *(t.dtype for t in (m, others[1], others[3]))),
        width=c,
        heads=heads,
        k=j // heads,
        sizes=sizes,
        kinds=tuple(1 if i == 1 else 16 * (i % 16 == 0) for i in numbers),
        aligned=all(t.data_ptr() % 16 == 0 for t in (x, *others)),
        nulls=b > live,
    )
