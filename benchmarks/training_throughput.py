"""Training images per second: `fit` against a plain PyTorch loop with the same network and batch.

The network is the pictograms' (4.9 M weights, latents 4 x 16 x 16, four neighbors of 256 numbers);
images, embeddings and neighbors lie in memory. The plain loop is what one writes by hand: AdamW,
gradient clipping, torch-ema's average, neighbors gathered by row number, noise for the whole batch.
Both sides, and both precisions, take turns; each figure is the median of its turns.

    python benchmarks/training_throughput.py                   # this machine's CPU
    python benchmarks/training_throughput.py --device cuda --network imagenet

``--network imagenet`` takes the published UNet of 400 M weights and, on a GPU, bfloat16; it is held
against diffusers' UNet of the same architecture in the same plain loop as well, both compiled.

Writes benchmarks/results/training_throughput.json.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrodiff import presets
from retrodiff.builder import Builder
from retrodiff.checkpoints.foreign.published import PUBLISHED
from retrodiff.diffusion import Dropped, EpsDenoiser, Identity, NeighborEmbeddings
from retrodiff.disk.files import write_json
from retrodiff.interfaces import Context, Encoder, Fingerprint
from retrodiff.model import Model
from retrodiff.networks import UNet
from retrodiff.testing import small_database
from retrodiff.training import TrainingSet, fit

ROWS = 2048


class Given(Encoder):
    """An encoder that is never asked: embeddings are given."""

    def __init__(self, dim: int) -> None:
        self._dim = dim

    @property
    def dim(self) -> int:
        """Of an embedding."""
        return self._dim

    @property
    def fingerprint(self) -> Fingerprint:
        """As the database's."""
        return small_database(rows=8, dim=self._dim, seed=0).fingerprint

    def encode_image(self, images: Tensor) -> Tensor:
        """Never called."""
        raise NotImplementedError


def setup(network: str, device: str) -> tuple[Model, TrainingSet]:
    """The model, and random latents with their neighbors."""
    torch.manual_seed(0)
    dim = 256 if network == "pictograms" else 512
    database = small_database(rows=ROWS, dim=dim, seed=0)
    if network == "pictograms":
        model = presets.rdm_pictograms(encoder=Given(dim), database=database)
    else:
        numbers = dict(PUBLISHED["rdm_imagenet"].unet)
        model = (
            Builder()
            .encoder(Given(dim))
            .database(database)
            .conditioner(Dropped(NeighborEmbeddings("raw"), 0.1))
            .denoiser(EpsDenoiser(UNet(**numbers)))
            .autoencoder(Identity())
            .defaults(k=4)
            .build()
        )
    shape = model.denoiser.shape  # type: ignore[union-attr]
    latents = torch.randn(ROWS, *shape)
    rows = torch.arange(ROWS)
    table = torch.stack([(rows + shift) % ROWS for shift in range(1, 5)], 1)
    data = TrainingSet(latents, database.embeddings(rows), table, database)
    return model.to(device), data


def plain(model: Model, data: TrainingSet, options: argparse.Namespace, narrow: bool) -> float:
    """Images per second of a loop written by hand."""
    from torch_ema import ExponentialMovingAverage

    device = torch.device(options.device)
    model = copy.deepcopy(model)
    denoiser: Any = model.denoiser
    if options.compile:
        denoiser.network.compile()
    weights = list(denoiser.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0)
    average = ExponentialMovingAverage(weights, 0.9999)
    latents, table = torch.as_tensor(data.images).to(device), data.table
    stored = data.database.embeddings(torch.arange(ROWS)).to(device)
    denoiser.train()

    def step() -> None:
        chosen = torch.randint(ROWS, (options.batch_size,))
        x0 = latents[chosen.to(device)]
        values = stored[table[chosen].long().to(device)]
        kept = (torch.rand(len(chosen), device=device) >= 0.1).view(-1, 1, 1)
        context = context_of(model, values * kept)
        sigma = denoiser.draw_sigmas(len(chosen)).to(device)
        with torch.autocast(device.type, torch.bfloat16, narrow):
            loss = denoiser.loss(x0, sigma, torch.randn_like(x0), context).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        average.update(weights)
        loss.item()

    return speed(step, options)


def context_of(model: Model, values: Tensor) -> Context:
    """Neighbors (b, k, d) as the streams that the network takes."""
    from retrodiff.interfaces import Tokens

    streams = {"neighbors": Tokens(values)}
    if "query" in model.denoiser.widths:  # type: ignore[union-attr]
        streams["query"] = Tokens(torch.zeros_like(values[:, :1]))
    return Context(streams)


class Clock:
    """A watcher that notes when steps end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def begin(self, done: int) -> None:
        """Before the first step."""

    def look(self, moment: Any) -> None:
        """After each step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Nothing."""


def fitted(model: Model, data: TrainingSet, options: argparse.Namespace, narrow: bool) -> float:
    """Images per second of `fit`."""
    clock = Clock()
    fit(
        model,
        data,
        steps=options.warm_up + options.steps,
        batch_size=options.batch_size,
        lr=1e-4,
        precision="bfloat16" if narrow else "float32",
        compile=options.compile,
        watch=[clock],
        progress=False,
    )
    times = clock.times[options.warm_up - 1 :]
    return options.batch_size * (len(times) - 1) / (times[-1] - times[0])


def speed(step: Callable[[], None], options: argparse.Namespace) -> float:
    """Images per second of some steps after a warm-up."""
    for _ in range(options.warm_up):
        step()
    started = time.perf_counter()
    for _ in range(options.steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return options.batch_size * options.steps / (time.perf_counter() - started)


class Theirs(nn.Module):
    """diffusers' UNet of the same architecture, called as ours is."""

    def __init__(self, ours: UNet) -> None:
        super().__init__()
        from unet_step import diffusers_twin

        self.unet = diffusers_twin(ours)
        self.shape, self.widths = ours.shape, ours.widths

    def forward(self, x: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        tokens = context.streams["neighbors"].values.to(x)
        return self.unet(x, timesteps, tokens, return_dict=False)[0]


def main() -> None:
    """Takes turns, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=("pictograms", "imagenet"), default="pictograms")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, data = setup(options.network, options.device)
    ways: dict[str, Callable[[], float]] = {}
    for narrow in (False, True):
        kind = "bfloat16" if narrow else "float32"
        ways[f"fit, {kind}"] = lambda n=narrow: fitted(model, data, options, n)
        ways[f"plain loop, {kind}"] = lambda n=narrow: plain(model, data, options, n)
    if options.network == "imagenet":
        ours: Any = model.denoiser
        twin = model.replace(denoiser=EpsDenoiser(Theirs(ours.network)).to(options.device))
        ways["plain loop with diffusers' UNet, bfloat16"] = lambda: plain(twin, data, options, True)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.turns):
        for name, way in ways.items():
            found[name].append(way())
            print(f"turn {turn}: {name}: {found[name][-1]:.2f} images/s", flush=True)
    medians = {name: statistics.median(values) for name, values in found.items()}

    def ratio(one: str, other: str) -> float:
        pairs = zip(found[one], found[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    ratios = {
        "fit / plain loop, float32": ratio("fit, float32", "plain loop, float32"),
        "fit / plain loop, bfloat16": ratio("fit, bfloat16", "plain loop, bfloat16"),
        "fit, bfloat16 / float32": ratio("fit, bfloat16", "fit, float32"),
    }
    if options.network == "imagenet":
        ratios["fit / diffusers' UNet, bfloat16"] = ratio(
            "fit, bfloat16", "plain loop with diffusers' UNet, bfloat16"
        )
    for name, value in {**medians, **ratios}.items():
        print(f"{name}: {value:.3f}")
    on = torch.device(options.device)
    card = torch.cuda.get_device_name(on) if on.type == "cuda" else platform.processor()
    write_json(
        options.json / f"training_throughput_{options.network}_{on.type}.json",
        {
            "date": date.today().isoformat(),
            "device": card,
            "threads": options.threads,
            "torch": torch.__version__,
            "settings": {k: str(v) for k, v in vars(options).items()},
            "images_per_second": medians,
            "all": found,
            "ratios": ratios,
        },
    )


if __name__ == "__main__":
    main()
