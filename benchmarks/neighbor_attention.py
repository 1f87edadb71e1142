"""Neighbor cross-attention against the fastest standard block, at the shapes of the presets.

The opponent is a pre-norm cross-attention block with PyTorch's attention: each of its backends
forced (flash, efficient, cuDNN, math), eager and compiled, and FlexAttention. In sampling (forward)
keys and values of the neighbors are computed once for both sides, in training (backward) each time.
Contenders take turns, medians count, and x is never warm in a GPU's cache. Error is against the
formula in float64, relative to what the block adds to x.

    python benchmarks/neighbor_attention.py --device cpu --quick --json    # under a minute
    python benchmarks/neighbor_attention.py --device cuda --out results    # the table and the plot
    python benchmarks/neighbor_attention.py --device cuda --network        # a whole UNet, guided
    python benchmarks/neighbor_attention.py --device cuda --tune           # launch sizes, measured
    python benchmarks/neighbor_attention.py --resources                    # registers, no GPU
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from retrodiff.attention import NeighborAttention, Prepared, reference_attention, use_path
from retrodiff.interfaces import Context, Tokens

SHAPES = {  # preset -> (positions, channels) of its cross-attentions, heads 32 wide
    "rdm_imagenet": ((1024, 384), (256, 576), (64, 960)),
    "rdm_ffhq": ((1024, 448), (256, 672), (64, 896)),
    "rdm_768": ((2304, 448), (576, 896), (144, 1344), (36, 1792)),
}
QUICK = (  # positions, channels, head width, k
    (4096, 192, 32, 4),
    (1024, 384, 32, 4),
    (256, 576, 32, 4),
    (64, 960, 32, 4),
    (1024, 384, 32, 20),
    (1024, 384, 64, 20),
    (1024, 384, 32, 1),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    preset: str
    b: int
    n: int
    c: int
    e: int
    k: int
    dtype: str
    backward: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.b, self.n, self.c, self.e


# --- contenders ---------------------------------------------------------------------------------


def attend_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v)  # pyright: ignore[reportReturnType]


def standard_block(module: NeighborAttention, backend: str) -> Callable[..., Tensor]:
    """``(x, keys, values) -> x + block``, keys and values (b, k, c)."""
    h = module.heads

    def run(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = rearrange(module.to_q(module.norm(x)), "b n (h e) -> b h n e", h=h)
        k = rearrange(keys, "b k (h e) -> b h k e", h=h)
        v = rearrange(values, "b k (h e) -> b h k e", h=h)
        if backend == "flex":
            out = attend_flex(q, k, v)
        else:
            forced = BACKENDS[backend]
            with nullcontext() if forced is None else sdpa_kernel(forced):
                out = F.scaled_dot_product_attention(q, k, v)
        return x + module.to_out(rearrange(out, "b h n e -> b n (h e)"))

    return run


def sampled(block: Callable[..., Tensor], module: NeighborAttention, values: Tensor):
    """Forward only, keys and values computed before."""
    with torch.no_grad():
        k, v = module.to_k(values), module.to_v(values)

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        return block(x, k, v)

    return run


def trained(block: Callable[[Tensor], Tensor], module: NeighborAttention):
    """Forward and backward."""
    inputs = list(module.parameters())
    grads: dict[torch.Size, Tensor] = {}

    def run(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = block(x)
        grad = grads.setdefault(out.shape, torch.randn_like(out))
        torch.autograd.grad(out, [x, *inputs], grad, allow_unused=True)
        return out

    return run


def contenders(
    case: Case, module: NeighborAttention, values: Tensor, compiled: str
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Every way of running the standard block, by name."""

    def ready(block: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        if not case.backward:
            return sampled(block, module, values)
        return trained(lambda x: block(x, module.to_k(values), module.to_v(values)), module)

    for backend in BACKENDS:
        yield f"eager {backend}", ready(standard_block(module, backend))
    if compiled == "none":
        return
    names = ("default", "math", "flex") if compiled == "few" else (*BACKENDS, "flex")
    for backend in names:
        block = torch.compile(standard_block(module, backend), dynamic=False)
        yield f"compiled {backend}", ready(block)


def ours(case: Case, module: NeighborAttention, values: Tensor) -> Callable[[Tensor], Tensor]:
    """Ours as the dispatcher runs it: prepared once when sampling, each time when training."""
    if case.backward:
        return trained(lambda x: module(x, values), module)
    with torch.no_grad():
        prepared = module.prepare(values, case.n)

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        return module(x, prepared)

    return run


# --- measuring ----------------------------------------------------------------------------------


class Clock:
    """Seconds per call of several functions in turns, on a CPU or a GPU."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def once(self, function: Callable[[], object], calls: int) -> float:
        if self.device != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - start) / calls
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(calls):
            function()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / calls

    def medians(self, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
        calls = {}
        for name, function in functions.items():
            self.once(function, 2 if self.device == "cuda" else 1)
            spent = self.once(function, 1)
            calls[name] = max(1, min(50, int(2e-2 / max(spent, 1e-6))))
        taken: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(self.repeats):
            for name, function in functions.items():
                taken[name].append(self.once(function, calls[name]))
        return {name: statistics.median(values) for name, values in taken.items()}


def rotating(x: Tensor, device: str) -> Callable[[], Tensor]:
    """Copies of x in turn: enough of them that none is left in a GPU's cache."""
    size = x.numel() * x.element_size()
    copies = 1 if device != "cuda" else min(32, max(2, -(-(256 << 20) // size)))
    turn = itertools.cycle([x.clone() for _ in range(copies)])
    return lambda: next(turn)


def copy_bandwidth(clock: Clock, device: str) -> float:
    """Bytes per second of a copy, read and written bytes counted."""
    numbers = (256 << 20) if device == "cuda" else (16 << 20)
    a, b = torch.empty(2, numbers, device=device).unbind()
    seconds = clock.medians({"copy": lambda: b.copy_(a)})["copy"]
    return 2 * a.numel() * a.element_size() / seconds


def product_peak(clock: Clock, device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product at its best: a roof is a maximum."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    out = torch.empty_like(a)
    best = min(clock.once(lambda: torch.mm(a, a, out=out), 1) for _ in range(clock.repeats + 2))
    return 2 * n**3 / best


def measure(case: Case, device: str, clock: Clock, compiled: str, copy: float) -> dict:
    torch.manual_seed(0)
    torch.compiler.reset()
    dtype = DTYPES[case.dtype]
    module = NeighborAttention(case.c, 512, case.c // case.e).to(device, dtype)
    x = torch.randn(case.b, case.n, case.c, device=device, dtype=dtype)
    values = torch.randn(case.b, case.k, 512, device=device, dtype=dtype)
    take = rotating(x, device)
    functions: dict[str, Callable[[], object]] = {}
    refusals: dict[str, str] = {}
    mine = ours(case, module, values)
    few = x[:2]
    exact = reference_attention(few.double(), values[:2].double(), module.weights.to(torch.float64))
    added = (exact - few).norm()

    def error(run: Callable[[Tensor], Tensor]) -> float:
        return ((run(x)[:2] - exact).norm() / added).item()

    for name, run in contenders(case, module, values, compiled):
        try:
            run(x)
        except Exception as refused:  # a backend that does not take this dtype, width or device
            refusals[name] = str(refused).splitlines()[0]
            continue
        functions[name] = lambda run=run: run(take())
    plain = error(sampled(standard_block(module, "default"), module, values))
    found = error(ours(replace(case, backward=False), module, values))
    times = clock.medians({"ours": lambda: mine(take()), **functions})
    seconds = times.pop("ours")
    opponent = min(times, key=times.__getitem__)
    with torch.set_grad_enabled(case.backward):
        path = module.explain(x, values).path
    moved = (3 if case.backward else 2) * x.numel() * x.element_size()
    return {
        "preset": case.preset,
        "shape": list(case.shape),
        "k": case.k,
        "dtype": case.dtype,
        "direction": "forward+backward" if case.backward else "forward",
        "path": path,
        "ms": 1e3 * seconds,
        "opponent": opponent,
        "opponent_ms": 1e3 * times[opponent],
        "ratio": times[opponent] / seconds,
        "ratio_eager_default": times["eager default"] / seconds,
        "gb_per_s": moved / seconds / 1e9,
        "share_of_copy": moved / seconds / copy,
        "error": found,
        "error_of_plain": plain,
        "all_ms": {name: 1e3 * t for name, t in times.items()},
        "refused": refusals,
    }


def network(
    device: str, dtype: torch.dtype, clock: Clock, small: bool, size: int = 64
) -> list[dict]:
    """One guided step of the ImageNet model's UNet: prepared, standard, and without attention.

    What attention takes is measured inside the step, module by module: on a CPU it is a few
    percent of a step whose convolutions vary by as much from run to run.
    """
    from retrodiff.networks.unet import UNet

    net = UNet(
        in_channels=3,
        out_channels=3,
        size=size,
        channels=64 if small else 192,
        multipliers=(1, 2, 3, 5) if size == 64 else (1, 1, 1, 1),
        blocks_per_level=2,
        attention_factors=(2, 4, 8),
        context_width=512,
    ).to(device, dtype)
    b = 1 if device == "cpu" else 32
    x = torch.randn(2 * b, 3, size, size, device=device, dtype=dtype)
    t = torch.full((2 * b,), 500, device=device)
    rows = []
    for k in (4, 20):
        tokens = Tokens(torch.randn(b, k, 512, device=device, dtype=dtype))
        context = Context({"neighbors": Tokens.cat([tokens, tokens.zeros()])})
        with torch.no_grad():
            mine = net.prepare(context)
            use_path(net, "standard")
            skipping = net.prepare(context)
            plain = net.prepare(replace_nulls(context))
            use_path(net, None)

        def step(held: object, without: bool = False) -> Tensor:
            left_out = patch.object(NeighborAttention, "forward", _identity)
            with torch.no_grad(), left_out if without else nullcontext():
                return net(x, t, held)  # pyright: ignore[reportArgumentType]

        steps = {
            "ours": partial(step, mine),
            "standard": partial(step, plain),
            "standard, null rows skipped": partial(step, skipping),
        }
        times = clock.medians({**steps, "without": partial(step, mine, without=True)})
        row = {
            "network": "rdm_imagenet UNet" + (" at a third of its width" if small else ""),
            "rows": 2 * b,
            "k": k,
            **{f"{name} ms": 1e3 * seconds for name, seconds in times.items()},
        }
        if device == "cpu":
            inside = attention_seconds(steps, clock.repeats)
            row |= {f"{name}, attention ms": 1e3 * s for name, s in inside.items()}
            most, saved = inside["standard"], inside["standard"] - inside["ours"]
        else:
            most = times["standard"] - times["without"]
            saved = times["standard"] - times["ours"]
        rows.append(
            {
                **row,
                "share_of_cross_attention": most / times["standard"],
                "speedup": times["standard"] / (times["standard"] - saved),
                "amdahl_limit": times["standard"] / (times["standard"] - most),
                "part_of_the_possible_saving": saved / most,
            }
        )
    return rows


def attention_seconds(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds that a step spends in its neighbor attentions, on a CPU."""
    forward, spent = NeighborAttention.forward, 0.0

    def timed(*args: object, **kwargs: object) -> Tensor:
        nonlocal spent
        start = time.perf_counter()
        out = forward(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        spent += time.perf_counter() - start
        return out

    taken: dict[str, list[float]] = {name: [] for name in steps}
    with patch.object(NeighborAttention, "forward", timed):
        for _ in range(repeats):
            for name, function in steps.items():
                spent = 0.0
                function()
                taken[name].append(spent)
    return {name: statistics.median(values) for name, values in taken.items()}


def replace_nulls(context: Context) -> Context:
    """The context with its null rows as ordinary zeros: what a standard network attends to."""
    return Context({name: replace(t, null_rows=0) for name, t in context.streams.items()})


def _identity(module: object, x: Tensor, prepared: Prepared, shape: object = None) -> Tensor:
    del module, prepared, shape
    return x


# --- launch sizes -------------------------------------------------------------------------------


def tune(shapes: list[tuple[int, int]], ks: list[int]) -> list[dict]:
    """The kernels' launch sizes, measured and kept, as `retrodiff tune` does."""
    from retrodiff.attention import tune_attention
    from retrodiff.attention.tuning import told

    rows = []
    for (n, c), k, backward in itertools.product(shapes, ks, (False, True)):
        found = tune_attention(
            width=c, heads=c // 32, k=k, positions=n, batch=64, backward=backward
        )
        rows.append(asdict(found))
        print(told(found), flush=True)
    return rows


def resources() -> None:
    """Registers, spills and shared memory of every kernel at every shape, without a GPU."""
    from retrodiff.attention.ahead import compile_ahead

    shapes = sorted({shape for preset in SHAPES.values() for shape in preset})
    for cap, dtype, (n, c), k in itertools.product((80, 90), DTYPES, shapes, (1, 4, 10, 20)):
        for kernel in ("forward", "backward_rows", "backward_tables"):
            found = compile_ahead(
                kernel, c=c, heads=c // 32, k=k, size=n, dtype=DTYPES[dtype], capability=cap
            )
            print(f"sm_{cap} {dtype} ({n}, {c}) k={k} {kernel}: {found}", flush=True)


# --- output -------------------------------------------------------------------------------------


def write(rows: list[dict], folder: Path, about: dict, copy: float, peaks: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"neighbor_attention_{about['device'].replace(' ', '_')}"
    with open(f"{stem}.csv", "w", newline="") as file:
        flat = [
            {**about, **row, **{name: json.dumps(row[name]) for name in ("all_ms", "refused")}}
            for row in rows
        ]
        table = csv.DictWriter(file, fieldnames=list(flat[0]))
        table.writeheader()
        table.writerows(flat)
    print(f"wrote {stem}.csv", file=sys.stderr)
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    for name, peak in peaks.items():
        intensity = [2.0**i for i in range(-2, 13)]
        roof = [min(peak, copy * x) / 1e12 for x in intensity]
        axes.plot(intensity, roof, label=f"roof {name}: copy, matrix product")
    for mine, marker in ((True, "o"), (False, "x")):
        points = []
        for row in rows:
            if row["direction"] != "forward" or row["path"] == "one":
                continue
            b, n, c, e = row["shape"]
            width = c // e * row["k"] if mine else c + row["k"]
            size = DTYPES[row["dtype"]].itemsize
            seconds = (row["ms"] if mine else row["opponent_ms"]) / 1e3
            sets = 2 * b * width * c if mine else 2 * c * c
            work = 4 * b * n * c * width
            points.append((work / (size * (2 * b * n * c + sets)), work / seconds / 1e12))
        if points:
            label = "ours" if mine else "fastest standard block"
            axes.scatter(*zip(*points, strict=True), marker=marker, label=label, s=18)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move")
    axes.set(ylabel="TFLOP/s", title=f"Neighbor cross-attention, {about['device']}")
    axes.legend(fontsize=7)
    figure.savefig(f"{stem}.png", dpi=120)
    plt.close(figure)
    print(f"wrote {stem}.png", file=sys.stderr)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    if args.quick:
        for n, c, e, k in QUICK:
            yield Case("quick", args.batch or 8, n, c, e, k, "fp32", False)
        return
    for preset, shapes in SHAPES.items():
        for n, c in shapes:
            for k, dtype in itertools.product(args.k, args.dtypes):
                for backward in (False, True):
                    yield Case(preset, args.batch or 64, n, c, 32, k, dtype, backward)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few shapes, float32, forward")
    parser.add_argument("--json", action="store_true", help="last line: the rows as JSON")
    parser.add_argument("--out", type=Path, help="folder for the csv and the roofline plot")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 4, 10, 20])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, help="64, or 8 with --quick")
    parser.add_argument("--repeats", type=int, help="25, or 5 with --quick")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--compiled", choices=("none", "few", "all"), help="opponents to compile")
    parser.add_argument("--network", action="store_true", help="a guided step of a whole UNet")
    parser.add_argument("--small", action="store_true", help="with --network: a third of its width")
    parser.add_argument("--tune", action="store_true", help="measure launch sizes (GPU)")
    parser.add_argument("--resources", action="store_true", help="compile only, print registers")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.resources:
        return resources()
    clock = Clock(args.device, args.repeats or (5 if args.quick else 25))
    on_gpu = args.device == "cuda"
    about = {
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "date": datetime.date.today().isoformat(),
    }
    print(about, flush=True)
    if args.network:
        dtype = torch.bfloat16 if on_gpu else torch.float32
        rows = network(args.device, dtype, clock, args.small)
        for row in rows:
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    elif args.tune:
        rows = tune([s for p in SHAPES.values() for s in p], args.k)
    else:
        copy = copy_bandwidth(clock, args.device)
        print(f"copy: {copy / 1e9:.0f} GB/s", flush=True)
        compiled = args.compiled or ("few" if on_gpu else "none")
        rows = []
        for case in cases(args):
            row = measure(case, args.device, clock, compiled, copy)
            rows.append(row)
            print(
                f"{row['preset']} {tuple(row['shape'])} k={row['k']} {row['dtype']} "
                f"{row['direction']}: {row['path']} {row['ms']:.3f} ms, {row['opponent']} "
                f"{row['opponent_ms']:.3f} ms, ratio {row['ratio']:.2f} "
                f"(eager default {row['ratio_eager_default']:.2f}), "
                f"{100 * row['share_of_copy']:.0f} % of copy, error {row['error']:.1e} "
                f"(plain {row['error_of_plain']:.1e})",
                flush=True,
            )
        if args.out:
            names = ["fp32"] if args.quick else args.dtypes
            peaks = {name: product_peak(clock, args.device, DTYPES[name]) for name in names}
            write(rows, args.out, about, copy, peaks)
    if args.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
