"""How many images a training sees before its samples are recognizable: rows for the budget table.

    python benchmarks/pictograms/data.py --out runs/pictograms
    python benchmarks/training_budget.py runs/pictograms/noto.parquet --size 32 --images 2000000

Trains as ``retrodiff train`` does, with its defaults and the images as their own database, and
keeps a sample grid whenever the images seen have doubled. For each it measures the held-out loss
and how often a sample is found again: whether, among the held-out images, the one nearest to the
sample is the one that was asked with. The same is done with the nearest neighbor in place of the
sample, which is what a model that copies would reach, and 1 / n is what noise reaches.

Writes ``rows.json`` and the grids. Whether a grid is *recognizable* is for a person to say, who
then adds the row to ``retrodiff/training/budgets.json`` with what was seen in words. The number of
images does not depend on the speed of the machine; the seconds do, so run it on an idle one.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff import presets
from retrodiff.databases import ImageFolder, build_database
from retrodiff.encoders import TimmEncoder, encoder_from_string, save_encoder
from retrodiff.interfaces import Randomness
from retrodiff.model import Model
from retrodiff.model.asking import conditioned
from retrodiff.networks.principal import PrincipalPatches
from retrodiff.randomness import normal
from retrodiff.retrieval import ExcludeSelf, NearestNeighbors
from retrodiff.training import (
    FolderImages,
    Grids,
    HeldOut,
    Log,
    Moment,
    TrainingSet,
    cosine,
    fit,
    split,
)
from retrodiff.training.contrastive import crop_and_flip, fit_views
from retrodiff.training.parts import parameters

COARSE = 8
"""Side of the small pictures in which samples are compared, unless a judge is named."""


class Judge:
    """Features in which a sample is compared: coarse colors, or an encoder other than D's own."""

    def __init__(self, name: str | None) -> None:
        self.encoder = None if name is None else encoder_from_string(name)

    def __call__(self, images: Tensor) -> Tensor:
        if self.encoder is not None:
            return torch.nn.functional.normalize(self.encoder.encode_image(images).float(), dim=1)
        coarse = torch.nn.functional.adaptive_avg_pool2d(images, COARSE).flatten(1)
        return torch.nn.functional.normalize(coarse - coarse.mean(1, keepdim=True), dim=1)


class Doubling:
    """Measures whenever the images seen have doubled, and at the end."""

    def __init__(
        self, out: Path, held: HeldOut, grids: Grids, data: TrainingSet, judge: Judge, first: int
    ) -> None:
        self.out, self.held, self.grids = out, held, grids
        self.data, self.judge, self.next = data, judge, first
        self.rows: list[dict[str, Any]] = []

    def begin(self, done: int) -> None:
        pass

    def look(self, moment: Moment) -> None:
        if moment.images < self.next and not moment.last:
            return
        while self.next <= moment.images:
            self.next *= 2
        model = moment.averaged()
        title = f"Held-out images, {moment.images:,} images seen"
        self.grids.draw(model, title).save(self.out / f"images-{moment.images:08d}.png")
        measured = self.held.measure(model, moment.done)
        row = {
            "images": moment.images,
            "seconds": round(moment.seconds, 1),
            "held_out": measured.loss,
            "trained": measured.trained,
            **found_again(model, self.data, self.judge),
        }
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        pass


def found_again(model: Model, data: TrainingSet, judge: Judge, most: int = 64) -> dict[str, float]:
    """Share of samples, and of nearest neighbors, whose query is the nearest of all queries."""
    rows = torch.arange(min(most, len(data)))
    images, query, neighbors = data.batch(rows, model.k)
    shape = model.generating().shape
    latents = model.sample_latents(
        context=conditioned(model.conditioner, query, neighbors),
        noise=normal(Randomness.of(7, range(len(rows)), "noise"), (len(rows), *shape)),
        generator=Randomness.of(7, range(len(rows)), "sampler"),
    )
    samples = model.generating().decode(latents).float().cpu()
    side = images.shape[-1]
    near = torch.stack(
        [
            torch.nn.functional.interpolate(
                data.database.image(int(i))[None], size=(side, side), antialias=True,
                mode="bilinear",
            )[0]
            for i in neighbors.indices[:, 0]
        ]
    )  # fmt: skip
    asked = judge(images)
    at = torch.arange(len(rows))
    return {
        "found_again": float(((judge(samples) @ asked.T).argmax(1) == at).float().mean()),
        "found_again_by_neighbor": float(((judge(near) @ asked.T).argmax(1) == at).float().mean()),
        "found_again_by_chance": 1 / len(rows),
    }


def unpacked(source: Path, out: Path, most: int | None) -> Path:
    """A folder of pictures; those of a parquet file are written into one."""
    if source.is_dir():
        return source
    import pyarrow.parquet as pq
    from PIL import Image

    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(source, columns=["image"]).slice(0, most)
    for i, row in enumerate(table.column("image").to_pylist()):
        content = row["bytes"] if isinstance(row, dict) else row
        Image.open(io.BytesIO(content)).convert("RGB").save(folder / f"{i:05d}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of pictures, or a parquet file of them")
    parser.add_argument("--kind", default="pictograms", help="of the pictures, in a word")
    parser.add_argument("--out", type=Path, default=Path("runs/training_budget"))
    parser.add_argument("--encoder", help="else a small one is trained on the pictures")
    parser.add_argument("--judge", help="encoder in whose features samples are found again")
    parser.add_argument("--take", type=int, help="pictures, where not all")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=96)
    parser.add_argument("--images", type=int, default=1_000_000, help="seen in training")
    parser.add_argument("--first", type=int, default=8_000, help="images of the first row")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    folder = unpacked(options.source, options.out, options.take)
    images = FolderImages(folder, options.size)
    torch.manual_seed(0)
    if options.encoder is None:
        encoder = TimmEncoder("test_resnet", image_size=32, preprocessing="plain")
        small = FolderImages(folder, 32)
        every = small[torch.arange(len(small))]
        fit_views(encoder, every, crop_and_flip, steps=500, batch_size=64, lr=cosine(2e-3, 500, 50))
        save_encoder(encoder, options.out / "encoder", overwrite=True)
    else:
        encoder = encoder_from_string(options.encoder)
    database = build_database(
        options.out / "pictures.rdb", ImageFolder(folder), encoder, thumbnails=64, overwrite=True
    )
    some = images[torch.linspace(0, len(images) - 1, min(len(images), 2000)).long()]
    model = presets.rdm_small(
        encoder=encoder,
        first_stage=PrincipalPatches.fit(some, patch=4, components=16),
        database=database,
        size=options.size,
        channels=options.channels,
    ).to(options.device)
    rest, unseen = split(images, 0.1)
    assert unseen is not None
    nearest = ExcludeSelf(NearestNeighbors())
    data = TrainingSet.of(rest, encoder, database, nearest, model.k)
    held = TrainingSet.of(unseen, encoder, database, nearest, model.k)
    steps = -(-options.images // options.batch_size)
    measure = HeldOut(held, steps, trained=data)
    grids = Grids(options.out, held, steps, trained=data, lines=6)
    rows = Doubling(options.out, measure, grids, held, Judge(options.judge), options.first)
    log = Log(options.out / "run", tensorboard=False)
    start = time.perf_counter()
    fit(
        model,
        data,
        steps=steps,
        batch_size=options.batch_size,
        lr=cosine(options.lr, steps, min(100, steps // 10)),
        ema=0.999,
        checkpoint=options.out / "checkpoint.safetensors",
        resume=True,
        watch=[rows, log],
    )
    about = {
        "command": f"benchmarks/training_budget.py --size {options.size} --channels "
        f"{options.channels} --images {options.images} --batch-size {options.batch_size}",
        "kind": options.kind,
        "pictures": len(images),
        "size": options.size,
        "space": "16 principal components of 4x4 patches",
        "network": f"UNet, {parameters(model) / 1e6:.1f} M",
        "judge": options.judge or f"{COARSE}x{COARSE} colors",
        "machine": f"{platform.machine()} {options.device}, {options.threads} threads",
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows.rows,
    }
    file = options.out / "rows.json"
    file.write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    print(f"{file}: look at the grids beside it, then add rows to the table of budgets")


if __name__ == "__main__":
    main()
