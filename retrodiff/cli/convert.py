"""``retrodiff convert``: a published checkpoint becomes a folder of our own."""

from __future__ import annotations

import argparse
from typing import Any

from retrodiff.cli import options as types


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("convert", help="turn a published checkpoint into a saved model")
    parser.add_argument(
        "checkpoint", type=types.path, help=".ckpt or .safetensors, diffusers folder, Hub name"
    )
    parser.add_argument("out", type=types.new_folder, help="folder of the model")
    parser.add_argument("--config", type=types.path, help="yaml of the checkpoint")
    parser.add_argument(
        "--preset", help="rdm_imagenet, rdm_768, rarm_dogs and so on, instead of a yaml"
    )
    parser.add_argument(
        "--first-stage",
        type=types.path,
        help="file of the first stage, where it is a file of its own",
    )
    parser.add_argument("--scale", choices=("raw", "unit"), help="where the file does not say it")
    parser.add_argument(
        "--convert-scale",
        action="store_true",
        help="let a model of unit embeddings take databases of raw ones, divided by their norms",
    )
    parser.add_argument(
        "--encoder",
        help="what made the embeddings, so that prompts and images can be asked: "
        "open_clip:NAME:TAG, timm:NAME, or a folder; published presets know theirs",
    )
    parser.add_argument(
        "--database", type=types.path, help="of the model, so that it can look up neighbors"
    )
    parser.add_argument("--k", type=types.count, help="tokens that condition an image")
    parser.add_argument("--variant", help="of a diffusers folder's weight files, such as fp16")
    parser.add_argument("--raw-weights", action="store_true", help="not the averaged weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier model there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Loads, checks, saves."""
    from retrodiff import presets
    from retrodiff.builder import Builder
    from retrodiff.checkpoints.foreign.load import load_published
    from retrodiff.checkpoints.native import MARKER, own_files
    from retrodiff.databases import open_database
    from retrodiff.diffusion import NeighborEmbeddings
    from retrodiff.disk.files import check_free
    from retrodiff.encoders import encoder_from_string

    check_free(options.out, MARKER, options.overwrite, own_files)
    published = load_published(
        options.checkpoint,
        config=options.config,
        preset=options.preset,
        weights="raw" if options.raw_weights else "ema",
        first_stage=options.first_stage,
        variant=options.variant,
    )
    scale = published.agreed_scale(options.scale)
    if published.name in presets.__all__:
        recipe = Builder.from_preset(getattr(presets, published.name), checkpoint=published)
    else:
        recipe = presets.from_published(published, scale=scale)
    if options.encoder is not None:
        # The databases of this family were made without antialiasing and crop, whatever CLIP saw.
        rdm = options.encoder.startswith("open_clip:") and "preprocessing=" not in options.encoder
        given: dict[str, Any] = {"preprocessing": "rdm"} if rdm else {}
        recipe = recipe.encoder(encoder_from_string(options.encoder, **given))
    if options.database is not None:
        recipe = recipe.database(open_database(options.database))
    if options.k is not None:
        recipe = recipe.defaults(k=options.k)
    recipe = recipe.conditioner(NeighborEmbeddings(scale, convert=options.convert_scale))
    recipe.build().save(options.out, overwrite=options.overwrite)
    name = published.name or "a model of the published family"
    print(f"{name} with its {published.weights} weights: {options.out}")
    return 0
