"""Is the path that the dispatcher takes on a CPU the faster one, in sampling and in training?

Absorbed against standard neighbor cross-attention over many sizes, one thread, processor time, the
least of several turns (other work may run beside it). Sampling counts one evaluation and a 50th of
the preparation, training a forward and a backward pass with gradients to x and all weights.

    python benchmarks/attention_dispatch.py              # float32: three minutes
    python benchmarks/attention_dispatch.py --dtype bf16 --k 20
    python benchmarks/attention_dispatch.py --quick --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable

import torch

from retrodiff.attention import NeighborAttention

SIZES = (  # positions, channels
    (16, 128), (64, 128), (256, 128), (16, 384), (36, 384), (64, 384), (144, 384), (256, 384),
    (1024, 384), (256, 576), (64, 960), (144, 1344), (36, 1792),
)  # fmt: skip
QUICK = ((64, 128), (256, 384), (64, 960))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PATHS = ("absorbed", "standard")


def least(functions: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Seconds of processor time of each function, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            start = time.process_time()
            function()
            taken[name].append(time.process_time() - start)
    return {name: min(values) for name, values in taken.items()}


def measure(b: int, n: int, c: int, e: int, k: int, dtype: torch.dtype, turns: int) -> list[dict]:
    torch.manual_seed(0)
    module = NeighborAttention(c, 512, c // e).to(dtype)
    x, values = torch.randn(b, n, c).to(dtype), torch.randn(b, k, 512).to(dtype)
    grad, inputs = torch.randn_like(x), [x.clone().requires_grad_(), *module.parameters()]

    def prepare(path: str) -> object:
        module.path = path  # type: ignore[assignment]
        return module.prepare(values, n)

    def train(path: str) -> object:
        module.path = path  # type: ignore[assignment]
        return torch.autograd.grad(module(inputs[0], values), inputs, grad)

    rows = []
    for what in ("sampling", "training"):
        module.path = None
        with torch.set_grad_enabled(what == "training"):
            chosen = module.explain(x, values).path
            if what == "training":
                seconds = least({path: lambda p=path: train(p) for path in PATHS}, turns)
            else:
                held = {path: prepare(path) for path in PATHS}
                every = least(
                    {p: lambda c=context: module(x, c) for p, context in held.items()}, turns
                )
                once = least({path: lambda p=path: prepare(p) for path in PATHS}, turns)
                seconds = {path: every[path] + once[path] / 50 for path in PATHS}
        other = PATHS[chosen == PATHS[0]]
        rows.append(
            {
                "what": what,
                "shape": [b, n, c, e],
                "k": k,
                "path": chosen,
                "ms": 1e3 * seconds[chosen],
                "other_ms": 1e3 * seconds[other],
                "ratio": seconds[other] / seconds[chosen],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few sizes")
    parser.add_argument("--json", action="store_true", help="last line: the rows as JSON")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--turns", type=int, help="5, or 3 with --quick")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = QUICK if args.quick else SIZES
    rows = []
    for b, (n, c), e, k in itertools.product((1, 4), sizes, (32, 64), args.k):
        turns = args.turns or (3 if args.quick else 5)
        for row in measure(b, n, c, e, k, DTYPES[args.dtype], turns):
            rows.append(row)
            print(
                f"{row['what']} {tuple(row['shape'])} k={k}: {row['path']} {row['ms']:.2f} ms, "
                f"other {row['other_ms']:.2f} ms, ratio {row['ratio']:.2f}",
                flush=True,
            )
    slower = [row for row in rows if row["ratio"] < 1]
    absorbed = [row for row in slower if row["path"] == "absorbed"]
    print(
        f"{len(rows)} decisions, the other path was faster in {len(slower)}, standard faster than "
        f"the chosen absorbed in {len(absorbed)} (least ratio "
        f"{min((row['ratio'] for row in absorbed), default=1):.2f})"
    )
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
