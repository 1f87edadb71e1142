"""``retrodiff evaluate``: how good generated images are, and whether they copy."""

from __future__ import annotations

import argparse
from typing import Any

from retrodiff.cli import options as types
from retrodiff.cli.sample import add_settings


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure generated images: quality, diversity, copies",
        description="Works for the images of any generator (--images), or samples a model first "
        "(--model, --n). Prints every number with what it was computed from, and writes "
        "report.html (pictures inside) and report.json into a folder.",
    )
    given = parser.add_argument_group("what is measured")
    given.add_argument(
        "--images",
        type=types.path,
        help="generated images; with --model: the folder that they are written to",
    )
    given.add_argument("--model", type=types.path, help="folder of a saved model to sample first")
    given.add_argument(
        "--reference",
        type=types.path,
        required=True,
        help="held-out real images: neither trained on nor in the database; sub-folders are "
        "classes",
    )
    given.add_argument(
        "--features",
        required=True,
        metavar="ENCODER",
        help="network of the features: fidelity:NAME (such as fidelity:inception-v3-compat), "
        "timm:NAME, open_clip:NAME:TAG, or a folder; best another one than conditions the model",
    )
    given.add_argument(
        "--training", type=types.path, help="training images, to look for copies of them"
    )
    given.add_argument(
        "--database",
        type=types.path,
        help="a database, to look for copies of its rows and of the neighbors used; with --model: "
        "sample from it, too (the model's own if not given)",
    )
    given.add_argument(
        "--clip", metavar="ENCODER", help="encoder of text for the CLIP score: open_clip:NAME:TAG"
    )
    given.add_argument(
        "--judge",
        metavar="timm:NAME",
        help="ImageNet classifier for the class accuracy; else the nearest class mean of the "
        "reference",
    )
    given.add_argument(
        "--run",
        dest="training_run",
        type=types.path,
        help="folder of the training: its metrics.csv",
    )
    parser.add_argument(
        "--out", type=types.new_folder, default="evaluation", help="folder of the report"
    )
    parser.add_argument("--device", type=types.device, default="cpu", help="of the networks")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report there")
    sampling = parser.add_argument_group("sampling, with --model")
    asked = sampling.add_mutually_exclusive_group()
    asked.add_argument("--prompt", action="append", help="a text; may be given several times")
    asked.add_argument("--class", dest="classes", action="append", help="a class name; likewise")
    sampling.add_argument(
        "--n", type=types.count, default=512, help="images in all, or per prompt or class"
    )
    sampling.add_argument("--encoder", help="for a model that was saved without one")
    sampling.add_argument(
        "--from-checkpoint", action="store_true", help="of an unfinished training"
    )
    add_settings(sampling)
    parser.set_defaults(run=run, image=None, unconditional=True)


def run(options: argparse.Namespace) -> int:
    """Samples if asked to, reads, measures, writes."""
    from retrodiff.cli.sample import sampled
    from retrodiff.disk.files import check_free
    from retrodiff.encoders import encoder_from_string
    from retrodiff.evaluation import evaluate, features_from_string
    from retrodiff.evaluation.report import MARKER, own_files
    from retrodiff.evaluation.run_curves import read_curves

    if options.images is None and options.model is None:
        raise ValueError("nothing to measure: give --images, or --model to sample first")
    check_free(options.out, MARKER, options.overwrite, own_files)
    features = features_from_string(options.features, device=options.device)
    clip = (
        None if options.clip is None else encoder_from_string(options.clip, device=options.device)
    )
    judge = None if options.judge is None else _judge(options.judge)
    if options.training_run is not None:
        read_curves(options.training_run)  # before the long work
    images, database, conditioning = options.images, options.database, None
    if options.model is not None:
        _check_there(options.reference)
        images = f"{options.out}-samples" if images is None else images
        model, _ = sampled(options, str(images))
        conditioning = model.encoder if model.database is not None else None
        database = model.database if database is None else database
    assert images is not None
    report = evaluate(
        images,
        options.reference,
        features,
        training=options.training,
        database=database,
        conditioning=conditioning,
        clip=clip,
        judge=judge,
        run=options.training_run,
    )
    page = report.save(options.out, overwrite=options.overwrite)
    for line in report.lines():
        print(line)
    print(f"look at {page}")
    return 0


def _judge(text: str) -> Any:
    from retrodiff.evaluation import timm_judge

    if not text.startswith("timm:"):
        raise ValueError(f"--judge {text}: give a classifier of timm, timm:NAME")
    return timm_judge(text.removeprefix("timm:"))


def _check_there(path: str) -> None:
    from pathlib import Path

    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist: give a folder of held-out images")
