"""What it costs to give a training its batches: pictures read, and conditions looked up.

Photographs of 512 x 384 pixels are made, and a database of random embeddings. Pictures come from
memory, from a mapped file, or are decoded on demand by 0, 1, 2, ... workers; conditions are plain,
or with captions, groups and jitter, or are searched at each step. Images per second of batches
alone: nothing is trained.

    python benchmarks/training_data.py                   # two minutes on 2 cores
    python benchmarks/training_data.py --pictures 200 --steps 10 --json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from retrodiff.databases import ArrayDatabase
from retrodiff.disk.files import write_json
from retrodiff.interfaces import Fingerprint, TextEncoder
from retrodiff.retrieval import NearestNeighbors, RandomOfTop
from retrodiff.training import FolderImages, Mirrored, Moved, SourceImages, TrainingSet

WIDTH, K = 512, 8
ABOUT = Fingerprint(encoder="random", weights="", preprocessing="none", dim=WIDTH)


class RandomText(TextEncoder):
    """Embeds text by its hash, at no cost."""

    dim, fingerprint = WIDTH, ABOUT

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Not asked here."""
        raise NotImplementedError

    def encode_text(self, prompts: list[str]) -> torch.Tensor:
        """Prompts -> embeddings (b, d)."""
        seeds = [sum(map(ord, prompt)) for prompt in prompts]
        return torch.stack(
            [torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )


def photographs(folder: Path, count: int) -> None:
    """Smooth pictures with some noise, as large as photographs once compressed."""
    draw = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        picture = np.asarray(small.resize((512, 384), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (picture + draw.integers(-12, 13, picture.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i:05}.jpg", quality=90)


def rate(data: TrainingSet, options: argparse.Namespace, workers: int = 0) -> float:
    """Images per second of batches, after a first one."""
    batches = data.batches(
        0, options.steps + 1, batch_size=options.batch_size, seed=0, workers=workers
    )
    next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return options.steps * options.batch_size / (time.perf_counter() - start)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=20_000, help="of the database")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(0)
    styles = [{"style": "abcd"[i % 4]} for i in range(options.rows)]
    rows = torch.randn(options.rows, WIDTH, generator=generator)
    database = ArrayDatabase(rows, ABOUT, styles)
    embeddings = torch.randn(options.pictures, WIDTH, generator=generator)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        folder.mkdir()
        photographs(folder, options.pictures)

        def made(images: FolderImages | SourceImages, retriever=None, **how: bool) -> TrainingSet:
            images.embed = lambda _, rows: embeddings[rows]  # type: ignore[method-assign]
            chosen = retriever or NearestNeighbors()
            return TrainingSet.of(images, RandomText(), database, chosen, K, progress=False, **how)

        memory = FolderImages(folder, options.size, progress=False)
        plain = made(memory)
        found["memory, plain"] = rate(plain, options)
        found["memory, augmented"] = rate(plain.augmented(Moved(2, 0.85), Mirrored()), options)
        modes = {"neighbors": 0.5, "text+neighbors": 0.4, "text": 0.1}
        texts = [f"a picture {i}" for i in range(options.pictures)]
        own = ["abcd"[i % 4] for i in range(options.pictures)]
        full = plain.captioned(texts, RandomText(), modes=modes, progress=False)
        full = full.grouped("style", 0.5, groups=own, progress=False).jittered()
        found["memory, captions, groups, jitter"] = rate(full, options)
        drawn = RandomOfTop(NearestNeighbors(), 4 * K)
        found["memory, searched at each step"] = rate(made(memory, drawn, per_step=True), options)
        kept = SourceImages(folder, options.size, cache=Path(name) / "kept", progress=False)
        found["mapped file, plain"] = rate(made(kept), options)
        demanded = SourceImages(folder, options.size, progress=False)
        plain = TrainingSet(demanded, embeddings, plain.table, database)
        for workers in options.workers:
            found[f"decoded by {workers} workers, plain"] = rate(plain, options, workers)
    print(f"{options.pictures} pictures of {options.size} pixels, batches of {options.batch_size}")
    for name, images in found.items():
        print(f"{name:40} {images:10,.0f} images/s")
    if options.json:
        print(json.dumps(found))
    if options.out:
        write_json(options.out, {**{k: v for k, v in vars(options).items() if k != "out"}, **found})


if __name__ == "__main__":
    main()
