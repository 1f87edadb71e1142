"""A preset of one's own: parts plugged together with the builder, trained and asked.

    python examples/custom_preset.py --steps 500 --out runs/preset

Not the paper's UNet but a small transformer on pixels, flow matching in place of noise prediction,
neighbors that differ from each other, and guidance towards them.
"""

import argparse
from pathlib import Path

import torch

from retrodiff import Builder, Database, Encoder, preset, presets
from retrodiff.databases import Searchable
from retrodiff.diffusion import ClassifierFree, Dropped, FlowDenoiser, NeighborEmbeddings
from retrodiff.networks import DiT
from retrodiff.retrieval import Diverse, ExcludeSelf, NearestNeighbors
from retrodiff.training import TrainingSet, cosine, fit


@preset
def transformer_on_pixels(*, encoder: Encoder, database: Database, width: int = 128) -> Builder:
    """32x32 pixels in 64 patches; k = 4 diverse neighbors."""
    size, widths = (3, 32, 32), {"neighbors": encoder.dim}
    network = DiT(shape=size, patch=4, width=width, depth=4, heads=4, widths=widths)
    return (
        Builder()
        .encoder(encoder)
        .database(database)
        .retriever(ExcludeSelf(Diverse(NearestNeighbors(), diversity=0.3, top=20)))
        .conditioner(Dropped(NeighborEmbeddings("unit"), 0.1))
        .denoiser(FlowDenoiser(network))
        .guidance(ClassifierFree(2.0))
        .sampler("heun")
        .defaults(k=4, steps=20)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/preset"))
    options = parser.parse_args()

    shipped = presets.rdm_pictograms(pretrained=True)
    assert isinstance(shipped.database, Searchable)
    database = shipped.database.where("style == 'fluent'").subset(range(options.pictures))
    model = transformer_on_pixels(encoder=shipped.encoder, database=database, width=options.width)
    print(model)
    ids = torch.arange(len(database))  # the training images are its rows
    pictures = torch.stack([database.image(row) for row in ids.tolist()])[:, :, ::2, ::2]
    data = TrainingSet.of(pictures, model.encoder, database, model.retriever, model.k, ids=ids)
    lr = cosine(1e-3, options.steps)
    model = fit(model, data, steps=options.steps, batch_size=32, lr=lr, ema=0.99).model
    titles = [str(title) for title in database.column("title")[:: len(database) // 5]]
    model.sample(prompts=titles, mode="neighbors").save(options.out, overwrite=True)
