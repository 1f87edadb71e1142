"""Compares attribution with what a neighbor does: taken away, where does the picture change?

``python benchmarks/attribution.py --out attribution.json --pictures folder``

Two small models are trained. *Composed*: a digit in each quarter of 16x16 pixels; the neighbors are
four pictures with one of the digits in its place each, so that it is known which neighbor belongs
where. *Digits*: the model of ``retrodiff demo`` on scans of 8x8, whose neighbors are whole digits.
Without a neighbor, the same noise is sampled with the other ones. Reported for each measure:
Spearman correlation of the shares with the change, over all pixels and neighbors of an image (the
mean over images); the same with the attribution of another image; over the neighbors' means; and,
for composed pictures, how often a pixel's largest share is that of the neighbor that belongs there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from retrodiff.attention import recording
from retrodiff.attention.recording import MEASURES
from retrodiff.builder import Builder
from retrodiff.components import modules
from retrodiff.diffusion import (
    ClassifierFree,
    DPMpp2M,
    Dropped,
    EDMDenoiser,
    NeighborEmbeddings,
)
from retrodiff.interfaces import Context, Neighbors, Query
from retrodiff.model import Model
from retrodiff.model.attribution import Attribution
from retrodiff.model.attribution_sheet import attribution_sheet
from retrodiff.model.generated import Generation
from retrodiff.networks.dit import DiT

SIDE = 16


def digits() -> Tensor:
    """The scans (n, 8, 8) in [0, 1]."""
    from sklearn.datasets import load_digits

    scans: Any = load_digits()
    return torch.from_numpy(scans.images).float() / 16


def composed(n: int, scans: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (n, 1, 16, 16) in [-1, 1], and their four parts (n, 4, 16, 16), shuffled rows."""
    chosen = scans[torch.randint(len(scans), (n, 4), generator=generator)]
    parts = torch.zeros(n, 4, SIDE, SIDE)
    for j in range(4):
        y, x = 8 * (j // 2), 8 * (j % 2)
        parts[:, j, y : y + 8, x : x + 8] = chosen[:, j]
    return 2 * parts.sum(1, keepdim=True) - 1, parts


def composed_model(steps: int, scans: Tensor) -> Model:
    """A transformer that learns to put the parts together; their pixels are the embeddings."""
    torch.manual_seed(0)
    network = DiT(
        shape=(1, SIDE, SIDE),
        patch=2,
        width=96,
        depth=3,
        heads=4,
        widths={"neighbors": SIDE * SIDE},
    )
    model = (
        Builder()
        .conditioner(Dropped(NeighborEmbeddings("raw"), 0.1))
        .denoiser(EDMDenoiser(network, sigma_data=0.6, mean=-0.8, sigma_min=0.02, sigma_max=20.0))
        .sampler(DPMpp2M())
        .guidance(ClassifierFree(1.5))
        .defaults(k=4, steps=12)
        .build()
    )
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    generator = torch.Generator().manual_seed(1)
    start = time.perf_counter()
    for step in range(steps):
        images, parts = composed(32, scans, generator)
        loss = model.loss(images, _query(parts), _found(parts), generator=generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 200 == 0:
            seconds = time.perf_counter() - start
            print(f"{step}: loss {float(loss):.4f}, {seconds:.0f} s", flush=True)
    return model


def _query(parts: Tensor) -> Query:
    return Query(torch.zeros(len(parts), SIDE * SIDE))


def _found(parts: Tensor) -> Neighbors:
    n, k = parts.shape[:2]
    rows = torch.arange(n * k).view(n, k)
    return Neighbors(rows, torch.ones(n, k), parts.flatten(2) * 8)


def measured(model: Model, embeddings: Tensor, truth: Tensor | None) -> dict[str, Any]:
    """Shares by every measure against the change without each neighbor (b, k, h, w)."""
    generator = model.diffusion()
    b, k = embeddings.shape[:2]
    noise = torch.randn(b, *generator.shape, generator=torch.Generator().manual_seed(3))

    def images(tokens: Tensor) -> Tensor:
        made = model.sample_latents(context=Context.of(tokens), noise=noise)
        return generator.decode(made)

    whole = images(embeddings)
    change = torch.stack(
        [
            (images(embeddings[:, [i for i in range(k) if i != j]]) - whole).abs().mean(1)
            for j in range(k)
        ],
        1,
    )
    found: dict[str, Any] = {"images": b, "k": k}
    maps: dict[str, Tensor] = {}
    for measure in MEASURES:
        networks = modules(model.denoiser)
        size = (int(whole.shape[-2]), int(whole.shape[-1]))
        with recording(networks, b, size, measure) as recorder:
            same = images(embeddings)
        assert torch.equal(same, whole)
        maps[measure] = recorder.shares
        found[measure] = _compared(recorder.shares, change, truth)
    return {"figures": found, "images": whole, "change": change, "maps": maps}


def _compared(shares: Tensor, change: Tensor, truth: Tensor | None) -> dict[str, float]:
    other = shares.roll(1, 0)
    figures = {
        "pixels": _mean_correlation(shares.flatten(1), change.flatten(1)),
        "pixels_of_another_image": _mean_correlation(other.flatten(1), change.flatten(1)),
        "neighbors": _mean_correlation(shares.mean((2, 3)), change.mean((2, 3))),
    }
    if truth is not None:
        figures["owner_found"] = float((shares.argmax(1) == truth).float().mean())
        figures["change_finds_owner"] = float((change.argmax(1) == truth).float().mean())
    return {name: round(value, 3) for name, value in figures.items()}


def _mean_correlation(a: Tensor, b: Tensor) -> float:
    from scipy.stats import spearmanr

    pairs: Any = [spearmanr(x.numpy(), y.numpy()) for x, y in zip(a, b, strict=True)]
    return sum(float(pair.statistic) for pair in pairs) / len(pairs)


class Pictures:
    """Stands for a database in a picture: row (i k) is neighbor k of image i."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures.flatten(0, 1)

    def image(self, row: int) -> Tensor:
        """The picture of a row."""
        return self.pictures[row][None].expand(3, -1, -1)


def draw(images: Tensor, maps: Tensor, pictures: Tensor, file: Path) -> None:
    """The sheet of some samples with these maps (b, k, h, w) as shares."""
    b, k = maps.shape[:2]
    shares = maps / maps.sum(1, keepdim=True).clamp(min=1e-9)
    size = (int(images.shape[-2]), int(images.shape[-1]))
    streams = {"neighbors": torch.ones(b, *size)}
    rows = torch.arange(b * k).view(b, k)
    out = Generation(
        images,
        images,
        Query(torch.zeros(b, 1)),
        Neighbors(rows, torch.ones(b, k), torch.zeros(b, k, 1)),
        {},
        database=cast("Any", Pictures(pictures)),
        attribution=Attribution(shares, streams, size, "weights"),
    )
    attribution_sheet(out, range(4)).save(file)


def main() -> None:
    """Trains, measures, prints; writes figures and pictures where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="of the composed model")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each kind")
    options = parser.parse_args()
    scans = digits()
    model = composed_model(options.steps, scans[:1200])
    _, parts = composed(options.images, scans[1200:], torch.Generator().manual_seed(2))
    rows = torch.arange(SIDE) // 8
    owner = 2 * rows[:, None] + rows[None, :]
    results = {"composed": measured(model, parts.flatten(2) * 8, owner)}
    truth = parts.sum(1)
    made = results["composed"]["images"][:, 0] / 2 + 0.5
    results["composed"]["figures"]["error"] = round(float((made - truth).abs().mean()), 4)
    results["composed"]["figures"]["error_of_black"] = round(float(truth.mean()), 4)

    print(json.dumps(results["composed"]["figures"]), flush=True)
    from retrodiff.demo import digits as demo

    with tempfile.TemporaryDirectory() as folder:
        fitted, split, database, _ = demo.trained(Path(folder), demo.Settings(), 0, False)
        scanned = fitted.model
        assert scanned.encoder is not None
        asked = Query(scanned.encoder.encode_image(split.held_out[0][: options.images]))
        near = scanned.retriever.retrieve(asked, database, 4)
        conditioned = scanned.conditioner.condition(asked, near).streams["neighbors"].values
        shown = split.database[0][near.indices][:, :, 0]
        results["digits"] = measured(scanned, conditioned, None)

    figures = {name: result["figures"] for name, result in results.items()}
    print(json.dumps(figures, indent=2))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        pictures = {"composed": 2 * parts - 1, "digits": shown}
        for name, result in results.items():
            shares = {**result["maps"], "change": result["change"]}
            for kind, maps in shares.items():
                draw(
                    result["images"], maps, pictures[name], options.pictures / f"{name}-{kind}.png"
                )


if __name__ == "__main__":
    main()
