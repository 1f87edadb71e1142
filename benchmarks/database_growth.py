"""How cost grows with the number of rows: exact search and each index, from 10,000 to 20 million.

Rows are synthetic with a natural spectrum (``spectrum`` of `exact_search.py`), float16, of width 64
so that 20 million fit a small machine; the time of exact search grows with rows times width. Each
point, a number of rows and an index, runs in a process of its own, which builds the index, saves
it, opens it again, and asks 1 and 64 queries: build time, bytes on disk, memory (RssAnon over what
torch takes, at its peak while building and while searching; mapped files are not in it), time, and
recall@20 against exact search.

Points that are in the file already are skipped, unless other processes worked meanwhile, so that a
run can be ended at any time and continued. A point is left out where its build would take longer
than ``--longest`` seconds, reckoned from the next smaller one; ``--full`` measures all.

    python benchmarks/database_growth.py --out benchmarks/results/database_growth.json
    python benchmarks/database_growth.py --plot docs/images/database_growth.png
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
from exact_search import drawn
from machine import Busy, described
from memory import Peak, anonymous_mb

K = 20
QUERIES = 256
ROWS = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 20_000_000)
DISTURBED = 0.1
"""Share of the cores that other processes may take; beyond it times are not drawn, but measured
again by the next run."""
INDEXES = ("exact", "annoy", "usearch", "faiss")
RESULTS = Path(__file__).parent / "results" / "database_growth.json"


def make(folder: Path, rows: int, dim: int) -> None:
    """Stored vectors and held-out queries, drawn as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = drawn("spectrum", rows, dim)
    stored = np.lib.format.open_memmap(folder / "part.npy", "w+", np.float16, (rows, dim))
    for i in range(0, rows, 200_000):
        stored[i : i + 200_000] = draw(min(200_000, rows - i))
    stored.flush()
    np.save(folder / "q.npy", draw(QUERIES).astype(np.float32))
    (folder / "part.npy").rename(folder / "x.npy")


def timed(call: Callable[[], Any], seconds: float) -> tuple[float, int]:
    """Median time of some calls, and how many there were."""
    times: list[float] = []
    call()
    while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times), len(times)


def job(folder: Path, name: str, threads: int) -> dict[str, Any]:
    """One index over the rows of a folder, in this process."""
    import torch

    from retrodiff.indexes import Vectors, recipe_from_string

    torch.set_num_threads(threads)
    stored = torch.from_numpy(np.load(folder / "x.npy", mmap_mode="c"))
    queries = torch.from_numpy(np.load(folder / "q.npy"))
    vectors = Vectors([stored])
    recipe = recipe_from_string(name)
    start = anonymous_mb()
    figures: dict[str, Any] = {"rows": len(stored), "index": name}
    with Busy() as busy, tempfile.TemporaryDirectory(dir=folder) as place:
        began = time.perf_counter()
        with Peak() as peak:
            index = recipe.build(vectors)
        figures["build_s"] = time.perf_counter() - began
        figures["build_mb"] = peak.mb - start
        index.save(Path(place))
        files = [file for file in Path(place).rglob("*") if file.is_file()]
        figures["disk_mb"] = sum(file.stat().st_size for file in files) / 1e6
        if name != "exact":
            index = None
            index = recipe.load(Path(place), vectors)
        with Peak() as peak:
            for b in (1, 64):
                at = iter(range(10**9))

                def ask(b: int = b, at: Any = at, index: Any = index) -> None:
                    first = next(at) * b % (QUERIES - b + 1)
                    index.search(queries[first : first + b], K)

                figures[f"seconds_{b}"], figures[f"runs_{b}"] = timed(ask, 1)
        figures["search_mb"] = peak.mb - start
        found = index.search(queries, K)[1]
        truth = folder / "truth.npy"
        if name == "exact":
            np.save(truth, found.numpy())
        true = torch.from_numpy(np.load(truth))
        figures["recall"] = (found.unsqueeze(2) == true.unsqueeze(1)).any(2).float().mean().item()
        if name == "exact":
            figures["explain"] = [index.explain(1), index.explain(64)]
    return figures | {"others": round(busy.others, 3)}


def reckoned(points: dict[str, Any], rows: int, name: str) -> float:
    """Seconds that a build should take: the next smaller point's, times a little more than rows."""
    smaller = [p for p in points.values() if p["index"] == name and p["rows"] < rows]
    if name == "exact" or not smaller:
        return 0.0
    last = max(smaller, key=lambda point: point["rows"])
    return last["build_s"] * (rows / last["rows"]) ** 1.1


def run(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Every point that is missing, smallest first; the file is written after each."""
    points, ends = report["points"], time.monotonic() + 60 * options.minutes
    for rows in options.rows:
        wanted = [
            name
            for name in options.indexes
            if options.again or points.get(f"{name} {rows}", {"others": 1})["others"] > DISTURBED
        ]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.keep or Path(temporary)) / f"{rows}x{options.dim}"
            if not (folder / "x.npy").is_file():
                make(folder, rows, options.dim)
            if options.make:
                continue
            if wanted[0] != "exact" and not (folder / "truth.npy").is_file():
                wanted = ["exact", *wanted]
            for name in wanted:
                expected = reckoned(points, rows, name)
                left = ends - time.monotonic()
                if expected > min(left, np.inf if options.full else options.longest) or left < 0:
                    print(f"{name} {rows} left out: about {expected:.0f} s", flush=True)
                    continue
                words = [sys.executable, __file__, "--job", name, "--folder", str(folder)]
                words += ["--threads", str(options.threads)]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                points[f"{name} {rows}"] = json.loads(done.stdout.splitlines()[-1])
                print(done.stdout.splitlines()[-1], flush=True)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(report, indent=1) + "\n")


PANELS = (
    ("seconds_1", 1e3, "1 query, ms"),
    ("seconds_64", 1e3, "64 queries, ms"),
    ("recall", 1, "recall@20"),
    ("build_s", 1, "build, s"),
    ("build_mb", 1, "memory while building, MB"),
    ("disk_mb", 1, "on disk beside the rows, MB"),
)
TIMES = ("seconds_1", "seconds_64", "build_s")
COLORS = {"exact": "#222222", "annoy": "#c46a1b", "usearch": "#1b6fc4", "faiss": "#3c8a3c"}


def plot(report: dict[str, Any], file: Path) -> None:
    """Six panels over the number of rows."""
    import matplotlib as mpl

    mpl.use("svg" if file.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), sharex=True)
    for axis, (key, factor, title) in zip(axes.flat, PANELS, strict=True):
        for name, color in COLORS.items():
            points = [p for p in report["points"].values() if p["index"] == name]
            if key in TIMES:
                points = [point for point in points if point["others"] <= DISTURBED]
            points.sort(key=lambda point: point["rows"])
            if not points or (name == "exact" and key in ("build_s", "build_mb", "disk_mb")):
                continue
            x, y = [p["rows"] for p in points], [factor * p[key] for p in points]
            axis.plot(x, y, marker="o", markersize=4, color=color, label=name)
        axis.set_xscale("log")
        if key != "recall":
            axis.set_yscale("log")
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.25, which="major")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel(f"rows of width {report['dim']}")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--indexes", nargs="+", default=list(INDEXES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=600, help="no new point after these")
    parser.add_argument("--longest", type=float, default=90, help="seconds of a build")
    parser.add_argument("--full", action="store_true", help="builds of any length")
    parser.add_argument("--again", action="store_true", help="measure points that are there anew")
    parser.add_argument("--keep", type=Path, help="keep the vectors here, or take them from here")
    parser.add_argument("--make", action="store_true", help="only make the vectors")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, help="draw what is in the file, and measure nothing")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(job(options.folder, options.job, options.threads)))
        return
    about = {"k": K, "dim": options.dim, "threads": options.threads}
    about |= described("annoy", "faiss-cpu", "usearch")
    report: dict[str, Any] = about | {"points": {}}
    if options.out.is_file():
        report = json.loads(options.out.read_text())
        if report["dim"] != options.dim:
            parser.error(f"{options.out} is of width {report['dim']}: give another --out")
        report |= about
    if options.plot:
        plot(report, options.plot)
    else:
        run(options, report)


if __name__ == "__main__":
    main()
