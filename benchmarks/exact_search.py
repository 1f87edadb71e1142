"""Exact search against faiss's flat index and against a plain chunked loop, and other indexes.

Each engine runs in a process of its own, over the same stored float16 values (faiss gets them as
float32, divided by their norm), with the same queries and threads. Bounds at 1 million rows: at 64
queries at most 0.25 of faiss's time, at 1,000 at most 0.7; at most 1.3 of the plain loop's.

How much exact search can pass over depends on the rows, so they come in kinds:
``clustered`` has 2,000 clusters of intrinsic width 48, which is easy; ``spectrum`` has all widths,
with variances that fall as 1/i (as those of CLIP's embeddings roughly do), a direction that all
rows share, and a cluster per 100 rows; ``smooth`` is the same without clusters, where nothing can
be passed over, and no embedding of pictures is known to be like that.

    python benchmarks/exact_search.py --out benchmarks/results/exact_search.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

K = 20
QUERIES = 1000


def drawn(kind: str, rows: int, dim: int) -> Callable[[int], np.ndarray]:
    """A function that draws n vectors (n, dim) of a kind, for a database of so many rows."""
    rng = np.random.default_rng(0)
    if kind == "clustered":
        axes = rng.standard_normal((48, dim), dtype=np.float32)
        centers = rng.standard_normal((2000, 48), dtype=np.float32)

        def draw(n: int) -> np.ndarray:
            inner = centers[rng.integers(0, 2000, n)]
            return (inner + 0.5 * rng.standard_normal((n, 48), dtype=np.float32)) @ axes * 0.05

        return draw
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    variance = 1 / np.arange(1, dim + 1)
    spread = np.sqrt(variance / variance.sum()).astype(np.float32)
    shared = np.eye(dim, dtype=np.float32)[-1] * np.sqrt(0.4 / 0.6)  # 0.4 of a squared norm
    centers = spread * rng.standard_normal((max(rows // 100, 1), dim), dtype=np.float32)

    def draw_spectrum(n: int) -> np.ndarray:
        x = spread * rng.standard_normal((n, dim), dtype=np.float32)
        if kind == "spectrum":
            x = 0.3**0.5 * x + 0.7**0.5 * centers[rng.integers(0, len(centers), n)]
        return (x + shared) @ turn * 10

    return draw_spectrum


def make(folder: Path, rows: int, dim: int, kind: str = "clustered") -> None:
    """Stored vectors, and queries that are drawn as they are."""
    draw = drawn(kind, rows, dim)
    stored = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float16, (rows, dim))
    for i in range(0, rows, 50_000):
        stored[i : i + 50_000] = draw(min(50_000, rows - i))
    np.save(folder / "q.npy", draw(QUERIES).astype(np.float32))


def load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Stored vectors, mapped, and queries."""
    return np.load(folder / "x.npy", mmap_mode="c"), np.load(folder / "q.npy")


def searcher(engine: str, folder: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from queries to rows."""
    stored, _ = load(folder)
    if engine == "faiss":
        import faiss

        faiss.omp_set_num_threads(threads)
        index = faiss.IndexFlatIP(stored.shape[1])
        for i in range(0, len(stored), 50_000):
            rows = stored[i : i + 50_000].astype(np.float32)
            index.add(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        return lambda q: index.search(q / np.linalg.norm(q, axis=1, keepdims=True), K)[1]
    import torch

    torch.set_num_threads(threads)
    rows = torch.from_numpy(stored)
    if engine == "loop":
        return lambda q: loop(rows, torch.from_numpy(q))
    from retrodiff.indexes import Vectors, recall_of, recipe_from_string

    vectors = Vectors([rows])
    began = time.perf_counter()
    index = recipe_from_string(engine).build(vectors)
    print(json.dumps({"build_s": time.perf_counter() - began}))
    if not engine.startswith("exact"):
        print(json.dumps({"recall": recall_of(index, vectors, K).value}))
    return lambda q: index.search(torch.from_numpy(q), K)[1].numpy()


def loop(rows, queries):
    """What one would write in a minute: chunks to float32, product, top k, merge."""
    import torch

    unit = queries / queries.norm(dim=1, keepdim=True)
    best, found = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(rows), 8192):
        part = rows[start : start + 8192].float()
        scores, at = (unit @ (part / part.norm(dim=1, keepdim=True)).T).topk(min(K, len(part)))
        best, found = torch.cat([best, scores], 1), torch.cat([found, at + start], 1)
        best, order = best.topk(K)
        found = found.gather(1, order)
    return found.numpy()


def job(options: argparse.Namespace) -> None:
    """One engine, in this process."""
    search = searcher(options.job, options.folder, options.threads)
    _, queries = load(options.folder)
    figures = {}
    search(queries[:2])  # rows are in memory, libraries are loaded
    for b in options.batch:
        times, found = [], queries
        while len(times) < 2 or (len(times) < options.repeats and sum(times) < options.seconds):
            began = time.perf_counter()
            found = search(queries[:b])
            times.append(time.perf_counter() - began)
        figures[str(b)] = {
            "seconds": statistics.median(times),
            "spread": max(times) - min(times),
            "runs": len(times),
        }
        np.save(options.folder / f"{options.job.split(':')[0]}-{b}.npy", found)
    print(json.dumps(figures))


def agreement(folder: Path, b: int, other: str) -> dict[str, float]:
    """Share of rows that are the same, and the largest gap in float64 cosine where they are not."""
    stored, queries = load(folder)
    ours, theirs = (np.load(folder / f"{name}-{b}.npy") for name in ("exact", other))
    query, place = np.nonzero(ours != theirs)
    unit = queries[query].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = []
    for found in (ours, theirs):
        rows = stored[found[query, place]].astype(np.float64)
        cosines.append((rows * unit).sum(1) / np.linalg.norm(rows, axis=1))
    gap = np.abs(cosines[0] - cosines[1]).max() if len(query) else 0.0
    return {"same_rows": float((ours == theirs).mean()), "largest_gap": float(gap)}


def measured(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """All engines on one kind of rows."""
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.rows, options.dim, kind)
        for engine in options.engines:
            words = [sys.executable, __file__, "--job", engine, "--folder", name]
            words += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
            words += ["--seconds", str(options.seconds), "--batch", *map(str, options.batch)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            report[engine] = {}
            for line in done.stdout.splitlines():
                report[engine] |= json.loads(line)
            print(kind, engine, json.dumps(report[engine]), file=sys.stderr, flush=True)
        for b in options.batch:
            for other in {"faiss", "loop"} & set(options.engines):
                if "exact" in report:
                    ratio = report["exact"][str(b)]["seconds"] / report[other][str(b)]["seconds"]
                    report[f"exact/{other} at {b}"] = {
                        "time": ratio,
                        **agreement(folder, b, other),
                    }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="of each batch, at most")
    parser.add_argument("--seconds", type=float, default=15, help="for each batch, about")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, QUERIES])
    parser.add_argument("--engines", nargs="+", default=["exact", "faiss", "loop"])
    parser.add_argument(
        "--data",
        nargs="+",
        default=["clustered", "spectrum"],
        choices=["clustered", "spectrum", "smooth"],
    )
    parser.add_argument("--quick", action="store_true", help="20,000 rows, two repeats")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job(options)
        return
    if options.quick:
        options.rows, options.repeats = 20_000, 2
    began = time.perf_counter()
    report: dict[str, Any] = {
        name: getattr(options, name) for name in ("rows", "dim", "threads", "quick")
    }
    report["k"] = K
    for kind in options.data:
        report[kind] = measured(options, kind)
    report["minutes"] = (time.perf_counter() - began) / 60
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
