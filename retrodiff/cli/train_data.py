"""What ``retrodiff train`` learns from: encoder, database, training images, held-out images."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrodiff.cli import options as types

if TYPE_CHECKING:
    from retrodiff.interfaces import Database, Encoder, Retriever
    from retrodiff.model import Model
    from retrodiff.training import TrainingSet
    from retrodiff.training.images import Images

THUMBNAILS = 64
"""Longest side of the small copies in a database that is made of the training images."""


@dataclass(frozen=True)
class Parts:
    """What a network is built for.

    Args:
        encoder: of the database.
        database: D.
        start: the trained model to start from; None: fresh weights.
        exclude_self: leave each image's own row out of its neighbors.
    """

    encoder: Encoder
    database: Database
    start: Model | None
    exclude_self: bool


@dataclass(frozen=True)
class Sets:
    """What a model is trained and measured on.

    Args:
        train: training images with their neighbors.
        held_out: images that are not trained on; None: there are none.
        size: side of the images, in pixels.
    """

    train: TrainingSet
    held_out: TrainingSet | None
    size: int


def validation(text: str) -> float | str:
    """A share in [0, 1), or a folder."""
    try:
        share = float(text)
    except ValueError:
        return types.path(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(
            f"{text} is no share from 0 up to, not including, 1; a folder of that name is ./{text}"
        )
    return share


def read_parts(options: argparse.Namespace, out: Path) -> Parts:
    """What is given, what the model to start from has, or a database of the images themselves.

    Args:
        options: of the command line.
        out: where the model will be; a database that is made stands beside it.
    """
    from retrodiff.databases import ImageFolder, build_database, open_database
    from retrodiff.encoders import encoder_from_string
    from retrodiff.model import Model

    given: dict[str, Any] = {}
    if options.database is not None:
        given["database"] = open_database(options.database)
    if options.encoder is not None:
        given["encoder"] = encoder_from_string(
            options.encoder, pretrained=not options.no_pretrained, device=options.device
        )
    start = None if options.init is None else Model.load(options.init, **given)
    own = {} if start is None else {"encoder": start.encoder, "database": start.database}
    encoder: Encoder | None = {**own, **given}.get("encoder")
    database: Database | None = {**own, **given}.get("database")
    if encoder is None:
        raise ValueError(
            "no encoder=... is given: name one that is downloaded once, such as "
            "open_clip:ViT-B-32-quickgelu:openai or timm:resnet18, or train a small one on your "
            f"images first: retrodiff train-encoder {options.images} {out.name}-encoder"
        )
    if database is not None:
        return Parts(encoder, database, start, options.exclude_self)
    place = out.with_name(out.name + ".images.rdb")
    print(
        f"no --database is given: neighbors are looked up among the images of {options.images} "
        f"themselves, each without its own row; the database is {place}"
    )
    made = build_database(
        place,
        ImageFolder(options.images),
        encoder,
        thumbnails=THUMBNAILS,
        resume=True,
        overwrite=options.overwrite,
    )
    return Parts(encoder, made, start, exclude_self=True)


def make_sets(
    options: argparse.Namespace, images: Images, model: Model, exclude_self: bool
) -> Sets:
    """Training images and held-out images with their neighbors.

    Args:
        options: of the command line.
        images: of the folder, in the size of the model.
        model: whose encoder, database and k are used.
        exclude_self: leave each image's own row out.
    """
    import torch

    from retrodiff.retrieval import ExcludeSelf, NearestNeighbors
    from retrodiff.training import FolderImages, TrainingSet
    from retrodiff.training.splitting import split

    database, encoder, k = model.database, model.encoder, model.k
    assert database is not None
    assert encoder is not None
    if k > len(database) - exclude_self:
        own = " besides the image's own" if exclude_self else ""
        raise ValueError(
            f"k={k} neighbors of each image, but the database has "
            f"{len(database) - exclude_self} rows{own}: lower k, or use a larger database"
        )
    if len(images) == 1:
        raise ValueError(
            f"{options.images} holds one image, and a model can only repeat it: give some hundreds"
        )
    size = int(images[torch.zeros(1, dtype=torch.int64)].shape[-1])
    if isinstance(options.validation, str):
        train, held_out = images, FolderImages(options.validation, size)
    else:
        train, held_out = split(images, options.validation, options.seed)
    if len(train) < k:
        raise ValueError(
            f"{len(train)} training images are fewer than k={k} neighbors of each: give more "
            "images, or lower k"
        )
    nearest = NearestNeighbors()
    retriever: Retriever = ExcludeSelf(nearest) if exclude_self else nearest
    found = TrainingSet.of(train, encoder, database, retriever, k)
    if held_out is None:
        return Sets(found, None, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was said of the training images
        measured = TrainingSet.of(held_out, encoder, database, retriever, k, progress=False)
    return Sets(found, measured, size)
