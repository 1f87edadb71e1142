"""The gradient of softmax-attention in bfloat16 on a CPU: torch's own and the library's.

    OMP_NUM_THREADS=1 python benchmarks/attention_gradient.py

Prints a line for each size, and the training step of a UNet with either. Writes
`benchmarks/results/attention_gradient.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import described

from retrodiff.attention import dot_product
from retrodiff.interfaces import Context, Tokens
from retrodiff.networks import UNet

SIZES = ((16, 16), (64, 64), (256, 256), (1024, 1024), (64, 5), (256, 5))
"""Positions and tokens."""


def main() -> None:
    """Measures and writes."""
    rows: list[dict[str, Any]] = []
    for n, k in SIZES:
        for dtype in (torch.bfloat16, torch.float32):
            b = max(1, 4096 // n)
            q = torch.randn(b, 3, n, 32, dtype=dtype, requires_grad=True)
            kv = torch.randn(b, 3, k, 32, dtype=dtype, requires_grad=True)
            torchs = partial(F.scaled_dot_product_attention, q, kv, kv)
            ours = partial(dot_product.dot_product_attention, q, kv, kv)
            row = {
                "positions": n,
                "tokens": k,
                "dtype": str(dtype).removeprefix("torch."),
                "torch": milliseconds(torchs),
                "retrodiff": milliseconds(ours),
            }
            rows.append(row)
            print(row, flush=True)
    found = {
        "machine": described(),
        "threads": torch.get_num_threads(),
        "forward and backward, ms, 4,096 positions, 3 heads of 32": rows,
        "images per second of a training step, batch 64, UNet of 8x8 positions": steps(),
    }
    file = Path(__file__).parent / "results" / "attention_gradient.json"
    file.write_text(json.dumps(found, indent=1) + "\n")


def milliseconds(run: Callable[[], torch.Tensor]) -> float:
    """The median of nine runs, forward and backward."""
    run().sum().backward()
    times = []
    for _ in range(9):
        start = time.perf_counter()
        run().sum().backward()
        times.append(time.perf_counter() - start)
    return round(sorted(times)[4] * 1e3, 2)


def steps() -> dict[str, float]:
    """Of the pictograms' network in bfloat16: torch's gradient, and the library's."""
    network = UNet(
        in_channels=16,
        out_channels=16,
        size=8,
        channels=32,
        multipliers=(3, 3),
        blocks_per_level=1,
        attention_factors=(1, 2),
        context_width=192,
        streams=("query", "neighbors"),
        vector_width=384,
    )
    x, t = torch.randn(64, 16, 8, 8), torch.rand(64)
    streams = {
        "query": Tokens(torch.randn(64, 1, 192)),
        "neighbors": Tokens(torch.randn(64, 4, 192)),
    }
    context = Context(streams, torch.randn(64, 384))

    def step() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (network(x, t, context) - x).square().mean()

    found, most = {}, dot_product.SMALL
    for name, small in (("torch", 0), ("retrodiff", most)):
        dot_product.SMALL = small
        found[name] = round(64e3 / milliseconds(step), 1)
        print(name, found[name], flush=True)
    return found


if __name__ == "__main__":
    main()
