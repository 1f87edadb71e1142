"""The stored embeddings as an index sees them: rows in parts that may lie on disk.

Nothing here copies a part; whoever needs numbers asks for a block or for some rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrodiff.numbers import whole
from retrodiff.precision import full_precision

ORDINARY = (1e-15, 1e15)
"""Norms whose squares float32 holds well; rows of others are divided in float64."""


class Block(NamedTuple):
    """Rows that are searched at a time.

    Args:
        start: number of the first row that is searched.
        rows: (n, d) stored values.
        norms: (n,) of theirs.
        chosen: (c,) which of them are searched, rising; None: all. These are numbered from
            ``start`` on.
    """

    start: int
    rows: Tensor
    norms: Tensor
    chosen: Tensor | None = None


class Vectors:
    """Rows of embeddings (m, d) in parts, with their norms.

    Args:
        parts: tensors (n, d) of any float type, memory-mapped or not, in the order of their rows.
        norms: for each part the norms (n,) of the stored values; computed where not given.

    Raises:
        ValueError: there is no part.

    Examples:
        >>> import torch
        >>> from retrodiff.indexes import Vectors
        >>> vectors = Vectors([torch.randn(300, 32).half(), torch.randn(200, 32).half()])
        >>> len(vectors), vectors.rows(torch.tensor([0, 499])).shape
        (500, torch.Size([2, 32]))
    """

    def __init__(self, parts: Sequence[Tensor], norms: Sequence[Tensor] | None = None):
        self.parts = list(parts)
        if not self.parts:
            raise ValueError("no vectors: give at least one part, (0, d) if there is no row")
        self.norms = list(norms) if norms is not None else [row_norms(part) for part in parts]
        self.dim = self.parts[0].shape[1]
        sizes = torch.tensor([0, *(len(part) for part in self.parts)], device="cpu")
        self._starts = sizes.cumsum(0)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row, stored values (n, d) and norms (n,), at most ``size`` rows at a time."""
        start = 0
        for part, norms in zip(self.parts, self.norms, strict=True):
            for i in range(0, len(part), size):
                yield start + i, part[i : i + size], norms[i : i + size]
            start += len(part)

    def searched(self, size: int, gather: float) -> Iterator[Block]:
        """All rows as a search reads them, at most ``size`` at a time.

        Args:
            size: rows of a block.
            gather: of a view: blocks of which it has a smaller share are copied together.
        """
        del gather
        for start, rows, norms in self.blocks(size):
            yield Block(start, rows, norms)

    def among(self, chosen: Tensor, size: int, gather: float) -> Iterator[Block]:
        """Some of the rows, rising (n,), numbered anew: as `searched`."""
        ends = torch.searchsorted(chosen, self._starts).tolist()
        touched = [i for i in range(len(self.parts)) if ends[i + 1] > ends[i]]
        self.ready(touched)
        for i in touched:
            part, norms = self.parts[i], self.norms[i]
            local = chosen[ends[i] : ends[i + 1]] - self._starts[i]
            borders = torch.tensor([*range(0, len(part), size), len(part)], device="cpu")
            places = torch.searchsorted(local, borders).tolist()
            for at in range(len(places) - 1):
                inside, first = local[places[at] : places[at + 1]], ends[i] + places[at]
                if not len(inside):
                    continue
                low, high = int(inside[0]), int(inside[-1]) + 1
                if len(inside) == high - low:
                    yield Block(first, part[low:high], norms[low:high])
                elif len(inside) < gather * (high - low):
                    yield Block(first, part[inside], norms[inside])
                else:
                    yield Block(first, part[low:high], norms[low:high], inside - low)

    def ready(self, parts: Sequence[int]) -> None:
        """Called before these parts are read."""

    def rows(self, indices: Tensor) -> Tensor:
        """Row numbers (n,) -> stored values (n, d) in float32."""
        if len(self.parts) == 1:
            return self.parts[0][indices].float()
        out = torch.empty(len(indices), self.dim, dtype=torch.float32, device="cpu")
        order = indices.argsort()
        counts = torch.bincount(
            torch.searchsorted(self._starts, indices, right=True) - 1, minlength=len(self.parts)
        )
        at = 0
        for i in counts.nonzero().flatten().tolist():
            chosen = order[at : at + int(counts[i])]
            out[chosen] = self.parts[i][indices[chosen] - self._starts[i]].float()
            at += len(chosen)
        return out

    def select(self, rows: Tensor) -> VectorsView:
        """Some of the rows (n,), numbered anew in the given order; copies nothing."""
        return VectorsView(self, rows)


class VectorsView(Vectors):
    """Chosen rows of other vectors; gathered block by block, or picked out of whole blocks."""

    def __init__(self, vectors: Vectors, chosen: Tensor):
        self.vectors, self.chosen, self.dim = vectors, chosen, vectors.dim
        self.rising = bool((chosen.diff() > 0).all())

    def __len__(self) -> int:
        return len(self.chosen)

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row, stored values (n, d) and norms (n,), at most ``size`` rows at a time."""
        for i in range(0, len(self.chosen), size):
            block = self.rows(torch.arange(i, min(i + size, len(self.chosen)), device="cpu"))
            yield i, block, row_norms(block)

    def searched(self, size: int, gather: float) -> Iterator[Block]:
        """All rows as a search reads them: where they rise, they keep their type."""
        if self.rising:
            return self.vectors.among(self.chosen, size, gather)
        return super().searched(size, gather)

    def rows(self, indices: Tensor) -> Tensor:
        """Row numbers (n,) of the view -> stored values (n, d) in float32."""
        return self.vectors.rows(self.chosen[indices])

    def select(self, rows: Tensor) -> VectorsView:
        """Some of the rows (n,), numbered anew in the given order; copies nothing."""
        return VectorsView(self.vectors, self.chosen[rows])


class GatheredVectors(Vectors):
    """Rows that lie elsewhere: a subclass knows `rows` and a length, blocks are gathered so."""

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row, stored values (n, d) and norms (n,), at most ``size`` rows at a time."""
        for start in range(0, len(self), size):
            block = self.rows(torch.arange(start, min(start + size, len(self))))
            yield start, block, row_norms(block)

    def among(self, chosen: Tensor, size: int, gather: float) -> Iterator[Block]:
        """Some of the rows (n,), numbered anew, gathered."""
        del gather
        for start in range(0, len(chosen), size):
            block = self.rows(chosen[start : start + size])
            yield Block(start, block, row_norms(block))


def row_norms(rows: Tensor, block: int = 512) -> Tensor:
    """Euclidean norms (n,) of rows (n, d) in float32, without a copy of them all.

    Those that float32 would round to zero or to infinity on the way are computed in float64.
    """
    held = {"dtype": torch.float32, "device": rows.device}
    norms = torch.empty(len(rows), **held)
    # One for all blocks: fresh memory costs more.
    wide = torch.empty(min(block, len(rows)), rows.shape[1], **held)
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        wide[: len(part)].copy_(part)
        torch.linalg.vector_norm(wide[: len(part)], dim=1, out=norms[start : start + len(part)])
    odd = outstanding(norms)
    if odd is not None:
        norms[odd] = rows[odd].double().norm(dim=1).float()
    return norms


def outstanding(norms: Tensor) -> Tensor | None:
    """Numbers of the norms (n,) outside `ORDINARY`; None where there is none."""
    least, most = ORDINARY
    odd = ((norms < least) | (norms > most)).nonzero().flatten()
    return odd if len(odd) else None


def unit_rows(rows: Tensor, norms: Tensor) -> Tensor:
    """Stored rows (n, d) divided by their norms (n,), float32; zero stays zero."""
    unit = rows.float() / norms.float().clamp_min(ORDINARY[0]).unsqueeze(1)
    odd = outstanding(norms)
    if odd is not None:
        unit[odd] = unit64(rows[odd]).float()
    return unit


def unit64(rows: Tensor) -> Tensor:
    """Rows (n, d) of any norm divided by it, in float64; zero stays zero."""
    wide = rows.detach().double()
    largest = wide.abs().amax(1, keepdim=True)
    wide = wide / torch.where(largest > 0, largest, 1)  # squares would leave the range of float64
    return wide / wide.norm(dim=1, keepdim=True).clamp_min(1)


def check_numbers(recipe: Any) -> None:
    """Refuses hyper-parameters of an index that are no whole numbers, or too small.

    Args:
        recipe: a dataclass; its integers must be at least 1, its seed at least 0.
    """
    for name in (f.name for f in fields(recipe)):
        value, least = getattr(recipe, name), 0 if name == "seed" else 1
        if value is None or isinstance(value, str):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{recipe.name} takes a whole number of at least {least} as {name}, not {value!r}"
            )


def check_loaded(folder: Path, rows: int, dim: int, vectors: Vectors) -> None:
    """Refuses a loaded index that holds other rows than the vectors."""
    if (rows, dim) != (len(vectors), vectors.dim):
        raise ValueError(
            f"index {folder} holds {rows} rows of width {dim}, the database {len(vectors)} of "
            f"width {vectors.dim}: build the index again"
        )


def check_search(queries: Tensor, k: int, rows: int, dim: int) -> int:
    """Refuses what no index could answer; gives k as an ``int``."""
    k = whole("k", k)
    if queries.is_complex():
        raise ValueError(f"queries are {queries.dtype}, expected floats")
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(
            f"queries have shape {tuple(queries.shape)}, the index holds vectors of width {dim}: "
            "use the encoder that the database was built with"
        )
    if k > rows:
        raise ValueError(
            f"k={k} neighbors asked of {rows} rows: ask for at most {rows}, or add rows"
        )
    if not queries.isfinite().all():
        bad = (~queries.isfinite()).any(1).nonzero().flatten().tolist()
        raise ValueError(
            f"queries hold NaN or infinity, first in row {bad[0]} ({len(bad)} of {len(queries)} "
            "rows): look at the encoder that made them"
        )
    return k


@full_precision()
def in_parts(
    search: Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]],
    vectors: Vectors,
    queries: Tensor,
    k: int,
    hidden: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Checks an exact search, then does it for at most ``size`` queries at a time.

    Returns:
        Similarity (b, k) and indices (b, k), on the queries' device.
    """
    rows = len(vectors) - (0 if hidden is None else len(hidden))
    k = check_search(queries, k, rows, vectors.dim)
    if not len(queries):
        none = torch.empty(0, k, dtype=torch.float32, device=queries.device)
        return none, none.long()
    parts = [search(part, k, hidden) for part in queries.split(size)]
    similarity, indices = (torch.cat(part).to(queries.device) for part in zip(*parts, strict=True))
    return similarity, indices
