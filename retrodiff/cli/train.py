"""``retrodiff train``: a small retrieval-augmented model on a folder of images."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrodiff.cli import options as types

if TYPE_CHECKING:
    from retrodiff.model import Model


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
        "--lr", type=types.real(most=1e6, above=0), default=1e-3, help="highest learning rate"
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
    parser.add_argument(
        "--exclude-self",
        action="store_true",
        help="leave each image's own row out of its neighbors, where the database holds it",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted training; --steps may be more than before",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier model there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Reads, embeds, finds neighbors, trains, saves."""
    import torch

    from retrodiff import presets
    from retrodiff.databases import open_database
    from retrodiff.disk.files import place
    from retrodiff.encoders import encoder_from_string
    from retrodiff.model import Model
    from retrodiff.networks.principal import PrincipalPatches
    from retrodiff.retrieval import ExcludeSelf, NearestNeighbors, NeighborCounts
    from retrodiff.training import FolderImages, TrainingSet, cosine, fit, unfinished

    out = place(options.out)
    if _finished(out, options):
        print(f"{out} was trained with these options already: nothing is left to do")
        return 0
    checkpoint = unfinished.checkpoint_of(out)
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
    nearest = NearestNeighbors()
    retriever = ExcludeSelf(nearest) if options.exclude_self else nearest
    data = TrainingSet.of(images, encoder, database, retriever, options.k)
    model = model.replace(proposal=NeighborCounts.from_table(data.table, database))
    lr = cosine(options.lr, options.steps, min(100, options.steps // 10))
    if not (options.resume and unfinished.is_unfinished(out)):
        unfinished.begin(model, out)
    try:
        trained = fit(
            model,
            data,
            steps=options.steps,
            batch_size=options.batch_size,
            lr=lr,
            ema=options.ema,
            seed=options.seed,
            checkpoint=checkpoint,
            checkpoint_every=options.checkpoint_every,
            resume=options.resume,
            overwrite=options.overwrite,
        ).model
    finally:
        if not checkpoint.exists():
            unfinished.end(out)  # it has learned nothing that could be sampled
    if not (_may_be_saved(out, options) and unfinished.same_weights(trained, Model.load(out))):
        _save(trained, out, options)
    unfinished.end(out)
    print(f"trained on {len(images)} images for {options.steps} steps: {out}")
    return 0


def _finished(out: Path, options: argparse.Namespace) -> bool:
    """Checks, before any work, what is at the places to be written.

    Returns:
        Whether --resume finds that the model is trained already.
    """
    from retrodiff.checkpoints.native import MARKER, own_files, read_description
    from retrodiff.disk.files import check_free
    from retrodiff.training import unfinished
    from retrodiff.training.checkpoint import Checkpoint

    if not (options.resume and unfinished.is_unfinished(out)):
        unfinished.check_beside(out)
    file = unfinished.checkpoint_of(out)
    state = Checkpoint(file, resume=options.resume, overwrite=options.overwrite).load()
    if _may_be_saved(out, options):
        if state is None:
            extra = read_description(out).get("extra")
            if isinstance(extra, dict) and extra.get("training") == _settings(options):
                return True
        elif state.done == options.steps:
            return False  # killed at the very end, perhaps with the model in its place
    check_free(out, MARKER, options.overwrite, own_files)
    return False


def _may_be_saved(out: Path, options: argparse.Namespace) -> bool:
    """Whether the training may have been killed between saving its model and cleaning up."""
    from retrodiff.checkpoints.native import MARKER

    return options.resume and not options.overwrite and (out / MARKER).is_file()


def _save(model: Model, out: Path, options: argparse.Namespace) -> None:
    """Saves the model with the options of its training."""
    from retrodiff.checkpoints.native import save_components

    parts = {field.name: getattr(model, field.name) for field in fields(model)}
    extra = {"training": _settings(options)}
    save_components(parts, out, overwrite=options.overwrite, extra=extra)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what is trained."""
    names = ("size", "channels", "k", "steps", "batch_size", "lr", "ema", "seed", "exclude_self")
    return {name: getattr(options, name) for name in names}
