"""Finds the true nearest neighbors: the default, and the oracle that other indexes answer to.

Rows stream through in blocks. A first pass scores them in the way that was measured to be fastest
here (`products.py`): by products of halves, whose rounding is bounded, or of float32. It looks only
at the maximum of each tile of scores. What a bound cannot rule out is scored in float32, and what
may then still be among the k best once more in float64. So the result is exact, independent of
block size and batch, and no matrix of queries x rows is ever in memory. Where float32 is the
fastest, many queries look at upper bounds from a few principal axes first (see `projection.py`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from retrodiff.indexes.axes import leading_axes
from retrodiff.indexes.candidates import Candidates, float_margin
from retrodiff.indexes.copies import STORAGE, Narrow
from retrodiff.indexes.products import WAYS, FloatProducts, HalfProducts, keeps_its_bound, measured
from retrodiff.indexes.projection import PAIR, Projection
from retrodiff.indexes.vectors import (
    ORDINARY,
    Vectors,
    in_parts,
    outstanding,
    row_norms,
    unit64,
    unit_rows,
)
from retrodiff.interfaces import Index
from retrodiff.precision import full_precision

if TYPE_CHECKING:
    from retrodiff.indexes.resident import ResidentIndex

_TILE = 64
_QUERIES = 1024  # searched at a time
_SCORES = 2**22  # held at a time, so that they stay in the cache
_SAMPLE = 4096  # rows that show where the axes lie
_PROJECTED = (256, 65_536)  # from so many queries and rows on, bounds are worth a try
_MEASURED = 32_768  # rows from which on the ways are measured; fewer are multiplied in float32
_FEW = 1024  # pairs, or rows of a block, that are not worth more than the plain way
_GATHERED = 5e-7  # seconds to gather a row, about
_TIMES: dict[tuple[torch.dtype, int, int, int], dict[str, float]] = {}
"""What was measured in this process, by type and width of the rows, queries, and threads."""


@dataclass(frozen=True)
class Exact:
    """Recipe of the exact index.

    Args:
        block: rows scored at a time, at most.
        storage: ``float16``, ``bfloat16`` or ``int8``: the first pass reads a copy of the rows in
            this form, held in memory or on the device; the result is exact all the same. None: no
            copy on a CPU, float16 on a GPU.
        device: where the first pass runs, such as ``cuda``; None: on the CPU.
        products: how a first pass on the CPU multiplies: ``float32``, ``bfloat16``, or ``stored``
            (half-precision rows as they are). None: in the way that is fastest here, measured once
            per process; `ExactIndex.explain` says which that is.

    Examples:
        >>> import torch
        >>> from retrodiff.indexes import Exact, Vectors
        >>> rows = torch.randn(500, 32)
        >>> similarity, found = Exact().build(Vectors([rows])).search(rows[:2], k=5)
        >>> found.shape, found[:, 0].tolist()
        (torch.Size([2, 5]), [0, 1])
    """

    block: int = 32_768
    storage: str | None = None
    device: str | None = None
    products: str | None = None
    name = "exact"

    def build(self, vectors: Vectors, progress: bool = False) -> ExactIndex | ResidentIndex:
        """The index over these vectors; nothing is copied unless storage or device is given.

        Raises:
            ValueError: the storage, the products or the device is not known.
        """
        for what, given, known in (
            ("storage", self.storage, (*STORAGE,)),
            ("products", self.products, WAYS),
        ):
            if given is not None and given not in known:
                raise ValueError(f"unknown {what} {given!r}; known: {', '.join(known)}")
        device = torch.device(self.device or "cpu")
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"exact search runs on cpu or cuda, not on {self.device!r}")
        if device.type != "cpu":
            from retrodiff.indexes.resident import ResidentIndex

            if self.products is not None:
                raise ValueError(
                    f"products={self.products!r} is for a first pass on the CPU, and "
                    f"device={self.device!r}: leave one of them out"
                )
            return ResidentIndex.on(vectors, self.storage or "float16", device, progress)
        copy = None
        if self.storage is not None:
            copy = Narrow.copy_of(vectors, self.storage, device, progress)
        return ExactIndex(vectors, self.block, copy, self.products)

    def load(self, folder: Path, vectors: Vectors) -> ExactIndex | ResidentIndex:
        """The same as `build`: there is nothing to load."""
        del folder
        return self.build(vectors)


class _Part(NamedTuple):
    """Rows that are multiplied at a time; ``scale`` (n,) makes unit rows of them.

    Only those of ``chosen`` (c,) may be found, None: all. They are numbered from ``start`` on.
    """

    start: int
    rows: Tensor
    scale: Tensor
    chosen: Tensor | None = None

    def keep(self, scores: Tensor) -> int:
        """Moves the scores of those that may be found to the front, and counts them."""
        if self.chosen is None:
            return len(self.rows)
        scores[: len(self.chosen)] = scores.index_select(0, self.chosen)
        return len(self.chosen)


class ExactIndex(Index):
    """Cosine against every stored row; ties go to the lowest row number."""

    def __init__(
        self,
        vectors: Vectors,
        block: int,
        copy: Narrow | None = None,
        products: str | None = None,
    ):
        self.vectors, self.block, self.copy, self.products = vectors, block, copy, products
        self._sampled: tuple[Tensor, Tensor] | None = None

    def save(self, folder: Path) -> None:
        """Writes nothing: the vectors are the index."""

    def search(
        self,
        queries: Tensor,  # (b, d)
        k: int,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries of any norm -> similarity (b, k) and indices (b, k), nearest first.

        Args:
            queries: (b, d).
            k: neighbors per query.
            hidden: sorted row numbers (h,) that must not be found.
        """
        return in_parts(self._search, self.vectors, queries, k, hidden, _QUERIES)

    @full_precision()
    def explain(self, queries: int = 1) -> str:
        """Says in which way the first pass multiplies for so many queries, and why."""
        m, d = len(self.vectors), self.vectors.dim
        b = min(queries, _QUERIES)
        asked = self.vectors.rows(torch.arange(b, device="cpu") % m) if m else torch.zeros(b, d)
        way, seconds = self._way(unit64(asked))
        if self.products is not None:
            reason = "as asked for"
        elif not seconds:
            reason = f"{m:,} rows are too few to measure others"
        else:
            figures = ", ".join(f"{name} {1e9 * s:.0f}" for name, s in seconds.items())
            reason = f"nanoseconds a row on {torch.get_num_threads()} threads: {figures}"
        return f"{queries} queries over {m:,} rows of width {d}: products in {way} ({reason})"

    def _search(self, queries: Tensor, k: int, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        exact = unit64(queries.cpu())
        margin, turned = float_margin(self.vectors.dim), exact
        if self.copy is not None:
            margin, turned = margin + self.copy.stray, self.copy.turned(exact)
        best = Candidates(exact, k, margin, self.vectors.rows)
        way, seconds = self._way(turned)
        few, small = _PROJECTED
        sampled = None
        if way == "float32" and len(queries) >= few and len(self.vectors) >= small:
            if hidden is None and (self.copy is None or self.copy.lossless):
                sampled = self._sample()
        block = self._block(len(queries))
        room = max(block, min(_SCORES // len(queries), len(self.vectors)))
        first_pass = _Pass(turned, best, block, room, hidden, way, sampled)
        for part in self._parts(block, seconds):
            first_pass.score(part)
        first_pass.flush()
        return best.result()

    def _block(self, b: int) -> int:
        return min(self.block, max(_TILE, _SCORES // b))

    def _way(self, queries: Tensor) -> tuple[str, dict[str, float]]:
        """How to multiply for these queries (b, d), and what was measured, if anything was."""
        m, b = len(self.vectors), len(queries)
        if self.products is None and m < _MEASURED:
            return "float32", {}
        part = next(self._parts(min(self._block(b), 8192), {}))
        way, seconds = self.products, {}
        if way is None:
            batch = 1 << (b - 1).bit_length()
            key = (part.rows.dtype, queries.shape[1], batch, torch.get_num_threads())
            if key not in _TIMES:
                if len(part.rows) < _FEW:  # a view's, of which few lie in a block
                    return "float32", {}
                _TIMES[key] = measured(part.rows, part.scale, queries)
            way, seconds = next(iter(_TIMES[key])), _TIMES[key]
        if way != "float32" and not keeps_its_bound(way, part.rows.dtype, queries.shape[1], b):
            way = "float32"
        return way, seconds

    def _parts(self, size: int, seconds: dict[str, float]) -> Iterator[_Part]:
        if self.copy is not None:
            for part in self.copy.blocks(size):
                yield _Part(*part)
            return
        # To gather a row costs as much as to multiply some.
        gather = 1 / (1 + _GATHERED / min(seconds.values(), default=_GATHERED))
        for start, rows, norms, chosen in self.vectors.searched(size, gather):
            least, most = (float(x) for x in norms.aminmax())
            if (ORDINARY[0] <= least and most <= ORDINARY[1]) or outstanding(norms) is None:
                yield _Part(start, rows, norms.reciprocal(), chosen)
            else:
                yield _Part(start, unit_rows(rows, norms), torch.ones_like(norms), chosen)

    def _sample(self) -> tuple[Tensor, Tensor]:
        """Some of the unit rows, and the leading half of their principal axes."""
        if self._sampled is None:
            last = len(self.vectors) - 1
            rows = torch.linspace(0, last, _SAMPLE, dtype=torch.float64, device="cpu").long()
            values = self.vectors.rows(rows.unique())
            sample = unit_rows(values, row_norms(values))
            self._sampled = sample, leading_axes(sample.T @ sample, self.vectors.dim // 2)
        return self._sampled


class _Pass:
    """Scores blocks of rows, and hands in what may be among the best."""

    def __init__(
        self,
        queries: Tensor,  # (b, d) unit norm, float64, turned as the rows are
        best: Candidates,
        block: int,
        room: int,
        hidden: Tensor | None,
        way: str,
        sampled: tuple[Tensor, Tensor] | None,
    ):
        self.best, self.hidden, self.sampled = best, hidden, sampled
        self.queries = best.queries.float()
        self.single = FloatProducts(queries, _whole_tiles(block))
        self.half = None if way == "float32" else HalfProducts(way, queries, _whole_tiles(room))
        self.room, self.pending, self.held, self.slack = room, list[_Part](), 0, torch.zeros(1)
        self.projection: Projection | None = None
        self.planned, self.pause, self.pauses = 0, 0, 1
        if sampled is not None and best.k <= len(sampled[0]):
            cosine = self.queries @ sampled[0].T
            best.raise_least(cosine.topk(best.k, dim=1).values[:, -1] - best.margin)

    def score(self, part: _Part) -> None:
        """Scores some rows: by a bound first, and in float32 where it leaves too much."""
        if self.half is not None:
            self._halves(part, self.half)
        elif not self._projected(part):
            self._singles(part)

    def flush(self) -> None:
        """Looks at what scores of halves are held."""
        if self.half is None or not self.pending:
            return
        parts, slack = self.pending, self.slack
        start, n = parts[0].start, self.held
        self.pending, self.held, self.slack = [], 0, torch.zeros_like(slack)
        tiles = self._tiles(self.half.scores, start, n)
        if not self._ruled_out(start, n, tiles, self._maxima(tiles, slack), slack):
            for part in parts:
                self._singles(part)

    def _halves(self, part: _Part, half: HalfProducts) -> None:
        """Scores of halves are held until there is room for no more, and then looked at."""
        if self.held + len(part.rows) > self.room:
            self.flush()
        slack = None
        if self.pause:
            self.pause -= 1
        else:
            slack = half.of(part.rows, part.scale, self.held)
        if slack is None:
            self.flush()  # rows come in rising order
            self._singles(part)
            return
        self.pending.append(part)
        self.held += part.keep(half.scores[self.held : self.held + len(part.rows)])
        self.slack = torch.maximum(self.slack, slack)

    def _singles(self, part: _Part) -> None:
        n, best = part.keep(self.single.of(part.rows, part.scale)), self.best
        tiles = self._tiles(self.single.scores, part.start, n)
        maxima = self._maxima(tiles, 0)
        tile, query = (maxima >= best.floor).nonzero(as_tuple=True)
        row, query, score = self._among(tiles, tile, query, best.floor)
        best.add(query, part.start + row, score)

    def _projected(self, part: _Part) -> bool:
        """Rules out rows by bounds from principal axes; False where that is not done."""
        if self.sampled is None:
            return False
        if part.start >= self.planned:
            self._plan(*self.sampled)
            self.planned = 2 * (part.start + len(part.rows))  # what is seen rules out more
        if self.projection is None:
            return False
        if self.pause:
            self.pause -= 1
            return False
        unit = self.unit[: len(part.rows)].copy_(part.rows).mul_(part.scale.unsqueeze(1))
        scores = self.single.scores
        torch.mm(self.projection.coordinates(unit), self.bounding, out=scores[: len(unit)])
        n = part.keep(scores[: len(unit)])
        tiles = self._tiles(scores, part.start, n)
        slack = torch.tensor(self.projection.slack, device="cpu")
        return self._ruled_out(part.start, n, tiles, _highest(tiles), slack)

    def _ruled_out(self, start: int, n: int, tiles: Tensor, maxima: Tensor, slack: Tensor) -> bool:
        """Hands in what bounds leave; False, and nothing is done, where they leave too much.

        Args:
            start: number of the first row.
            n: rows, in succession.
            tiles: their scores.
            maxima: of the tiles.
            slack: how far scores lie below the cosine, at most.
        """
        best, pairs = self.best, n * len(self.queries)
        least = best.floor - slack
        tile, query = (maxima >= least).nonzero(as_tuple=True)
        if 8 * _TILE * len(tile) <= pairs:
            row, query, _ = self._among(tiles, tile, query, least)
        else:
            held = tiles.flatten(0, 1)
            row, query = ((held >= least) & (held > -torch.inf)).nonzero(as_tuple=True)
        if 2 * PAIR * len(row) > pairs:  # full products for a while, longer each time
            self.pauses = min(2 * self.pauses, 32)
            self.pause = self.pauses
            return False
        self.pauses = 1
        order = query.argsort(stable=True)
        number, query = start + row[order], query[order]
        some, at = number.unique(return_inverse=True)
        values = best.stored(some)
        score = pair_products(unit_rows(values, row_norms(values)), at, self.queries, query)
        keep = score >= best.floor[query]
        best.add(query[keep], number[keep], score[keep])
        return True

    def _plan(self, sample: Tensor, axes: Tensor) -> None:
        """Takes the projection that promises the least work by now, if any does."""
        some = slice(None, None, -(-len(self.queries) // 128))
        self.projection = Projection.best(
            axes, sample, self.queries[some], self.best.least[some], len(self.queries)
        )
        if self.projection is not None:
            self.unit = torch.empty(len(self.single.scores), len(axes), device="cpu")
            self.bounding = self.projection.coordinates(self.queries).T

    def _tiles(self, scores: Tensor, start: int, n: int) -> Tensor:
        """The scores of n rows as (tiles, tile, b), -inf where there is no row to be found."""
        wide = _whole_tiles(n)
        scores[n:wide] = -torch.inf
        if self.hidden is not None:
            inside = self.hidden[(self.hidden >= start) & (self.hidden < start + n)]
            scores[inside - start] = -torch.inf
        return scores[:wide].view(-1, _TILE, len(self.queries))

    def _maxima(self, tiles: Tensor, slack: Tensor | float) -> Tensor:
        """The maximum of each tile (tiles, b); the first ones say what the k best reach."""
        maxima, best = _highest(tiles), self.best
        if len(maxima) >= best.k and not bool(best.least.isfinite().all()):
            # k tiles reach this value, so k rows do.
            reached = maxima.topk(best.k, dim=0).values[-1].float()
            best.raise_least(reached - slack - best.margin)
        return maxima

    @staticmethod
    def _among(
        tiles: Tensor, tile: Tensor, query: Tensor, floor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the block, queries and scores of what reaches the floor in chosen tiles."""
        chosen = tiles[tile, :, query]
        i, j = ((chosen >= floor[query, None]) & (chosen > -torch.inf)).nonzero(as_tuple=True)
        return tile[i] * _TILE + j, query[i], chosen[i, j]


def _highest(tiles: Tensor) -> Tensor:
    """The maximum of each tile (tiles, tile, b) by halves; amax is slow beyond the cache."""
    while tiles.shape[1] > 1:
        half = tiles.shape[1] // 2
        tiles = torch.maximum(tiles[:, :half], tiles[:, half:])
    return tiles[:, 0]


def _whole_tiles(rows: int) -> int:
    return rows + -rows % _TILE


def pair_products(
    rows: Tensor,  # (m, d)
    row: Tensor,  # (n,)
    queries: Tensor,  # (b, d)
    query: Tensor,  # (n,) rising
) -> Tensor:
    """The products of chosen pairs (n,), float32."""
    if len(row) > _FEW and _samples_products():
        starts = torch.zeros(len(queries) + 1, dtype=torch.int64, device=query.device)
        starts[1:] = torch.bincount(query, minlength=len(queries)).cumsum(0)
        return _sampled(starts, row, queries, rows)
    out = rows.new_empty(len(row))
    for at in torch.arange(len(row), device=row.device).split(1024):
        out[at] = (rows[row[at]] * queries[query[at]]).sum(1)
    return out


def _sampled(starts: Tensor, column: Tensor, left: Tensor, right: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        size = (len(left), len(right))
        pairs = torch.sparse_csr_tensor(
            starts, column, left.new_zeros(len(column)), size, check_invariants=False
        )
    return torch.sparse.sampled_addmm(pairs, left, right.T, beta=0.0).values()


@functools.cache
def _samples_products() -> bool:
    """Whether this build of torch has sampled products; without, pairs cost several times more."""
    try:
        kind = {"dtype": torch.float32, "device": "cpu"}
        starts, column = torch.tensor([0, 1, 1], device="cpu"), torch.tensor([1], device="cpu")
        found = _sampled(starts, column, torch.eye(2, **kind), torch.ones(2, 2, **kind))
    except RuntimeError:
        return False
    return found.tolist() == [1.0]
