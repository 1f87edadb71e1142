"""Exact search against faiss's flat index, usearch's exact search and a plain chunked loop.

Each engine runs in a process of its own, over the same stored float16 values (faiss gets them as
float32, divided by their norm), with the same queries and threads. ``exact`` reads a mapped file,
``memory`` a copy of it in memory. Bounds at 1 million rows with a natural spectrum: one query at
most 0.5 of faiss's time and 1.0 of usearch's, and at least half of the bandwidth of a copy; 8, 64
and 1,000 queries at most 0.25, 0.12 and 0.5 of faiss's; among 1 %, 10 % and 50 % of the rows at
most 1.2 of the time among all. What is found is compared with a brute force in float64.

How much exact search can pass over depends on the rows, so they come in kinds: ``spectrum`` has all
widths, with variances that fall as 1/i (as those of CLIP's embeddings roughly do), a direction that
all rows share, and a cluster per 100 rows; ``clustered`` has 2,000 clusters of intrinsic width 48,
which is easy; ``smooth`` is ``spectrum`` without clusters, and no embedding of pictures is known to
be like that.

    python benchmarks/exact_search.py --out benchmarks/results/exact_search.json

With ``--keep FOLDER`` the vectors stay there for the next run; ``--make`` only makes them.
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
from machine import Busy, described

K = 20
QUERIES = 1000
CHECKED = 64
"""Queries that are compared with a brute force in float64."""
SHARES = (0.01, 0.1, 0.5)


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


Search = Callable[[np.ndarray], np.ndarray]


def searcher(engine: str, folder: Path, threads: int) -> tuple[Search, dict[float, Search]]:
    """A function from queries to rows, and the same among shares of the rows."""
    stored, _ = load(folder)
    if engine == "faiss":
        import faiss

        faiss.omp_set_num_threads(threads)
        index = faiss.IndexFlatIP(stored.shape[1])
        for i in range(0, len(stored), 50_000):
            rows = stored[i : i + 50_000].astype(np.float32)
            index.add(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        return lambda q: index.search(q / np.linalg.norm(q, axis=1, keepdims=True), K)[1], {}
    if engine == "usearch":
        from usearch.index import search as exact

        held = np.array(stored)

        def usearch(q: np.ndarray) -> np.ndarray:
            found = exact(held, q.astype(np.float16), K, "cos", exact=True, threads=threads)
            return found.keys.reshape(len(q), K)

        return usearch, {}
    import torch

    torch.set_num_threads(threads)
    rows = torch.from_numpy(stored if engine != "memory" else np.array(stored))
    if engine == "loop":
        return lambda q: loop(rows, torch.from_numpy(q)), {}
    from retrodiff.indexes import Exact, Vectors, recall_of, recipe_from_string

    vectors = Vectors([rows])
    began = time.perf_counter()
    index = (Exact() if engine == "memory" else recipe_from_string(engine)).build(vectors)
    print(json.dumps({"build_s": time.perf_counter() - began}))
    if engine in ("exact", "memory"):
        print(json.dumps({"explain": [index.explain(b) for b in (1, 8, 64, QUERIES)]}))
    elif not engine.startswith("exact"):
        print(json.dumps({"recall": recall_of(index, vectors, K).value}))
    shares = {}
    if engine == "exact":
        g = torch.Generator().manual_seed(0)
        for share in SHARES:
            chosen = (torch.rand(len(rows), generator=g) < share).nonzero().flatten()
            shares[share] = Exact().build(vectors.select(chosen))

    def found(index: Any) -> Search:
        return lambda q: index.search(torch.from_numpy(q), K)[1].numpy()

    return found(index), {share: found(part) for share, part in shares.items()}


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
    search, shares = searcher(options.job, options.folder, options.threads)
    _, queries = load(options.folder)
    search(queries[:2])  # rows are in memory, libraries are loaded
    figures: dict[str, Any] = {}
    for b in options.batch:
        if options.job == "usearch" and b > 8:
            continue  # a minute and more
        figures[str(b)] = timed(lambda b=b: search(queries[:b]), options)
    for share, among in shares.items():
        for b in (b for b in options.batch if b <= 64):
            figures[f"{b} among {share:g}"] = timed(lambda b=b, f=among: f(queries[:b]), options)
    if options.job == "exact":
        figures["float64"] = agreement(options.folder, search(queries[:CHECKED]))
        figures["copy"] = copied(options)
    print(json.dumps(figures))


def timed(call: Callable[[], Any], options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a call, the gap between the slowest and the fastest, and others' work."""
    times: list[float] = []
    with Busy() as busy:
        while len(times) < 2 or (len(times) < options.repeats and sum(times) < options.seconds):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(times),
        "spread": max(times) - min(times),
        "runs": len(times),
        "others": round(busy.others, 3),
    }


def copied(options: argparse.Namespace) -> dict[str, float]:
    """Time of a copy in memory of as many bytes as the rows have; it reads and writes each."""
    import torch

    stored = torch.from_numpy(np.array(load(options.folder)[0]))
    other = torch.empty_like(stored)
    other.copy_(stored)
    figures = timed(lambda: other.copy_(stored), options)
    return figures | {"gb_per_s": 2 * stored.nbytes / figures["seconds"] / 1e9}


def agreement(folder: Path, found: np.ndarray) -> dict[str, float]:
    """Found rows (b, k) against a brute force in float64: rows that are the same, largest gap."""
    stored, queries = load(folder)
    unit = queries[: len(found)].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    best = np.empty((len(found), 0))
    place = np.empty((len(found), 0), np.int64)
    theirs = np.empty(found.shape)
    for i in range(0, len(stored), 20_000):
        rows = stored[i : i + 20_000].astype(np.float64)
        cosine = unit @ rows.T / np.linalg.norm(rows, axis=1)
        query, at = np.nonzero((found >= i) & (found < i + len(rows)))
        theirs[query, at] = cosine[query, found[query, at] - i]
        best = np.concatenate([best, cosine], 1)
        place = np.concatenate([place, np.broadcast_to(np.arange(len(rows)) + i, cosine.shape)], 1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :K]
        best, place = (np.take_along_axis(x, order, 1) for x in (best, place))
    return {
        "queries": len(found),
        "same_rows": float((found == place).mean()),
        "largest_gap": float(np.abs(best - theirs).max()),
    }


def measured(options: argparse.Namespace, kind: str, folder: Path) -> dict[str, Any]:
    """All engines on one kind of rows."""
    report: dict[str, Any] = {}
    for engine in options.engines:
        words = [sys.executable, __file__, "--job", engine, "--folder", str(folder)]
        words += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
        words += ["--seconds", str(options.seconds), "--batch", *map(str, options.batch)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        report[engine] = {}
        for line in done.stdout.splitlines():
            report[engine] |= json.loads(line)
        print(kind, engine, json.dumps(report[engine]), file=sys.stderr, flush=True)
    report["ratios"] = ratios(report, options)
    return report


def ratios(report: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Times over those that they are compared with, and the share of the bandwidth."""
    out: dict[str, float] = {}
    for name in {"exact", "memory"} & set(report):
        own = report[name]
        for other in {"faiss", "usearch", "loop"} & set(report):
            for b in (str(b) for b in options.batch if str(b) in report[other]):
                out[f"{name}/{other} at {b}"] = own[b]["seconds"] / report[other][b]["seconds"]
        if "copy" in report["exact"] and "1" in own:
            rows = options.rows * options.dim * 2
            bandwidth = report["exact"]["copy"]["gb_per_s"] * 1e9
            out[f"{name}, share of the copy's bandwidth"] = rows / own["1"]["seconds"] / bandwidth
        for key in (key for key in own if " among " in key):
            whole = own[key.partition(" ")[0]]["seconds"]
            out[f"{name}, {key} over all"] = own[key]["seconds"] / whole
    return {key: round(value, 4) for key, value in sorted(out.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="of each batch, at most")
    parser.add_argument("--seconds", type=float, default=8, help="for each batch, about")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, QUERIES])
    engines = ["exact", "memory", "faiss", "usearch", "loop"]
    parser.add_argument("--engines", nargs="+", default=engines)
    kinds = ["spectrum", "clustered", "smooth"]
    parser.add_argument("--data", nargs="+", default=kinds[:2], choices=kinds)
    parser.add_argument("--quick", action="store_true", help="40,000 rows, two repeats")
    parser.add_argument("--keep", type=Path, help="keep the vectors here, or take them from here")
    parser.add_argument("--make", action="store_true", help="only make the vectors")
    parser.add_argument("--out", type=Path, help="add the figures to this JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job(options)
        return
    if options.quick:
        options.rows, options.repeats = 40_000, 2
    names = ("rows", "dim", "threads", "quick")
    report: dict[str, Any] = {name: getattr(options, name) for name in names}
    report |= {"k": K} | described("faiss-cpu", "usearch")
    if options.out and options.out.is_file():
        before = json.loads(options.out.read_text())
        if all(before.get(name) == report[name] for name in names):
            report = before | report
    for kind in options.data:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) if options.keep is None else options.keep / kind
            if not (folder / "q.npy").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                make(folder, options.rows, options.dim, kind)
            if not options.make:
                report[kind] = measured(options, kind, folder)
    if options.make:
        return
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
