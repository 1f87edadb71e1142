"""One guided step of the ImageNet model's UNet against diffusers' with the same weights.

A step is what a sampler pays: eps for one latent (or ``--batch``) under a condition and under the
null. Opponents get the doubled batch; ours gets the latent once and both contexts, prepared. All
variants take turns in one process, medians over ``--rounds``. Rows that start with ``without``
switch one source of the gain off, so that each one's share shows.

    python benchmarks/unet_step.py                  # eager, the full model: two minutes on 2 cores
    python benchmarks/unet_step.py --compile        # and torch.compile against torch.compile
    python benchmarks/unet_step.py --quick --json   # a narrow model, under a minute
    python benchmarks/unet_step.py --device cuda --dtype bfloat16 --batch 16 --compile
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.attention import NeighborAttention
from retrodiff.checkpoints.foreign.published import PUBLISHED
from retrodiff.checkpoints.foreign.tensor_names import diffusers_unet
from retrodiff.checkpoints.foreign.transfer import their_names
from retrodiff.disk.files import write_json
from retrodiff.interfaces import Context
from retrodiff.networks import UNet, blocks

Step = Callable[[], Tensor]


def diffusers_twin(unet: UNet) -> torch.nn.Module:
    """Diffusers' network with the same weights."""
    from diffusers import UNet2DConditionModel

    config = unet.config()
    widths = [m * config["channels"] for m in config["multipliers"]]
    attends = [2**level in config["attention_factors"] for level in range(len(widths))]
    twin = UNet2DConditionModel(
        sample_size=config["size"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        block_out_channels=widths,
        layers_per_block=config["blocks_per_level"],
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        cross_attention_dim=config["context_width"],
        attention_head_dim=[w // config["channels_per_head"] for w in widths],
    ).eval()
    names = their_names(unet, diffusers_unet(config))
    state = {names[key]: tensor for key, tensor in unet.state_dict().items()}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(state[name].reshape(parameter.shape))
    return twin


@contextlib.contextmanager
def plain_upsampling() -> Iterator[None]:
    """Repeat the pixels, then convolve."""
    before, blocks.FOLD_FROM = blocks.FOLD_FROM, 10**9
    try:
        yield
    finally:
        blocks.FOLD_FROM = before


@contextlib.contextmanager
def standard_attention(unet: UNet) -> Iterator[None]:
    """Every cross-attention by projections and SDPA."""
    modules = [m for m in unet.modules() if isinstance(m, NeighborAttention)]
    before = [m.path for m in modules]
    for module in modules:
        module.path = "standard"
    try:
        yield
    finally:
        for module, path in zip(modules, before, strict=True):
            module.path = path


def variants(arguments: argparse.Namespace) -> dict[str, Step]:
    """All steps by name; they return eps of the condition, then of the null."""
    numbers = dict(PUBLISHED["rdm_imagenet"].unet)
    if arguments.quick:
        numbers |= {"channels": 64, "size": 32}
    if arguments.tiny:
        numbers |= {"channels": 32, "multipliers": [1, 2], "size": 16, "blocks_per_level": 1}
    torch.manual_seed(0)
    unet = UNet(**numbers).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.abs().max() == 0:  # a new network predicts nothing
                parameter.normal_(std=0.02)
    size, width = numbers["size"], numbers["context_width"]
    place: dict[str, Any] = {
        "device": arguments.device, "dtype": getattr(torch, arguments.dtype)
    }  # fmt: skip
    unet.to(**place)
    x = torch.randn(arguments.batch, 3, size, size).to(**place)
    t = torch.full((arguments.batch,), 500, device=arguments.device)
    tokens = torch.randn(arguments.batch, arguments.k, width).to(**place)
    cond = Context.of(tokens)
    both = Context.cat([cond, cond.zeros()])
    unmarked = Context.of(torch.cat([tokens, torch.zeros_like(tokens)]))

    x2, t2, tokens2 = x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([tokens, 0 * tokens])

    def opponent(network: Any) -> Step:
        return lambda: network(torch.cat([x, x]), t2, tokens2, return_dict=False)[0]

    def last(network: Any) -> Step:
        return lambda: network(
            torch.cat([x, x]).contiguous(memory_format=torch.channels_last),
            t2, tokens2, return_dict=False,
        )[0]  # fmt: skip

    prepared = unet.prepare(both)
    steps: dict[str, Step] = {}
    if not arguments.alone:
        twin: Any = diffusers_twin(unet).to(**place)
        nhwc = copy.deepcopy(twin).to(memory_format=torch.channels_last)
        steps["diffusers"] = opponent(twin)
        steps["diffusers, channels last"] = last(nhwc)
        if arguments.compile:
            steps["diffusers, compiled"] = opponent(torch.compile(twin))
            steps["diffusers, channels last, compiled"] = last(torch.compile(nhwc))
    steps["retrodiff"] = lambda: unet(x, t, prepared)
    if arguments.bfloat16:
        narrow = copy.deepcopy(unet).bfloat16()
        with torch.no_grad():
            half = narrow.prepare(both)
        steps["retrodiff, bfloat16"] = lambda: narrow(x, t, half)
    if arguments.compile:
        compiled = torch.compile(unet)
        steps["retrodiff, compiled"] = lambda: compiled(x, t, prepared)
    if arguments.parts:
        with standard_attention(unet):
            standard = unet.prepare(both)

        def without_folding() -> Tensor:
            with plain_upsampling():
                return unet(x, t, prepared)

        def without_tables() -> Tensor:
            with standard_attention(unet):
                return unet(x, t, standard)

        full = unet.prepare(unmarked)
        steps |= {
            "without shared first blocks": lambda: unet(x2, t2, prepared),
            "without folded upsampling": without_folding,
            "without absorbed attention": without_tables,
            "without the null's short cut": lambda: unet(x, t, full),
            "without preparing": lambda: unet(x, t, both),
        }
    return steps


def features() -> str:
    """What the processor multiplies fast."""
    bf16 = ", bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    return f"{torch.backends.cpu.get_cpu_capability()}{bf16}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a third of the width, half the size")
    parser.add_argument("--tiny", action="store_true", help="does it run: says nothing")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    parser.add_argument("--bfloat16", action="store_true", help="ours in bfloat16, too")
    parser.add_argument("--no-parts", dest="parts", action="store_false", help="totals only")
    parser.add_argument("--alone", action="store_true", help="without diffusers: no ratios")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("-k", type=int, default=4, help="neighbors")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON at the end")
    arguments = parser.parse_args()

    steps = variants(arguments)
    wait = torch.cuda.synchronize if arguments.device == "cuda" else (lambda: None)
    expected = next(iter(steps.values()))()
    errors: dict[str, float] = {}
    for name, step in steps.items():  # also the warm-up, and the compilation
        errors[name] = ((step() - expected).norm() / expected.norm()).item()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            wait()
            start = time.perf_counter()
            step()
            wait()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}

    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if arguments.device == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {machine}, {arguments.dtype}")
    print(f"batch {arguments.batch} x 2, k={arguments.k}, median of {arguments.rounds}")
    ours = medians["retrodiff"]
    print(f"{'':38} {'s':>8} {'ours / it':>10} {'error':>9}")
    for name, seconds in medians.items():
        reference = medians.get("retrodiff, compiled") if name.endswith("compiled") else ours
        reference = reference or ours
        print(f"{name:38} {seconds:8.3f} {reference / seconds:10.3f} {errors[name]:9.1e}")
    bounds = {"diffusers": 0.90, "diffusers, channels last": 0.98}
    if arguments.compile:
        bounds |= {"diffusers, compiled": 1.0, "diffusers, channels last, compiled": 1.0}
    rows: list[dict[str, Any]] = []
    if arguments.device != "cpu":
        bounds = dict.fromkeys(bounds)  # those of a GPU are on whole sampling: gpu_throughput.py
    for name, bound in bounds.items():
        if name not in medians:
            continue
        own = medians["retrodiff, compiled"] if name.endswith("compiled") else ours
        ratio = own / medians[name]
        holds = None if bound is None else ratio <= bound
        rows.append({"against": name, "ratio": ratio, "bound": bound, "holds": holds})
        print(f"against {name}: {ratio:.3f} (bound {bound})")
    if arguments.bfloat16:
        ratio = medians["retrodiff, bfloat16"] / ours
        rows.append(
            {
                "against": "retrodiff, in bfloat16",
                "ratio": ratio,
                "bound": 0.7,
                "holds": ratio <= 0.7,
            }
        )
        print(f"bfloat16 over float32 of ours: {ratio:.3f} (bound 0.7)")
    if arguments.out:
        about = {
            "device": machine, "features": features(), "torch": torch.__version__,
            "dtype": arguments.dtype, "date": datetime.date.today().isoformat(),
            "batch": arguments.batch, "k": arguments.k,
        }  # fmt: skip
        write_json(arguments.out, {**about, "seconds": medians, "errors": errors, "rows": rows})
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
