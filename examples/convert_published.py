"""A checkpoint in the published layout becomes a folder of ours, and samples from it.

    python examples/convert_published.py MODEL.ckpt CONFIG.yaml OUT --scale raw

The published 256x256 models are ``raw``, the 768x768 one is ``unit``. Tokens here are random: with
CLIP at hand, ask for prompts instead, as in the documentation's page on published models.
"""

import argparse
from pathlib import Path

import torch

from retrodiff.checkpoints import load_compvis
from retrodiff.model import Model
from retrodiff.model.generated import to_picture
from retrodiff.presets import from_published


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", choices=("raw", "unit"))
    options = parser.parse_args(arguments)

    published = load_compvis(options.checkpoint, options.config)
    from_published(published, scale=options.scale).build().save(options.out / "model")

    model = Model.load(options.out / "model")
    seeded = torch.Generator().manual_seed(0)
    (stream, width), *_ = model.denoiser.widths.items()
    tokens = torch.randn(2, model.k, width, generator=seeded)
    noise = torch.randn(2, *model.denoiser.shape, generator=seeded)
    latents = model.sample_latents(context=tokens, noise=noise, steps=20, guidance=2.0)
    for i, image in enumerate(model.autoencoder.decode(latents)):
        to_picture(image).save(options.out / f"{i}.png")
    print(f"sampled from {stream} of width {width}: {options.out}")
    return options.out


if __name__ == "__main__":
    main()
