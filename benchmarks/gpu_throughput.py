"""Images per second of the ImageNet model on a GPU, against diffusers with the same weights.

Whole images: 50 steps of DDIM under classifier-free guidance, then the VQ decoder. Both sides run
eagerly, under ``torch.compile``, and under ``torch.compile(mode="reduce-overhead")``, which replays
CUDA graphs; only the UNets are compiled, on both sides alike. diffusers runs as shipped and in
channels-last. All variants take turns in one process; the figure is the median.

    python benchmarks/gpu_throughput.py                       # bf16, batches 16 and 64
    python benchmarks/gpu_throughput.py --device cpu --quick  # does it run? tiny, says nothing

Writes benchmarks/results/gpu_throughput.json (not in quick mode, unless --json names a file).
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from unet_step import diffusers_twin

from retrodiff.checkpoints.foreign.published import PUBLISHED
from retrodiff.checkpoints.foreign.tensor_names import diffusers_autoencoder
from retrodiff.checkpoints.foreign.transfer import their_names
from retrodiff.diffusion import DDIM, ClassifierFree, EpsDenoiser
from retrodiff.diffusion.generator import DiffusionGenerator
from retrodiff.disk.files import write_json
from retrodiff.interfaces import Context
from retrodiff.networks import UNet, VQAutoencoder

Run = Callable[[], Tensor]
MODES: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "compile": {},
    "CUDA graphs": {"mode": "reduce-overhead"},
}
"""Arguments of torch.compile; None: not compiled."""

SCALE = 2.0
BOUNDS = {"eager": 2.0, "compile": 1.1, "CUDA graphs": 1.1}
"""Images per second over those of diffusers as shipped in the same mode; for ``eager`` the fastest
of ours counts, since what it is held against is diffusers without any setting."""


def networks(quick: bool) -> tuple[UNet, VQAutoencoder]:
    """The published architectures, or tiny ones of the same graph, with random weights."""
    numbers = dict(PUBLISHED["rdm_imagenet"].unet)
    first = dict(PUBLISHED["rdm_imagenet"].autoencoder)
    if quick:
        numbers |= {"channels": 32, "multipliers": [1, 2], "size": 16, "blocks_per_level": 1}
        first |= {"channels": 32, "blocks_per_level": 1}
    torch.manual_seed(0)
    unet, vq = UNet(**numbers).eval(), VQAutoencoder(**first).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.abs().max() == 0:  # a new network predicts nothing
                parameter.normal_(std=0.02)
        vq.codebook.weight.normal_()
    return unet, vq


def vq_twin(vq: VQAutoencoder) -> torch.nn.Module:
    """Diffusers' first stage with the same weights."""
    from diffusers.models.autoencoders.vq_model import VQModel

    config = vq.config()
    twin = VQModel(
        block_out_channels=tuple(m * config["channels"] for m in config["multipliers"]),
        layers_per_block=config["blocks_per_level"],
        down_block_types=("DownEncoderBlock2D",) * len(config["multipliers"]),
        up_block_types=("UpDecoderBlock2D",) * len(config["multipliers"]),
        latent_channels=config["latent_channels"],
        num_vq_embeddings=config["codes"],
    ).eval()
    names = their_names(vq, diffusers_autoencoder(config))
    shapes = {name: p.shape for name, p in twin.state_dict().items()}
    state = {names[k]: v.reshape(shapes[names[k]]) for k, v in vq.state_dict().items()}
    twin.load_state_dict(state)
    return twin


def compiled(network: torch.nn.Module, mode: str) -> Any:
    options = MODES[mode]
    return network if options is None else torch.compile(network, **options)


def next_step(*_: Any) -> None:
    """Tells CUDA graphs that the tensors of the last network call are no longer needed."""
    torch.compiler.cudagraph_mark_step_begin()


def ours(unet: Any, vq: VQAutoencoder, noise: Tensor, tokens: Tensor, steps: int) -> Run:
    """The library's own way from noise to images."""
    denoiser = EpsDenoiser(unet)
    context = Context.of(tokens)
    generator = DiffusionGenerator(
        denoiser=denoiser,
        guidance=ClassifierFree(SCALE),
        sampler=DDIM(),
        schedule=denoiser.schedule,
        autoencoder=vq,
    )

    def run() -> Tensor:
        next_step()
        return generator.decode(
            generator.generate(context, context.zeros(), noise, steps=steps, callback=next_step)
        )

    return run


def theirs(unet: Any, vq: Any, noise: Tensor, tokens: Tensor, steps: int, last: bool) -> Run:
    """What a diffusers pipeline does, its latents in the networks' type as there."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler: Any = DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    dtype = next(vq.parameters()).dtype
    both = torch.cat([tokens, torch.zeros_like(tokens)]).to(dtype)
    layout = torch.channels_last if last else torch.contiguous_format

    def run() -> Tensor:
        scheduler.set_timesteps(steps, device=noise.device)
        x = noise.to(dtype)
        for t in scheduler.timesteps:
            next_step()
            twice = torch.cat([x, x]).contiguous(memory_format=layout)
            cond, null = unet(twice, t, both, return_dict=False)[0].chunk(2)
            x = scheduler.step(null + SCALE * (cond - null), t, x).prev_sample
        return vq.decode(x).sample.clamp(-1, 1)

    return run


def variants(arguments: argparse.Namespace, batch: int) -> dict[tuple[str, str], Run]:
    """All runs by library and mode."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    unet, vq = networks(arguments.quick)
    config = unet.config()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, *unet.shape, generator=generator).to(device)
    tokens = torch.randn(batch, arguments.k, config["context_width"], generator=generator)
    tokens = tokens.to(device)
    if arguments.alone:
        unet, vq = unet.to(device, dtype), vq.to(device, dtype)
        return {
            ("retrodiff", mode): ours(compiled(unet, mode), vq, noise, tokens, arguments.steps)
            for mode in arguments.modes
        }
    twin, twin_vq = diffusers_twin(unet).to(device, dtype), vq_twin(vq).to(device, dtype)
    unet, vq = unet.to(device, dtype), vq.to(device, dtype)
    last, last_vq = (
        copy.deepcopy(network).to(memory_format=torch.channels_last) for network in (twin, twin_vq)
    )
    shared, steps = (noise, tokens), arguments.steps
    runs: dict[tuple[str, str], Run] = {}
    for mode in arguments.modes:
        runs["diffusers", mode] = theirs(compiled(twin, mode), twin_vq, *shared, steps, False)
        runs["diffusers, channels last", mode] = theirs(
            compiled(last, mode), last_vq, *shared, steps, True
        )
        runs["retrodiff", mode] = ours(compiled(unet, mode), vq, *shared, steps)
    return runs


@torch.no_grad()
def measure(arguments: argparse.Namespace, batch: int) -> list[dict[str, Any]]:
    """Images per second of every variant, and how far its images are from diffusers' eager ones."""
    runs = variants(arguments, batch)
    wait = torch.cuda.synchronize if arguments.device == "cuda" else (lambda: None)
    expected = next(iter(runs.values()))().float()
    errors: dict[tuple[str, str], float] = {}
    for key, run in runs.items():  # also the compilation, and the recording of CUDA graphs
        run()
        errors[key] = ((run().float() - expected).norm() / expected.norm()).item()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(arguments.rounds):
        for key, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            times[key].append(time.perf_counter() - start)
    return [
        {
            "batch": batch,
            "library": library,
            "mode": mode,
            "images_per_s": batch / statistics.median(times[library, mode]),
            "seconds": times[library, mode],
            "difference": errors[library, mode],
        }
        for library, mode in runs
    ]


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over diffusers', by batch and mode, against the bounds."""
    found: list[dict[str, Any]] = []
    speed = {(r["batch"], r["library"], r["mode"]): r["images_per_s"] for r in rows}
    for batch, library, mode in speed:
        if library == "retrodiff":
            continue
        mine = {m: s for (b, name, m), s in speed.items() if (b, name) == (batch, "retrodiff")}
        best = max(mine, key=lambda m: mine[m]) if mode == "eager" else mode
        ratio = mine[best] / speed[batch, library, mode]
        found.append(
            {
                "batch": batch,
                "against": f"{library}, {mode}",
                "ours": best,
                "ratio": ratio,
                "ratio_same_mode": mine[mode] / speed[batch, library, mode],
                "bound": BOUNDS[mode] if library == "diffusers" else None,
                "holds": ratio >= BOUNDS[mode] if library == "diffusers" else None,
            }
        )
    return found


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the figures were measured on."""
    device: dict[str, Any] = {"name": platform.processor() or platform.machine()}
    if arguments.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        device = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    versions: dict[str, str] = {}
    for name in ("torch", "diffusers", "triton", "retrodiff"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    names = ("dtype", "steps", "batches", "k", "rounds", "quick", "modes")
    settings = {name: getattr(arguments, name) for name in names}
    return {"date": str(date.today()), "device": device, "versions": versions, **settings}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks, 2 steps: a smoke test")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), help="all, or eager on a CPU")
    parser.add_argument("-k", type=int, default=4, help="neighbors")
    parser.add_argument("--alone", action="store_true", help="without diffusers: no ratios")
    parser.add_argument("--json", type=Path, help="file of the figures")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SystemExit(
            "gpu_throughput: there is no CUDA device here: run this where one is, or try the "
            "script itself with --device cpu --quick"
        )
    if not cuda and not arguments.quick:
        raise SystemExit(
            "gpu_throughput: --device cpu is for trying the script, with --quick; the CPU's own "
            "benchmark is benchmarks/unet_step.py"
        )
    if not cuda and "CUDA graphs" in (arguments.modes or ()):
        raise SystemExit("gpu_throughput: CUDA graphs need --device cuda")
    defaults = {
        "dtype": "bfloat16" if cuda else "float32",
        "batches": [1, 2] if arguments.quick else [16, 64],
        "steps": 2 if arguments.quick else 50,
        "rounds": 2 if arguments.quick else 7,
        "modes": list(MODES) if cuda else ["eager"],
    }
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.json is None and not arguments.quick:
        arguments.json = Path(__file__).parent / "results" / "gpu_throughput.json"
    return arguments


def main() -> None:
    arguments = parsed()
    torch.backends.cudnn.benchmark = True
    found = about(arguments)
    found["rows"] = []
    print(f"{found['device']['name']}, torch {torch.__version__}, {arguments.dtype}, ", end="")
    print(f"{arguments.steps} steps, guidance {SCALE}, k={arguments.k}")
    print(f"{'batch':>5}  {'library':26}{'mode':14}{'images/s':>10}{'difference':>12}")
    for batch in arguments.batches:
        for row in measure(arguments, batch):
            found["rows"].append(row)
            print(
                f"{batch:5}  {row['library']:26}{row['mode']:14}{row['images_per_s']:10.3f}"
                f"{row['difference']:12.1e}"
            )
        torch.compiler.reset()
    found["ratios"] = ratios(found["rows"])
    for ratio in found["ratios"]:
        bound = "" if ratio["bound"] is None else f" (bound {ratio['bound']})"
        print(
            f"batch {ratio['batch']}: {ratio['ratio']:.3f} of {ratio['against']}, ours "
            f"{ratio['ours']}{bound}"
        )
    if arguments.json is not None:
        write_json(arguments.json, found)


if __name__ == "__main__":
    main()
