"""Trains the pictograms' network: retrieval-augmented diffusion on 16x16 latents of 64x64 pictures.

    python benchmarks/pictograms/data.py         # once: gets the pictures
    python benchmarks/pictograms/first_stage.py  # pictures to latents and back
    python benchmarks/pictograms/encoder.py      # pictures and titles to embeddings
    torchrun --nproc_per_node 2 benchmarks/pictograms/network.py --pictures 1000000 --threads 1

The same command continues after an interruption. Two processes of one thread share a batch; they
are faster than one process of two threads. D holds the concepts of the splits ``train`` and
``database`` in three styles; the network is trained on ``train``. Neighbors are found among other
views of D's pictures: each moved, made smaller and half of them mirrored, so that no picture is its
own neighbor. For half of the images their own row is left out, too: they learn from what only
resembles them. The others may find it, as a prompt finds a concept that is in D. Most of the time
neighbors come from the picture's own style only, so that style follows the database.

Each picture is trained with neighbors, with one of its captions and neighbors, or with a caption
alone, so that every mode of sampling is trained; half of the neighbors that are shown alone are a
caption's, and one to four are shown. Some captions name the style. ``--start FOLDER`` begins with
the weights of an earlier network, also of one whose tokens were wider or narrower: what it has no
weights for is zero.

It writes runs/pictograms/network (the model with the averaged weights), network.log.jsonl (loss of
training and of held-out concepts), and network.samples.png: prompts down, databases across.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from sets import styled
from torch import Tensor

from retrodiff import presets
from retrodiff.checkpoints.first_stages import load_autoencoder
from retrodiff.databases import (
    ArrayDatabase,
    EmbeddingDatabase,
    ParquetImages,
    build_database,
)
from retrodiff.diffusion import Folded
from retrodiff.disk.files import atomic_write
from retrodiff.encoders import load_encoder
from retrodiff.model import Model
from retrodiff.retrieval import ExcludeSelf, NearestNeighbors, NeighborCounts
from retrodiff.training import TrainingSet, cosine, fit
from retrodiff.training.processes import Processes

STYLES = ("noto", "fluent", "twemoji")
MODES = {"neighbors": 0.45, "text+neighbors": 0.4, "text": 0.15}
PROMPTS = (
    "red apple", "robot", "cat face", "rocket", "tropical fish", "crown", "guitar", "snowman",
    "pizza", "a robot wearing a hat",
)  # fmt: skip


class Latents:
    """Latents with the embeddings of the pictures that they are of, as training images.

    Args:
        latents: (n, 4, 16, 16).
        embeddings: (n, d).
    """

    def __init__(self, latents: Tensor, embeddings: Tensor) -> None:
        self.latents, self.embeddings = latents, embeddings

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.latents[rows].float()

    def embed(self, encoder: Any, rows: Tensor) -> Tensor:
        """What the database keeps of them."""
        del encoder
        return self.embeddings[rows]


class Log:
    """A line of JSON now and then: loss of training, loss on held-out concepts, speed.

    Args:
        path: the file, appended to.
        held_out: what the second loss is of.
        every: steps between two lines.
    """

    def __init__(self, path: Path, held_out: TrainingSet, every: int) -> None:
        self.path, self.held_out, self.every = path, held_out, every
        self.losses: list[float] = []
        self.began = 0

    def begin(self, done: int) -> None:
        """Before the first step."""
        self.began = done

    def look(self, moment: Any) -> None:
        """After each step."""
        self.losses.append(moment.loss)
        if moment.done % self.every:
            return
        speed = (moment.done - self.began) * moment.images / moment.done / moment.seconds
        line = {
            "step": moment.done,
            "images": moment.images,
            "loss": round(sum(self.losses) / len(self.losses), 5),
            "held_out": round(self.score(moment.averaged()), 5),
            "images_per_second": round(speed, 1),
        }
        self.losses.clear()
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)

    @torch.no_grad()
    def score(self, model: Model) -> float:
        """The loss on held-out pictures with fixed noise and noise levels."""
        n = len(self.held_out)
        generator = torch.Generator().manual_seed(0)
        images, query, neighbors = self.held_out.batch(torch.arange(n), model.k)
        images = model.generating().encode(images)  # type: ignore[attr-defined]
        levels = torch.linspace(-2.2, 2.2, n)[torch.randperm(n, generator=generator)]
        noise = torch.randn(images.shape, generator=generator)
        context = model.conditioner.condition(query, neighbors)
        loss = model.denoiser.loss(images, (levels - 0.4).exp(), noise, context)  # type: ignore
        return float(loss.mean())

    def state(self) -> dict[str, Tensor]:
        """Nothing: lines stay in the file."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Nothing."""


def main() -> None:
    """Encodes, trains, samples, saves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/pictograms"))
    parser.add_argument("--out", type=Path, default=Path("runs/pictograms/network"))
    parser.add_argument("--pictures", type=int, default=1_000_000, help="seen in all")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--channels", type=int, default=96)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--own-style", type=float, default=0.65)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--start", type=Path, help="a saved model of the same size")
    parser.add_argument("--report", action="store_true", help="of the state so far; no training")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    encoder: Any = load_encoder(options.data / "encoder")
    first_stage: Any = load_autoencoder(options.data / "first_stage")
    processes = Processes()
    if processes.main:
        build(options.data, encoder)
    processes.wait()  # for the one that builds it
    database = build(options.data, encoder)
    data, held_out = training_data(options, encoder, first_stage, database)
    torch.manual_seed(options.seed)
    model = presets.rdm_pictograms(encoder=encoder, database=database, channels=options.channels)
    if options.start is not None:
        continue_from(model, Model.load(options.start))
    steps = options.pictures // options.batch_size
    checkpoint = options.out.with_name(options.out.name + ".training.safetensors")
    if options.report:
        from retrodiff.training import from_checkpoint

        finish(from_checkpoint(model, checkpoint), first_stage, data, options)
        return
    print(f"{len(data)} pictures, {steps} steps", flush=True)
    started = time.perf_counter()
    fitted = fit(
        model,
        data,
        steps=steps,
        batch_size=options.batch_size,
        lr=cosine(options.lr, steps, min(options.warmup, steps // 10)),
        optimizer=options.optimizer,
        precision=options.precision,
        ema=options.ema,
        seed=options.seed,
        checkpoint=checkpoint,
        checkpoint_every=200,
        resume=True,
        watch=[Log(options.out.with_suffix(".log.jsonl"), held_out, options.log_every)],
        progress=False,
    )
    if not processes.main:
        return
    print(f"{time.perf_counter() - started:.0f} s", flush=True)
    finish(fitted.model, first_stage, data, options)


@torch.no_grad()
def continue_from(model: Model, earlier: Model) -> None:
    """Copies the weights of an earlier network; columns it has not got are zero."""
    there: Any = model.denoiser
    before: Any = earlier.denoiser
    old = before.network.state_dict()
    for name, weight in there.network.state_dict().items():
        if old[name].shape == weight.shape:
            weight.copy_(old[name])
        else:
            weight.zero_()
            both = min(weight.shape[1], old[name].shape[1])
            weight[:, :both].copy_(old[name][:, :both])


def build(folder: Path, encoder: Any) -> EmbeddingDatabase:
    """D: the concepts of the splits train and database in three styles, with thumbnails."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path, file = folder / "database", folder / "database.parquet"
    if path.exists():
        return EmbeddingDatabase.at(path)
    if not file.exists():
        table = pa.concat_tables([pq.read_table(folder / f"{style}.parquet") for style in STYLES])
        with atomic_write(file) as partial:
            pq.write_table(table.filter(pc.not_equal(table["split"], "held-out")), partial)
    return build_database(
        path, ParquetImages(file), encoder, thumbnails=64, resume=True, progress=False
    )


def training_data(
    options: argparse.Namespace, encoder: Any, first_stage: Any, database: EmbeddingDatabase
) -> tuple[TrainingSet, TrainingSet]:
    """X with captions and neighbors, and the held-out concepts."""
    rows = torch.tensor((database.column("split") == "train").nonzero()[0])
    records = database.records(rows)
    latents = torch.cat(
        [encode(first_stage, torch.stack([database.image(int(r)) for r in part]))
         for part in rows.split(256)]
    )  # fmt: skip
    data = TrainingSet.of(
        Latents(latents.repeat(2, 1, 1, 1), database.embeddings(rows).repeat(2, 1)),
        encoder,
        views(database, encoder),
        ExcludeSelf(NearestNeighbors()),
        4,
        ids=torch.cat([rows, torch.full_like(rows, -1)]),
        progress=False,
    )
    data = data.captioned(
        2 * [captions(record) for record in records],
        encoder,
        modes=MODES,
        searched_by="caption",
        neighbors_by_caption=0.5,
        progress=False,
    ).grouped(
        "style",
        options.own_style,
        groups=2 * [record["style"] for record in records],
        progress=False,
    )
    data = data.jittered()
    pictures = held_out_pictures(options.data)
    held_out = TrainingSet.of(
        Latents(encode(first_stage, pictures), encoder.encode_image(pictures)),
        encoder,
        database,
        NearestNeighbors(),
        4,
        progress=False,
    )
    return data, held_out


def views(database: EmbeddingDatabase, encoder: Any) -> ArrayDatabase:
    """D with another view of each picture: moved, smaller by up to a fifth, some mirrored."""
    generator = torch.Generator().manual_seed(0)
    embeddings = []
    for rows in torch.arange(len(database)).split(256):
        images = torch.stack([database.image(int(row)) for row in rows])
        embeddings.append(encoder.encode_image(another_view(images, generator)))
    rows = torch.arange(len(database))
    return ArrayDatabase(
        torch.cat(embeddings), encoder.fingerprint, records=list(database.records(rows))
    )


def another_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (n, 3, h, w) in [-1, 1] on white -> the same, moved, smaller, maybe mirrored."""
    n = len(images)
    scale = 1 / (1 - 0.2 * torch.rand(n, generator=generator))
    mirrored = 1 - 2 * (torch.rand(n, generator=generator) < 0.5).float()
    moved = (2 * torch.rand(n, 2, generator=generator) - 1) * (scale - 1).unsqueeze(-1)
    turn = torch.zeros(n, 2, 3)
    turn[:, 0, 0], turn[:, 1, 1], turn[:, :, 2] = scale * mirrored, scale, moved
    grid = torch.nn.functional.affine_grid(turn, list(images.shape), align_corners=False)
    # Outside is zero: white, in pictures whose white is zero.
    return torch.nn.functional.grid_sample(images - 1, grid, align_corners=False) + 1


def captions(record: Any) -> list[str]:
    """What a picture may be asked for: its title, alone and with a keyword or its style."""
    title, words = str(record["title"]), [w for w in str(record["keywords"]).split(", ") if w]
    plain = [title, title, f"a {title}", *(f"{title}, {word}" for word in words[:4])]
    return plain + styled(title, str(record["style"]))


def encode(first_stage: Any, images: Tensor) -> Tensor:
    """Pictures, bytes or in [-1, 1] -> latents (n, 4, 16, 16)."""
    if images.dtype == torch.uint8:
        images = images / 127.5 - 1
    with torch.no_grad():
        return torch.cat([first_stage.encode(part) for part in images.split(64)])


def held_out_pictures(folder: Path) -> Tensor:
    """All pictures (n, 3, 64, 64) of held-out concepts in [-1, 1], three styles."""
    from first_stage import read

    found = torch.cat([read(folder, style, ("held-out",)) for style in STYLES])
    return found / 127.5 - 1


def finish(model: Model, first_stage: Any, data: TrainingSet, options: argparse.Namespace) -> None:
    """Saves the model with its first stage, and samples the same prompts from each style's D."""
    from PIL import Image

    database: Any = model.database
    proposal = NeighborCounts.from_table(data.table, database)  # rows of views are rows of D
    model = model.replace(autoencoder=Folded(first_stage, 2), proposal=proposal)
    model.save(options.out, overwrite=True)
    columns = []
    for style in STYLES:
        asked = model.replace(database=database.where(f"style == '{style}'"), proposal=None)
        for mode in ("text", "text+neighbors", "neighbors"):
            out = asked.sample(prompts=list(PROMPTS), mode=mode, seed=1)
            columns.append(out.images)
    sheet = torch.cat([torch.cat(list(column), -2) for column in columns], -1)
    picture = ((sheet + 1) * 127.5).round().clamp(0, 255).byte().movedim(0, -1).contiguous()
    image = Image.fromarray(picture.numpy())
    image = image.resize((image.width * 3 // 2, image.height * 3 // 2), Image.Resampling.LANCZOS)
    file = options.out.with_suffix(".samples.png")
    image.save(file)
    print(f"{options.out}, {file}")


if __name__ == "__main__":
    main()
