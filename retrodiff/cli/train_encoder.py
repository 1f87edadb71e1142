"""``retrodiff train-encoder``: a small image encoder trained on a folder, without any download."""

from __future__ import annotations

import argparse
from typing import Any

from retrodiff.cli import options as types


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "train-encoder",
        help="train a small image encoder on a folder of images, where none can be downloaded",
        description="Trains a timm network so that two crops of one image lie close (SimCLR). The "
        "folder it writes is what --encoder of the other commands takes. It knows images only, no "
        "text; with a published CLIP at hand, use that: open_clip:ViT-B-32-quickgelu:openai.",
    )
    parser.add_argument("images", type=types.path, help="folder of images")
    parser.add_argument("out", type=types.new_folder, help="folder of the encoder")
    parser.add_argument("--network", default="test_resnet", help="name of a timm network")
    parser.add_argument(
        "--size", type=types.integer(16, 512), default=32, help="side it sees, in pixels"
    )
    parser.add_argument("--steps", type=types.count, default=500, help="training steps")
    parser.add_argument("--batch-size", type=types.integer(2), default=64, help="images per step")
    parser.add_argument(
        "--lr", type=types.real(most=1e6, above=0), default=2e-3, help="highest learning rate"
    )
    parser.add_argument("--seed", type=types.seed, default=0, help="of everything random")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier encoder there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Reads, trains, saves."""
    from pathlib import Path

    import torch

    from retrodiff.encoders import TimmEncoder, save_encoder
    from retrodiff.training import cosine
    from retrodiff.training.contrastive import crop_and_flip, fit_views
    from retrodiff.training.folder_images import FolderImages

    out = Path(options.out)
    if out.exists() and not options.overwrite:
        raise FileExistsError(f"{out} exists: choose another folder, or add --overwrite")
    torch.manual_seed(options.seed)
    encoder = TimmEncoder(options.network, image_size=options.size, preprocessing="plain")
    images = FolderImages(options.images, options.size)
    if len(images) < 2:
        raise ValueError(f"{options.images} holds one image, but views of two or more are compared")
    losses = fit_views(
        encoder,
        images[torch.arange(len(images))],
        crop_and_flip,
        steps=options.steps,
        batch_size=min(options.batch_size, len(images)),
        lr=cosine(options.lr, options.steps, min(50, options.steps // 10)),
        seed=options.seed,
    )
    save_encoder(encoder, out, overwrite=options.overwrite)
    last = losses[-max(1, len(losses) // 10) :].mean()
    print(f"trained on {len(images)} images for {options.steps} steps (loss {last:.2f}): {out}")
    return 0
