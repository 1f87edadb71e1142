"""The autoregressive sibling on scanned digits: is the asked digit drawn, gray level by gray level?

    python benchmarks/rarm_digits.py --out runs/rarm_digits

Database, training images, small CLIP and judge are those of the demo; only the generator differs:
64 codes of 17 gray levels, a causal transformer that attends to 4 neighbors, cross-entropy. Writes
figures.json, samples.png (a row for each digit, a column for each sample of text + neighbors) and
the trained model. Two digits are never trained on, so they are neither asked nor counted.
"""

import argparse
import platform
import time
from pathlib import Path

import torch

from retrodiff.autoregressive import AutoregressiveGenerator, GrayLevels
from retrodiff.builder import Builder
from retrodiff.databases import EmbeddingDatabase, Images, build_database
from retrodiff.demo.digit_figures import Judge, copying, diversity
from retrodiff.demo.digit_scans import UNSEEN, WORDS, caption, split
from retrodiff.demo.digits import CLASS, Settings, clip_of
from retrodiff.diffusion import Dropped, NeighborEmbeddings
from retrodiff.disk.files import write_json
from retrodiff.encoders import load_encoder
from retrodiff.networks import CausalTransformer
from retrodiff.retrieval import NearestNeighbors
from retrodiff.training import TrainingSet, cosine, fit

BOUND = 0.85
SEEN = [digit for digit in range(10) if digit not in UNSEEN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--n", type=int, default=504, help="samples in each mode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encoder", type=Path, help="OUT/model/encoder of an earlier run")
    parser.add_argument("--out", type=Path, default=Path("runs/rarm_digits"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    parts = split(options.seed)
    if options.encoder is None:
        encoder = clip_of(parts, Settings(), options.seed, True)
    else:
        encoder = load_encoder(options.encoder)
    images, digits = parts.database
    records = [{"label": WORDS[digit]} for digit in digits.tolist()]
    path = options.out / "digits.rdb"
    source = Images(images.expand(-1, 3, -1, -1), records)
    build_database(path, source, encoder, thumbnails=8, overwrite=True)
    database = EmbeddingDatabase.at(path)

    torch.manual_seed(options.seed)
    network = CausalTransformer(
        codes=17,
        grid=(8, 8),
        width=options.width,
        depth=options.depth,
        heads=4,
        context_width=encoder.dim,
    )
    generator = AutoregressiveGenerator(
        network=network, autoencoder=GrayLevels(17), guidance=options.guidance
    )
    model = (
        Builder()
        .encoder(encoder)
        .database(database)
        .conditioner(Dropped(NeighborEmbeddings("unit"), 0.1))
        .generator(generator)
        .defaults(k=4, steps=64, class_top=20)
        .build()
    )
    data = TrainingSet.of(parts.training[0], encoder, database, NearestNeighbors(), model.k)
    began = time.perf_counter()
    fitted = fit(
        model,
        data,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=cosine(2e-3, options.steps, 50),
        ema=0.99,
        seed=options.seed,
        progress=True,
    )
    seconds = time.perf_counter() - began
    model = fitted.model
    model.save(options.out / "model", overwrite=True)

    judge = Judge(parts)
    asked = [SEEN[i % len(SEEN)] for i in range(options.n)]
    made = {
        mode: model.sample(
            prompts=[caption(digit) for digit in asked],
            mode=mode,
            seed=options.seed,
            batch_size=256,
        )
        for mode in ("text", "text+neighbors", "neighbors")
    }
    made["class"] = model.sample(
        classes=[CLASS.format(WORDS[digit]) for digit in asked], seed=options.seed, batch_size=256
    )
    accuracy = {mode: judge.share(out.images, asked) for mode, out in made.items()}
    whole = torch.cat([out.images for out in made.values()])
    report = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "training_images": len(data),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "guidance": options.guidance,
        "n_per_mode": options.n,
        "seconds_of_training": seconds,
        "judge_on_real_x": judge.share(parts.training[0], parts.training[1].tolist()),
        "accuracy": accuracy,
        "copying": copying(whole, parts),
        "diversity": {mode: diversity(out.images, asked, parts) for mode, out in made.items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    write_json(options.out / "figures.json", report)
    draw(made["text+neighbors"].images, options.out / "samples.png")
    for mode, share in accuracy.items():
        print(f"{mode:16}{share:8.3f}  bound {BOUND}  {'met' if share >= BOUND else 'MISSED'}")


def draw(images: torch.Tensor, path: Path, columns: int = 16, scale: int = 6) -> None:
    """Samples enlarged, with a black line between them: a row for each digit that was asked."""
    from PIL import Image

    rows = [images[i :: len(SEEN)][:columns, 0] for i in range(len(SEEN))]
    wide = torch.stack([torch.nn.functional.pad(r, (0, 1, 0, 1), value=-1) for r in rows])
    grid = wide.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    pixels = ((grid + 1) * 127.5).round().clamp(0, 255).byte()
    pixels = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    Image.fromarray(pixels.numpy(), "L").save(path)


if __name__ == "__main__":
    main()
