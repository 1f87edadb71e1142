"""Exact search against faiss's flat index and against a plain chunked loop, and the other indexes.

Each engine runs in a process of its own, over the same stored float16 values (faiss gets them as
float32, divided by their norm), with the same queries and threads. Bounds: at 64 queries at most
0.25 of faiss's time, at most 1.3 of the plain loop's.

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
from pathlib import Path

import numpy as np

K = 20


def make(folder: Path, rows: int, dim: int) -> None:
    """Clustered vectors of intrinsic width 48, and queries near some of them."""
    rng = np.random.default_rng(0)
    axes = rng.normal(size=(48, dim)).astype(np.float32)
    centers = rng.normal(size=(2000, 48)).astype(np.float32)
    stored = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float16, (rows, dim))
    for i in range(0, rows, 50_000):
        n = min(50_000, rows - i)
        inner = centers[rng.integers(0, 2000, n)] + 0.5 * rng.normal(size=(n, 48))
        stored[i : i + n] = (inner.astype(np.float32) @ axes) * 0.05
    inner = centers[rng.integers(0, 2000, 1000)] + 0.5 * rng.normal(size=(1000, 48))
    np.save(folder / "q.npy", (inner @ axes).astype(np.float32))


def load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Stored vectors, mapped, and queries."""
    return np.load(folder / "x.npy", mmap_mode="c"), np.load(folder / "q.npy")


def searcher(engine: str, folder: Path, threads: int):
    """A function from queries to rows."""
    stored, _ = load(folder)
    if engine == "faiss":
        import faiss

        faiss.omp_set_num_threads(threads)
        rows = stored.astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows)
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
    for b in options.batch:
        search(queries[:b])
        times = []
        for _ in range(options.repeats):
            began = time.perf_counter()
            found = search(queries[:b])
            times.append(time.perf_counter() - began)
        figures[str(b)] = {"seconds": statistics.median(times), "spread": max(times) - min(times)}
        np.save(options.folder / f"{options.job.split(':')[0]}-{b}.npy", found)
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 1000])
    parser.add_argument("--engines", nargs="+", default=["exact", "faiss", "loop"])
    parser.add_argument("--quick", action="store_true", help="20,000 rows, one repeat")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job(options)
        return
    if options.quick:
        options.rows, options.repeats = 20_000, 1
    report: dict = {"rows": options.rows, "dim": options.dim, "threads": options.threads, "k": K}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.rows, options.dim)
        for engine in options.engines:
            words = [sys.executable, __file__, "--job", engine, "--folder", name]
            words += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
            words += ["--batch", *map(str, options.batch)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            report[engine] = {}
            for line in done.stdout.splitlines():
                report[engine] |= json.loads(line)
        for b in options.batch:
            exact = folder / f"exact-{b}.npy"
            for other in ("faiss", "loop"):
                if other in report and "exact" in report:
                    ratio = report["exact"][str(b)]["seconds"] / report[other][str(b)]["seconds"]
                    same = (np.load(exact) == np.load(folder / f"{other}-{b}.npy")).mean()
                    report[f"exact/{other} at {b}"] = {"time": ratio, "same_rows": float(same)}
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
