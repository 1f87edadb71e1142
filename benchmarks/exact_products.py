"""What a first pass over a million rows takes for 8 queries, by the type of its products.

Products alone, without choosing or scoring again: what exact search could gain from rows that are
kept in another type. Bytes are multiplied with sums of 32 bits by oneDNN; ``float16 one by one`` is
a product per query over blocks of the rows as they are stored. The time of the whole search, which
makes bfloat16 of float16 each time, is in exact_search.json.

    python benchmarks/exact_products.py --out benchmarks/results/exact_products.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import Busy, described

from retrodiff.disk.files import write_json

BLOCK = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = torch.empty(options.rows, options.dim, dtype=torch.float16)
    for part in rows.split(100_000):
        part.copy_(torch.randn(part.shape))
    queries = torch.randn(options.queries, options.dim)
    bfloat, half = queries.bfloat16(), queries.half()
    kept = rows.bfloat16()
    coded = torch.randint(-127, 128, rows.shape, dtype=torch.int8)
    asked = torch.randint(-127, 128, queries.shape, dtype=torch.int8)

    def one_by_one(part: torch.Tensor) -> None:
        for query in half:
            torch.mv(part, query)

    ways: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], object]]] = {
        "bfloat16 kept": (kept, lambda part: bfloat @ part.T),
        "bytes kept": (coded, lambda part: torch._int_mm(asked, part.T)),
        "float16 one by one": (rows, one_by_one),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with Busy() as busy:
        for turn in range(options.repeats + 1):
            for name, (stored, call) in ways.items():
                began = time.perf_counter()
                for part in stored.split(BLOCK):
                    call(part)
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - began)
    found = {name: round(statistics.median(times), 4) for name, times in seconds.items()}
    report = {"rows": options.rows, "dim": options.dim, "queries": options.queries}
    report |= {"threads": options.threads, "seconds": found, "others": round(busy.others, 3)}
    report |= described()
    print(report)
    if options.out:
        write_json(options.out, report)


if __name__ == "__main__":
    main()
