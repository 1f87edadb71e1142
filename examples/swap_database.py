"""One network, two databases: after the swap it paints with pictures that it was never trained on.

Trains a small model on patches of four photographs, then asks it the same way with the database it
was trained with and with one of two other photographs. Writes `swap.png`: query | neighbors |
samples, first half before the swap, second half after it.

    python examples/swap_database.py --out runs/swap
"""

import argparse
from pathlib import Path

import torch
from skimage import data as photographs

from retrodiff import Database, Model, build_database, presets
from retrodiff.databases import Images, Patchify, captions_of, contact_sheet
from retrodiff.encoders import TimmEncoder
from retrodiff.retrieval import NearestNeighbors, Uniform
from retrodiff.training import TrainingSet, cosine, fit

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/swap"))
parser.add_argument("--steps", type=int, default=1000, help="training steps")
parser.add_argument("--channels", type=int, default=64)
options = parser.parse_args()

patchify = Patchify(size=32, short_side=192, stride=16)


def halves(name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Patches of the left and of the right half of a photograph: no pixel is in both."""
    pixels = torch.from_numpy(getattr(photographs, name)().copy()).permute(2, 0, 1)
    middle = pixels.shape[-1] // 2
    left, _, _ = patchify.patches(pixels[..., :middle])
    right, _, _ = patchify.patches(pixels[..., middle:])
    return left, right


def of(names: list[str]) -> tuple[Images, torch.Tensor]:
    """What goes into a database, and what is asked (or trained on)."""
    patches, records, queries = [], [], []
    for name in names:
        left, right = halves(name)
        patches += left
        records += [{"file": name}] * len(left)
        queries += right
    return Images(patches, records), torch.stack(queries).float() / 127.5 - 1


library, training = of(["astronaut", "coffee", "rocket", "hubble_deep_field"])
others, asked = of(["chelsea", "retina"])

torch.manual_seed(0)
encoder = TimmEncoder("test_resnet", image_size=32)  # random weights: crude, but nothing to fetch
database = build_database(options.out / "library.rdb", library, encoder, thumbnails=32)
other = build_database(options.out / "others.rdb", others, encoder, thumbnails=32)

model = presets.rdm_small(encoder=encoder, database=database, channels=options.channels)
found = TrainingSet.of(training, encoder, database, NearestNeighbors(), model.k)
lr = cosine(1e-3, options.steps, warmup=min(30, options.steps // 2))
model = fit(model, found, steps=options.steps, batch_size=32, lr=lr, ema=0.99).model

swapped = model.replace(database=other, proposal=Uniform())  # the weights are the same


def rows(which: Model, images: torch.Tensor) -> tuple[list, list, list]:
    """Queries, neighbors with samples, and captions of a contact sheet."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:4]
    out = which.sample(images=images[chosen])
    again = which.sample(images=images[chosen], seed=1)
    shown = which.database
    assert isinstance(shown, Database)
    near = [[shown.image(row) for row in found] for found in out.neighbors.indices.tolist()]
    samples = [[a, b] for a, b in zip(out.images, again.images, strict=True)]
    pictures = [n + s for n, s in zip(near, samples, strict=True)]
    captions = [[*c, "sample", "sample"] for c in captions_of(out.neighbors)]
    return list(images[chosen]), pictures, captions


before, after = rows(model, training), rows(swapped, asked)
contact_sheet(*(a + b for a, b in zip(before, after, strict=True))).save(options.out / "swap.png")
print(f"look at {options.out / 'swap.png'}")
