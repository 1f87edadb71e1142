"""The autoregressive transformer of the paper's size: 256 codes with a cache and without.

    python benchmarks/rarm.py --out runs/rarm.json
    python benchmarks/rarm.py --small          # a functional check in seconds

Fresh weights: time does not depend on them. Every run draws the same codes both ways (or says
where they part, by rounding), with neighbors prepared once in both: the loop without a cache
evaluates all codes so far at each step. The bound is on one image; measure on a machine that does
nothing else.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from retrodiff.autoregressive import AutoregressiveGenerator, GrayLevels
from retrodiff.autoregressive.token_generator import draw
from retrodiff.checkpoints import PUBLISHED_TOKENS
from retrodiff.disk.files import write_json
from retrodiff.interfaces import Context
from retrodiff.networks import CausalTransformer

BOUND = 5.0
PARAMETERS = 230_874_112


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a small network, for a check")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/rarm.json"))
    options = parser.parse_args()

    numbers = dict(PUBLISHED_TOKENS["rarm_dogs"].transformer)
    if options.small:
        numbers |= {"codes": 64, "grid": (8, 8), "width": 96, "depth": 3, "heads": 4}
    torch.manual_seed(0)
    network = CausalTransformer(**numbers).to(options.device).eval()
    count = sum(p.numel() for p in network.parameters())
    if not options.small and count != PARAMETERS:
        raise SystemExit(f"{count:,} parameters, not {PARAMETERS:,}")
    made = AutoregressiveGenerator(
        network=network,
        autoencoder=GrayLevels(network.codes),
        guidance=options.guidance,
        top_k=256,
    )
    rows = [measure(made, batch, options) for batch in options.batch]
    for row in rows:
        verdict = "met" if row["times_faster"] >= BOUND else "MISSED"
        print(
            f"batch {row['batch']:3}: {row['seconds_cached']:.2f} s with a cache, "
            f"{row['seconds_uncached']:.2f} s without, {row['times_faster']:.1f} times faster "
            f"(bound {BOUND:g}: {verdict}); logits differ by {row['largest_difference']:.1e}"
        )
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    machine = {"device": options.device, "threads": torch.get_num_threads()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        options.out,
        {"parameters": count, "bound": BOUND, "rows": rows, "versions": versions} | machine,
    )


@torch.no_grad()
def measure(
    made: AutoregressiveGenerator, batch: int, options: argparse.Namespace
) -> dict[str, float]:
    """Medians of both ways, and how much their logits differ on the same codes."""
    network, device = made.network, torch.device(options.device)
    seeded = torch.Generator().manual_seed(1)
    near = torch.randn(batch, 4, network.context_width, generator=seeded).to(device)
    context = Context.of(near)
    noise = torch.randn(batch, *made.shape, generator=seeded).to(device)
    null = context.zeros()

    def cached() -> torch.Tensor:
        return made.generate(context, null, noise, steps=1).flatten(1).long()

    def uncached() -> torch.Tensor:
        heights = torch.special.ndtr(noise.double()).flatten(1)
        both = context if made.guidance == 1 else Context.cat([context, null])
        prepared = network.prepare(both)
        codes = torch.zeros(batch, 0, dtype=torch.long, device=device)
        for i in range(network.length):
            logits = network(codes, prepared)[:, -1].double()
            if made.guidance != 1:
                cond, other = logits.chunk(2)
                logits = other + made.guidance * (cond - other)
            drawn = draw(logits, heights[:, i], made.temperature, made.top_k)
            codes = torch.cat([codes, drawn[:, None]], 1)
        return codes

    with_cache, codes = timed(cached, options.repeats, device)
    without, other = timed(uncached, max(1, options.repeats // 2), device)
    whole = network(codes[:, :-1], context)
    run = network.decoding(context)
    steps = [run.next(codes[:, i - 1] if i else None) for i in range(network.length)]
    differs = (torch.stack(steps, 1) - whole).abs().max() / whole.abs().max()
    same = (codes == other).all(0)
    return {
        "batch": batch,
        "guidance": made.guidance,
        "seconds_cached": with_cache,
        "seconds_uncached": without,
        "times_faster": without / with_cache,
        "largest_difference": float(differs),
        "codes_alike_up_to": int(same.long().cumprod(0).sum()),
        "codes": network.length,
    }


def timed(
    call: Callable[[], torch.Tensor], repeats: int, device: torch.device
) -> tuple[float, torch.Tensor]:
    """Median seconds after one warm-up, and what came out."""
    out = call()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), out


if __name__ == "__main__":
    main()
