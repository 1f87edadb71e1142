"""Trains a small retrieval-augmented model on one folder of pictures, with another as database.

The two folders should hold different pictures: where an image is its own nearest neighbor, the
network learns to copy. Nearly what `retrodiff train` does, in Python, to be changed; that one adds
a first stage (`PrincipalPatches`) and draws from all of p_D.

    python examples/train_on_a_folder.py TRAINING LIBRARY --out runs/folder
"""

import argparse
from pathlib import Path

import torch

from retrodiff import build_database, presets
from retrodiff.databases import ImageFolder
from retrodiff.encoders import encoder_from_string
from retrodiff.retrieval import NearestNeighbors, NeighborCounts, TopM
from retrodiff.training import TrainingSet, cosine, fit
from retrodiff.training.folder_images import FolderImages

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("training", help="folder of training images, X")
parser.add_argument("library", help="folder of the images in the database, D")
parser.add_argument("--out", type=Path, default=Path("runs/folder"))
parser.add_argument("--encoder", default="open_clip:ViT-B-32-quickgelu:openai")
parser.add_argument("--no-pretrained", action="store_true", help="random encoder weights")
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--channels", type=int, default=64)
parser.add_argument("--steps", type=int, default=2000)
options = parser.parse_args()

torch.manual_seed(0)
encoder = encoder_from_string(options.encoder, pretrained=not options.no_pretrained)
database = build_database(
    options.out / "library.rdb", ImageFolder(options.library), encoder, thumbnails=64
)
model = presets.rdm_small(
    encoder=encoder, database=database, size=options.size, channels=options.channels
)
images = FolderImages(options.training, options.size)
data = TrainingSet.of(images, encoder, database, NearestNeighbors(), model.k)
trained = fit(
    model,
    data,
    steps=options.steps,
    batch_size=32,
    lr=cosine(1e-3, options.steps, warmup=min(100, options.steps // 10)),
    ema=0.999 if options.steps >= 2000 else 0.9,
    checkpoint=options.out / "training.safetensors",
    resume=True,
).model
counts = NeighborCounts.from_table(data.table, database)
trained = trained.replace(proposal=TopM(counts, fraction=0.5))
trained.save(options.out / "model")
trained.sample(n=16).save(options.out / "samples")
print(f"model and samples: {options.out}")
