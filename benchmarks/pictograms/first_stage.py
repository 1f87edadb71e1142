"""Trains the first stage of the pictogram model: 64x64 pictures to 16x16x4 latents and back.

    python benchmarks/pictograms/first_stage.py --data runs/pictograms --minutes 60

Resumable: run the same line again. L1 on pixels and on their differences, Gaussian noise on the
latents so that the decoder forgives small errors, a weak pull of the latents to unit size, and an
average of the weights. Only pictures of the split ``train`` are seen.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from pictures import moved, read
from safetensors.torch import save_file
from torch import Tensor

from retrodiff.networks.kl import KLAutoencoder

CONFIG = {"channels": 32, "multipliers": [1, 2, 3], "blocks_per_level": 1, "latent_channels": 4}
NOISE = 0.05


def main() -> None:
    """Trains until the time is up or the schedule ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/pictograms"))
    parser.add_argument("--out", type=Path, default=Path("runs/pictograms/first_stage"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data = read(options.data)
    train, held = data.of("train").images, data.of("held-out").images.float() / 127.5 - 1
    model = KLAutoencoder(**CONFIG).to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(train)} pictures")
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0)
    state = options.out / "state.pt"
    step = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step = saved["average"], saved["step"]
    start, first = time.time(), step
    while step < options.steps and time.time() - start < 60 * options.minutes:
        generator = torch.Generator().manual_seed(1_000_003 * step + 17)
        rows = torch.randint(len(train), (options.batch_size,), generator=generator)
        images = moved(train[rows], generator).contiguous(memory_format=torch.channels_last)
        warm = min(1.0, (step + 1) / 100)
        rate = options.lr * warm * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            mean, _ = model.moments(images)
            noise = torch.randn(mean.shape, generator=generator)
            out = model.decoder(model.from_latent(mean + NOISE * noise))
        out, mean = out.float(), mean.float()
        loss = distance(out, images) + 1e-3 * (mean.square().mean() - 1).square()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.995, step / (step + 10))
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        if step % 100 == 0:
            speed = options.batch_size * (step - first) / (time.time() - start)
            print(f"step {step} loss {loss.item():.4f} {speed:.0f} pictures/s", flush=True)
        if step % 250 == 0 or step == options.steps:
            keep(state, model, optimizer, average, step)
            report(average, held, options.out)
    keep(state, model, optimizer, average, step)
    report(average, held, options.out)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """L1 of pixels, and of the differences between neighboring ones, which keeps edges sharp."""
    across = (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean()
    down = (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()
    return (a - b).abs().mean() + 0.5 * (across + down)


def keep(file: Path, model: KLAutoencoder, optimizer: torch.optim.Optimizer, average: dict[str, Tensor], step: int) -> None:
    """Everything needed to go on, whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step},
        partial,
    )
    partial.replace(file)


@torch.no_grad()
def report(average: dict[str, Tensor], held: Tensor, out: Path) -> None:
    """Error on concepts never seen, the latents' deviation, weights in float16 and a picture."""
    from PIL import Image

    model = KLAutoencoder(**CONFIG).eval()
    model.load_state_dict(average)
    latents = torch.cat([model.encode(part) for part in held.split(64)])
    again = torch.cat([model.decode(part) for part in latents.split(64)]).clamp(-1, 1)
    rmse = (again - held).square().mean().sqrt().item()
    print(f"held-out rmse {rmse:.4f}, latent deviation {latents.std().item():.3f}", flush=True)
    save_file({k: v.half().contiguous() for k, v in average.items()}, out / "weights.safetensors")
    rows = torch.linspace(0, len(held) - 1, 16).long()
    grid = torch.cat([torch.cat(list(x[rows]), -1) for x in (held, again)], -2)
    pixels = ((grid + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(out / "held_out.png")


if __name__ == "__main__":
    main()
