"""Approximate neighbors by partitions and anisotropic hashing, for large databases on a CPU.

ScaNN (Guo et al. 2020), the library of the paper's own search. Its candidates are ranked again by
exact cosine. It installs on Linux only.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.indexes.axes import rerank
from retrodiff.indexes.interruptible import heard
from retrodiff.indexes.vectors import (
    Vectors,
    check_loaded,
    check_numbers,
    check_search,
    unit64,
    unit_rows,
)
from retrodiff.interfaces import Index
from retrodiff.precision import full_precision
from retrodiff.progress import progress_bar
from retrodiff.text import printable


@dataclass(frozen=True)
class ScaNN:
    """Recipe of a ScaNN index.

    Args:
        leaves: partitions; None: the square root of the rows.
        visit: partitions looked at in a search; None: a tenth of them, at least 200.
        rerank: candidates ranked again by exact cosine.
        train_rows: rows that partitions and codes are fitted on, at most.
        threshold: how much more an error along a row counts than one across (ScaNN's
            ``anisotropic_quantization_threshold``), in hundredths.

    Examples:
        >>> from retrodiff.indexes import ScaNN
        >>> ScaNN(rerank=800).name
        'scann'
    """

    leaves: int | None = None
    visit: int | None = None
    rerank: int = 400
    train_rows: int = 250_000
    threshold: int = 20
    name = "scann"

    def __post_init__(self) -> None:
        check_numbers(self)

    @full_precision()
    def build(self, vectors: Vectors, progress: bool = False) -> ScaNNIndex:
        """Partitions and codes of every row; they are all in memory in float32 meanwhile."""
        scann = _import_scann()
        m = len(vectors)
        unit = np.empty((m, vectors.dim), np.float32)
        with progress_bar(m, "scann", progress, unit="rows") as bar:
            for start, rows, norms in vectors.blocks(8192):
                unit[start : start + len(rows)] = unit_rows(rows, norms).numpy()
                bar.update(len(rows))
        leaves = self.leaves or max(1, math.isqrt(m))
        plan = scann.scann_ops_pybind.builder(unit, min(self.rerank, m), "dot_product")
        if leaves > 1:
            plan = plan.tree(
                num_leaves=leaves,
                num_leaves_to_search=min(self.visit or max(200, leaves // 10), leaves),
                training_sample_size=min(self.train_rows, m),
            )
        plan = plan.score_ah(2, anisotropic_quantization_threshold=self.threshold / 100)
        return ScaNNIndex(self, vectors, heard(plan.build))

    def load(self, folder: Path, vectors: Vectors) -> ScaNNIndex:
        """Loads the index written by `ScaNNIndex.save`.

        Raises:
            ValueError: the folder holds a pickle that was not written here.
        """
        scann = _import_scann()
        # ScaNN unpickles such a file if there is one; we write none.
        if (folder / "scann" / "scann_docids.pkl").exists():
            raise ValueError(
                f"{folder} holds a pickle that retrodiff did not write: build the index again"
            )
        _check_inside(folder / "scann" / "scann_assets.pbtxt")
        searcher = scann.scann_ops_pybind.load_searcher(str(folder / "scann"))
        check_loaded(folder, searcher.size(), vectors.dim, vectors)
        return ScaNNIndex(self, vectors, searcher)


class ScaNNIndex(Index):
    """A ScaNN searcher, and exact cosine on what it finds."""

    def __init__(self, recipe: ScaNN, vectors: Vectors, searcher: Any):
        self.recipe, self.vectors, self.searcher = recipe, vectors, searcher

    def save(self, folder: Path) -> None:
        """Writes ScaNN's own files, which may be moved."""
        (folder / "scann").mkdir()
        self.searcher.serialize(str(folder / "scann"), relative_path=True)

    @full_precision()
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Queries (b, d) of any norm -> similarity (b, k) and indices (b, k), nearest first."""
        k = check_search(queries, k, len(self.vectors), self.vectors.dim)
        n = min(max(self.recipe.rerank, 2 * k), len(self.vectors))
        points = unit64(queries.cpu()).float().numpy()
        ids, scores = self.searcher.search_batched(points, final_num_neighbors=n)
        # Where fewer are found, the rest is row 0 with a score of NaN.
        found = [
            torch.from_numpy(row[np.isfinite(score)].astype(np.int64))
            for row, score in zip(np.asarray(ids), np.asarray(scores), strict=True)
        ]
        return rerank(self.vectors, queries, found, k)


def _check_inside(assets: Path) -> None:
    """Refuses a list of files that lie elsewhere; ScaNN would read them."""
    with assets.open("rb") as file:
        text = file.read(2**20).decode("utf-8", "replace")
    for name in re.findall(r"asset_path\s*:\s*[\"']([^\"']*)", text):
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise ValueError(
                f"{assets} names {printable(name[:100])!r}, which does not lie beside it: build "
                "the index again"
            )


def _import_scann() -> Any:
    try:
        import scann  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "scann is not installed: pip install 'retrodiff[scann]' (Linux), or use the index "
            "Exact()"
        ) from error
    return scann
