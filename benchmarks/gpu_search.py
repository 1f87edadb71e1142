"""Exact search over rows held on a GPU: time of a batch, recall, share of the read bandwidth.

The stored rows are float16; the truth is their cosine in float64, computed on the GPU block by
block. Bound on an H200: at most 8 ms for 128 queries over 20 million rows of width 512, k = 20,
recall 1.0. The bandwidth is measured in the same run, as the best of a sum over the very copy.

    python benchmarks/gpu_search.py --out benchmarks/results/gpu_search.json
    python benchmarks/gpu_search.py --quick --device cpu      # does it run at all
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.indexes import Exact, Vectors
from retrodiff.indexes import tile_maxima as tiles
from retrodiff.indexes.resident import ResidentIndex

K = 20


def rows_of(rows: int, dim: int, device: str) -> tuple[Tensor, Callable[[int], Tensor]]:
    """Stored rows (rows, dim) float16 in memory, around 2,000 centers; and what draws queries."""
    g = torch.Generator(device).manual_seed(0)
    spread = torch.arange(1, dim + 1, device=device).rsqrt()
    centers = torch.randn(2000, dim, generator=g, device=device) * spread

    def draw(n: int) -> Tensor:
        which = torch.randint(2000, (n,), generator=g, device=device)
        return centers[which] + 0.5 * spread * torch.randn(n, dim, generator=g, device=device)

    stored = torch.empty(rows, dim, dtype=torch.float16)
    for i in range(0, rows, 1_000_000):
        stored[i : i + 1_000_000] = draw(min(1_000_000, rows - i)).half().cpu()
    return stored, draw


def seconds(call: Callable[[], Any], device: str, repeats: int) -> list[float]:
    """How long a call takes, from an idle device to an idle device."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    times = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - began)
    return times


def truth(stored: Tensor, queries: Tensor, device: str) -> Tensor:
    """Float64 cosines (b, K) of the K nearest of all rows, nearest first."""
    unit = queries.double() / queries.double().norm(dim=1, keepdim=True)
    best = unit.new_empty(len(queries), 0)
    for part in stored.split(100_000):
        values = part.to(device).double()
        cosine = unit @ (values / values.norm(dim=1, keepdim=True).clamp_min(1e-12)).T
        best = torch.cat([best, cosine], 1).topk(K).values
    return best


def recall(stored: Tensor, queries: Tensor, found: Tensor, best: Tensor) -> float:
    """Share of what was found that is among the K nearest, ties of 1e-9 allowed."""
    unit = queries.double() / queries.double().norm(dim=1, keepdim=True)
    values = stored[found.cpu().flatten()].to(unit.device).double().view(*found.shape, -1)
    cosine = (values * unit[:, None]).sum(2) / values.norm(dim=2)
    return (cosine >= best[:, -1:] - 1e-9).double().mean().item()


def bandwidth(copy: Tensor, device: str) -> float:
    """Bytes per second at which the copy is read."""
    words = copy.view(-1).view(torch.int32)
    words = words[: min(len(words), 2**31 - 1024)]
    return words.nbytes / min(seconds(lambda: words.amax(), device, 5))


def measured(options: argparse.Namespace, recipe: Exact, stored: Tensor, queries: Tensor) -> dict:
    """One storage."""
    began = time.perf_counter()
    index: Any = recipe.build(Vectors([stored]))
    if options.device == "cpu":  # what a GPU does, where there is none
        index = ResidentIndex.on(Vectors([stored]), str(recipe.storage), torch.device("cpu"))
    report: dict[str, Any] = {"copy_s": time.perf_counter() - began}
    report["resident"] = index.copy is not None
    times = seconds(lambda: index.search(queries, K), options.device, options.repeats)
    report |= {"ms": 1e3 * statistics.median(times), "worst_ms": 1e3 * max(times)}
    _, found = index.search(queries, K)
    best = truth(stored, queries, options.device)
    report["recall"] = recall(stored, queries, found, best)
    if index.copy is None:
        return report
    copy = index.copy
    read, size = bandwidth(copy.values, options.device), copy.values.nbytes
    report |= {
        "stray": copy.stray,
        "read_gb_s": read / 1e9,
        "share_of_read": size / statistics.median(times) / read,
    }
    unit = queries / queries.norm(dim=1, keepdim=True)
    narrow = copy.turned(unit).to(index.multiplied_in)
    ways: dict[str, Callable[[], Any]] = {
        "torch": lambda: tiles.multiplied(copy.values, copy.scale, narrow)
    }
    if options.device == "cuda":
        for sizes in [(256, 64, 4), (256, 64, 3), (128, 64, 4), (128, 64, 3), (128, 128, 2)]:
            ways[f"triton {sizes}"] = lambda sizes=sizes: tiles.launched(
                copy.values, copy.scale, narrow, sizes
            )
    report["first_pass_ms"] = {}
    for name, way in ways.items():
        try:
            times = seconds(way, options.device, options.repeats)
        except Exception as error:  # sizes that a device has no room for
            report["first_pass_ms"][name] = f"{type(error).__name__}: {error}"[:200]
            continue
        report["first_pass_ms"][name] = 1e3 * statistics.median(times)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--storage", nargs="+", default=["float16", "int8"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="20,000 rows, two repeats")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU: use --quick --device cpu to see that it runs", file=sys.stderr)
        return 2
    if options.quick:
        options.rows, options.repeats = min(options.rows, 20_000), 2
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "k": K}
    report |= {key: getattr(options, key) for key in ("rows", "dim", "queries", "quick")}
    stored, draw = rows_of(options.rows, options.dim, options.device)
    queries = draw(options.queries)
    for storage in options.storage:
        recipe = Exact(storage=storage, device=options.device)
        report[storage] = measured(options, recipe, stored, queries)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
