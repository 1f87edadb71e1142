"""Scores of a block of rows by products in float32 or in halves, and how far these may stray.

With halves, write x for a unit row, q for a unit query, x' and q' for what is multiplied in their
place, and s for the score that comes out. Products of two halves are exact in float32; they are
added in float32, in any order, and the sum is rounded once more to the half type, of unit roundoff
u. Then

    |s - q . x|  <=  |x - x'| |q|  +  |x'| |q - q'|  +  g |x'| |q'|  +  u |s|  +  t

by Cauchy and Schwarz for the first two terms. g = (d + 32) 2^-23 bounds any order of d additions in
float32, also with sums that are cut off where they should be rounded (Higham 2002, section 3.1, is
half of it). |q - q'| is measured in float64. What differs is the rest:

- ``stored``: the rows are multiplied as they are stored, x = x', in float16 or bfloat16. Sums of
  float16 below 2^-14 are rounded by up to t = 2^-25, which the row's norm makes larger; queries are
  therefore scaled by a power of two that takes the largest norm of the block to 2^14, and a block
  whose norms are too different is refused.
- ``bfloat16``: unit rows are rounded to bfloat16, |x - x'| <= u = 2^-8.

That a processor and a library do add in float32 is their promise; `keeps_its_bound` looks.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retrodiff.indexes.candidates import float_margin
from retrodiff.indexes.vectors import unit64

WAYS = ("float32", "bfloat16", "stored")
"""How a first pass multiplies."""
FEW = 4
"""Queries up to which rows are multiplied as they are stored: each of them reads the rows anew."""

_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_ROWS = 1024  # converted at a time, so that they stay in the cache
_SINGLE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
_HALF: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cpu"}
_LOOSE = 2.0**-6  # a bound above this is of no use


class FloatProducts:
    """Scores of rows against some queries by products of float32, within `float_margin`.

    Args:
        queries: (b, d) unit norm or zero, float64.
        block: rows scored at a time, at most.
    """

    def __init__(self, queries: Tensor, block: int):
        self.transposed = queries.float().T
        self.scores = torch.empty(block, len(queries), **_SINGLE)
        self._unit = torch.empty(min(block, _ROWS), queries.shape[1], **_SINGLE)

    def of(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Rows (n, d), and the scale (n,) that makes unit rows of them -> scores (n, b)."""
        scores, scale = self.scores[: len(rows)], scale.unsqueeze(1)
        d, b = self.transposed.shape
        if rows.dtype == torch.float32 and b <= d:
            return torch.mm(rows, self.transposed, out=scores).mul_(scale)
        for i in range(0, len(rows), _ROWS):
            some, factor, out = (x[i : i + _ROWS] for x in (rows, scale, scores))
            part = self._unit[: len(some)].copy_(some)
            if b > d:  # scale what is smaller
                torch.mm(part.mul_(factor), self.transposed, out=out)
            else:
                torch.mm(part, self.transposed, out=out).mul_(factor)
        return scores


class HalfProducts:
    """Scores of rows against some queries by products of halves, with a bound of their rounding.

    Args:
        way: ``bfloat16`` or ``stored``.
        queries: (b, d) unit norm or zero, float64.
        room: rows whose scores are held, at most.

    Attributes:
        scores: (room, b).
    """

    def __init__(self, way: str, queries: Tensor, room: int):
        self.way, self.queries = way, queries
        self._narrowed: dict[tuple[torch.dtype, float], tuple[Tensor, Tensor]] = {}
        d = queries.shape[1]
        self.scores = torch.empty(room, len(queries), **(_HALF if way == "bfloat16" else _SINGLE))
        if way == "bfloat16":
            self._unit = torch.empty(min(room, _ROWS), d, **_SINGLE)
            self._half = torch.empty(min(room, _ROWS), d, **_HALF)

    def of(self, rows: Tensor, scale: Tensor, at: int = 0) -> Tensor | None:
        """Writes scores, and says how far they stray from the cosine at most, (b,) float32.

        Args:
            rows: (n, d) values.
            scale: (n,) what makes unit rows of them.
            at: where their scores begin.

        Returns:
            None: this way cannot score these rows, or not well enough to be of use.
        """
        scores = self.scores[at : at + len(rows)]
        if self.way == "bfloat16":
            return self._rounded(rows, scale, scores)
        return self._stored(rows, scale, scores) if rows.dtype in _ROUNDOFF else None

    def _rounded(self, rows: Tensor, scale: Tensor, scores: Tensor) -> Tensor:
        u = _ROUNDOFF[torch.bfloat16]
        narrow, rounding = self._narrow(torch.bfloat16, 1.0)
        for i in range(0, len(rows), _ROWS):
            some, factor, out = (x[i : i + _ROWS] for x in (rows, scale, scores))
            unit = self._unit[: len(some)].copy_(some).mul_(factor.unsqueeze(1))
            torch.mm(self._half[: len(some)].copy_(unit), narrow.T, out=out)
        return self._slack(u + 2.0**-22, rounding, u, 0.0)

    def _stored(self, rows: Tensor, scale: Tensor, scores: Tensor) -> Tensor | None:
        u, tiny, power = _ROUNDOFF[rows.dtype], 0.0, 1.0
        if rows.dtype == torch.float16:
            least, most = (float(x) for x in scale.aminmax())
            if not 0 < least <= most < math.inf:
                return None
            power = 2.0 ** max(-30, min(14, math.floor(math.log2(2**14 * least))))
            tiny = 2.0**-25 * most / power
        narrow, rounding = self._narrow(rows.dtype, power)
        slack = self._slack(2.0**-22, rounding, u, tiny)
        if float(slack.max()) > _LOOSE:
            return None
        for j, query in enumerate(narrow):
            torch.mul(torch.mv(rows, query), scale, out=scores[:, j])
        if power != 1:
            scores.mul_(1 / power)
        return slack

    def _narrow(self, dtype: torch.dtype, power: float) -> tuple[Tensor, Tensor]:
        """Queries times a power of two, narrowed, and how far they lie from it, in units of it."""
        if (dtype, power) not in self._narrowed:
            wide = self.queries * power
            narrow = wide.to(dtype)
            rounding = torch.linalg.vector_norm(wide - narrow.double(), dim=1) / power
            self._narrowed[dtype, power] = narrow, rounding
        return self._narrowed[dtype, power]

    def _slack(self, row: float, query: Tensor, out: float, tiny: float) -> Tensor:
        """The bound of the module's first lines: of rows, queries (b,), the sum, and t."""
        before = row + (1 + row) * (query + float_margin(self.queries.shape[1]) * (1 + query))
        # Up to the next float32, so that it stays a bound.
        return ((before + out * (1 + before) + tiny) * (1 + 2.0**-20)).float()


def measured(rows: Tensor, scale: Tensor, queries: Tensor) -> dict[str, float]:
    """Seconds that each way takes for a row, fastest first; only ways that keep their bound.

    Args:
        rows: (n, d) a block of rows.
        scale: (n,) what makes unit rows of them.
        queries: (b, d) unit norm or zero, float64.
    """
    (n, d), b = rows.shape, len(queries)
    single = FloatProducts(queries, n)
    seconds = {"float32": _least_seconds(single.of, rows, scale) / n}
    for way in WAYS[1:]:
        if way == "stored" and (b > FEW or rows.dtype not in _ROUNDOFF):
            continue
        half = HalfProducts(way, queries, n)
        slack = half.of(rows, scale)
        if slack is None or not keeps_its_bound(way, rows.dtype, d, b):
            continue
        far = (half.scores.float() - single.of(rows, scale)).abs().amax(0)
        if not bool((far > slack + float_margin(d)).any()):
            seconds[way] = _least_seconds(half.of, rows, scale) / n
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def _least_seconds(call: Callable[[Tensor, Tensor], object], rows: Tensor, scale: Tensor) -> float:
    spent: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        call(rows, scale)
        spent.append(time.perf_counter() - began)
    return min(spent)


@functools.cache
def keeps_its_bound(way: str, dtype: torch.dtype, d: int, b: int) -> bool:
    """Whether products of halves stay within their bound on rows that show narrow sums.

    Looked at once per process for each type, width and number of queries. Rows and queries have no
    more digits than bfloat16, so that only the sum is rounded. They have a few large coordinates,
    and many so small that a sum kept in the half type loses them, in whichever order it is made.
    """
    sums = torch.bfloat16 if way == "bfloat16" else dtype
    if sums not in _ROUNDOFF:  # rows of float32, as they are stored
        return False
    u = _ROUNDOFF[sums]
    g = torch.Generator().manual_seed(d)
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    n = 512
    rows = u**0.5 * (0.3 + 0.65 * torch.rand(n, d, generator=g, **wide))
    often = torch.logspace(-3, -0.5, n, **wide).unsqueeze(1)
    large = torch.rand(n, d, generator=g, **wide) < often
    large[::7] = torch.arange(d, device="cpu") == 0
    rows[large] = 1
    queries = rows[torch.randint(n, (b,), generator=g, device="cpu")]
    signs = torch.randint(0, 2, (n // 4, d), generator=g, device="cpu") * 2 - 1
    rows[1::4] *= signs
    rows, queries = (unit64(x).bfloat16().double() for x in (rows, queries))
    half = HalfProducts(way, queries, n)
    if half.of(rows.to(dtype), torch.ones(n, **_SINGLE)) is None:
        return False
    exact = rows @ queries.T
    bound = 1.01 * float_margin(d) + u * exact.abs() + 2.0**-22
    return bool(((half.scores.double() - exact).abs() <= bound).all())
