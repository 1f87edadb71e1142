"""``retrodiff train``: a small retrieval-augmented model on a folder of images."""

from __future__ import annotations

import argparse
from typing import Any

from retrodiff.cli import options as types


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("train", help="train a small model on a folder of images")
    parser.add_argument("images", type=types.path, help="folder of training images")
    parser.add_argument("out", type=types.new_folder, help="folder of the model")
    parser.add_argument(
        "--database", type=types.path, required=True, help="folder of the database D"
    )
    parser.add_argument(
        "--encoder",
        required=True,
        help="what D was built with: open_clip:NAME:TAG, timm:NAME or a folder",
    )
    parser.add_argument("--no-pretrained", action="store_true", help="random encoder weights")
    parser.add_argument(
        "--size", type=types.integer(4), default=32, help="side of the images, a multiple of 4"
    )
    parser.add_argument("--channels", type=types.count, default=96, help="width of the network")
    parser.add_argument("--k", type=types.count, default=4, help="neighbors per image")
    parser.add_argument("--steps", type=types.count, default=2000, help="training steps")
    parser.add_argument("--batch-size", type=types.count, default=32, help="images per step")
    parser.add_argument(
        "--lr", type=types.real(above=0), default=1e-3, help="highest learning rate"
    )
    parser.add_argument(
        "--ema", type=types.real(0, 1), default=0.999, help="decay of the weights' average"
    )
    parser.add_argument(
        "--checkpoint-every", type=types.count, default=200, help="steps between checkpoints"
    )
    parser.add_argument("--seed", type=types.seed, default=0, help="of everything random")
    parser.add_argument(
        "--device", type=types.device, default="cpu", help="of encoder and network: cpu, cuda, mps"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier model there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Reads, embeds, finds neighbors, trains, saves."""
    import torch

    from retrodiff import presets
    from retrodiff.checkpoints.native import MARKER, own_files
    from retrodiff.databases import open_database
    from retrodiff.encoders import encoder_from_string
    from retrodiff.files import check_free, place
    from retrodiff.networks.principal import PrincipalPatches
    from retrodiff.retrieval import NearestNeighbors, NeighborCounts
    from retrodiff.training import TrainingSet, cosine, fit
    from retrodiff.training.folder import FolderImages

    out = place(options.out)
    check_free(out, MARKER, options.overwrite, own_files)
    checkpoint = out.with_name(out.name + ".training.safetensors")
    if checkpoint.exists() and not (options.resume or options.overwrite):
        raise FileExistsError(
            f"{checkpoint} is an unfinished training: continue it (--resume) or start anew "
            "(--overwrite)"
        )
    database = open_database(options.database)
    encoder = encoder_from_string(
        options.encoder, pretrained=not options.no_pretrained, device=options.device
    )
    images = FolderImages(options.images, options.size)
    some = images[torch.linspace(0, len(images) - 1, min(len(images), 2000)).long()]
    torch.manual_seed(options.seed)
    model = presets.rdm_small(
        encoder=encoder,
        first_stage=PrincipalPatches.fit(some, patch=4, components=16),
        database=database,
        size=options.size,
        channels=options.channels,
        k=options.k,
    ).to(options.device)
    data = TrainingSet.of(images, encoder, database, NearestNeighbors(), options.k)
    fitted = fit(
        model,
        data,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=cosine(options.lr, options.steps, min(100, options.steps // 10)),
        ema=options.ema,
        seed=options.seed,
        checkpoint=checkpoint,
        checkpoint_every=options.checkpoint_every,
        resume=options.resume,
    )
    proposal = NeighborCounts.from_table(data.table, database)
    fitted.model.replace(proposal=proposal).save(out, overwrite=options.overwrite)
    checkpoint.unlink()
    print(f"trained on {len(images)} images for {options.steps} steps: {out}")
    return 0
