"""``retrodiff train``: a retrieval-augmented model on a folder of images."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrodiff.cli import options as types
from retrodiff.cli.train_data import Sets, make_sets, read_parts, validation
from retrodiff.cli.train_network import Network, build_network, read_network

if TYPE_CHECKING:
    from retrodiff.model import Model
    from retrodiff.training.watching import Watcher

MINUTES = 10.0
"""Time of a training where neither --steps nor --minutes is given."""
LOOKS = 10
"""Sample grids and held-out measurements of a training, at most, where no distance is given."""
RARELY = 100
"""Least steps between them, where steps are given: one of each takes as long as ten steps."""
MEASURED = 64
"""Held-out images that are measured."""
PASSED_ON = ("precision", "optimizer", "accumulate", "compile", "workers")
"""Options that `fit` gets only if they are given."""


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "train",
        help="train a model on a folder of images",
        description="Trains a retrieval-augmented model on a folder of images. OUT is the model; "
        "OUT.run shows the training while it goes on: sample grids, curves, metrics.csv and "
        "TensorBoard events.",
    )
    parser.add_argument("images", type=types.path, help="folder of training images")
    parser.add_argument("out", type=types.new_folder, help="folder of the model")
    parts = parser.add_argument_group("encoder and database")
    parts.add_argument(
        "--encoder",
        help="what D was built with: open_clip:NAME:TAG, timm:NAME or a folder, which "
        "retrodiff train-encoder makes; may be left out with --init",
    )
    parts.add_argument("--no-pretrained", action="store_true", help="random encoder weights")
    parts.add_argument(
        "--database",
        type=types.path,
        help="the database D; if not given: that of --init, or the training images themselves, as "
        "OUT.images.rdb, each without its own row (--exclude-self)",
    )
    parts.add_argument(
        "--exclude-self",
        action="store_true",
        help="leave each image's own row out of its neighbors, where the database holds it",
    )
    parts.add_argument(
        "--validation",
        type=validation,
        default=0.1,
        metavar="SHARE|FOLDER",
        help="held-out images: a share of the images (0: none), or a folder of others",
    )
    network = parser.add_argument_group("network")
    network.add_argument("--preset", metavar="NAME", help="of retrodiff.presets; else rdm_small")
    network.add_argument(
        "--config", type=types.path, metavar="FILE", help="yaml or json file of its arguments"
    )
    network.add_argument(
        "--init",
        type=types.path,
        metavar="MODEL",
        help="start from this trained model, which decides the network (fine-tuning)",
    )
    network.add_argument(
        "--first-stage",
        type=types.path,
        metavar="FOLDER",
        help="a trained one, which retrodiff train-autoencoder makes; else one is computed from "
        "the images",
    )
    network.add_argument("--size", type=types.integer(4), help="side of the images; else 32")
    network.add_argument("--channels", type=types.count, help="width of the network; else 96")
    network.add_argument("--k", type=types.count, help="neighbors per image; else 4")
    length = parser.add_argument_group("training")
    time = length.add_mutually_exclusive_group()
    time.add_argument("--steps", type=types.count, help="training steps")
    time.add_argument(
        "--minutes",
        type=types.real(above=0, most=1e6),
        help=f"time in place of steps, which are chosen by the measured speed; else {MINUTES:g}",
    )
    length.add_argument("--batch-size", type=types.count, default=32, help="images per step")
    length.add_argument(
        "--lr", type=types.real(most=1e6, above=0), default=1e-3, help="highest learning rate"
    )
    length.add_argument(
        "--ema",
        type=types.real(0, 1),
        nargs="+",
        default=[0.999],
        metavar="DECAY",
        help="decay of the weights' average, or several; else 0.999",
    )
    length.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the network's arithmetic; auto: bfloat16 where the device is fast in it",
    )
    length.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="muon",
        help="muon: Muon for matrices and kernels, AdamW for the rest (default: %(default)s)",
    )
    length.add_argument(
        "--accumulate",
        type=types.count,
        help="passes per step, of which each sees a part of the batch",
    )
    length.add_argument("--compile", action="store_true", default=None, help="use torch.compile")
    length.add_argument("--workers", type=types.integer(0), help="processes that read images")
    length.add_argument("--seed", type=types.seed, default=0, help="of everything random")
    length.add_argument(
        "--device", type=types.device, default="cpu", help="of encoder and network: cpu, cuda, mps"
    )
    shown = parser.add_argument_group("what is shown and kept")
    shown.add_argument(
        "--sample-every",
        type=types.integer(0),
        metavar="STEPS",
        help=f"steps between sample grids (0: none); else {LOOKS} in all",
    )
    shown.add_argument(
        "--validate-every",
        type=types.integer(0),
        metavar="STEPS",
        help=f"steps between held-out measurements (0: none); else {LOOKS} in all",
    )
    shown.add_argument(
        "--checkpoint-every", type=types.count, default=200, help="steps between checkpoints"
    )
    shown.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted training; --steps may be more than before",
    )
    shown.add_argument("--overwrite", action="store_true", help="replace an earlier model there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Reads, embeds, finds neighbors, trains, saves."""
    import torch

    from retrodiff.disk.files import place
    from retrodiff.model import Model
    from retrodiff.retrieval import NeighborCounts
    from retrodiff.training import FolderImages, cosine, fit, unfinished
    from retrodiff.training.run_folder import run_of

    out, network = place(options.out), read_network(options)
    settings = _settings(options, network)
    if _finished(out, options, settings):
        print(f"{out} was trained with these options already: nothing is left to do")
        return 0
    checkpoint = unfinished.checkpoint_of(out)
    parts = read_parts(options, out)
    torch.manual_seed(options.seed)
    model, images = build_network(
        network, parts, lambda size: FolderImages(options.images, size), options.device
    )
    sets = make_sets(options, images, model, parts.exclude_self)
    model = model.replace(proposal=NeighborCounts.from_table(sets.train.table, parts.database))
    fitting: dict[str, Any] = {
        "batch_size": options.batch_size,
        "ema": options.ema[0] if len(options.ema) == 1 else tuple(options.ema),
        "seed": options.seed,
        **_passed_on(options),
    }
    steps, every = _steps(options, out, model, sets, fitting)
    about = {"training": {**settings, "steps": steps}, "every": every}
    watch = _watchers(options, run_of(out), sets, every, about)
    if not (options.resume and unfinished.is_unfinished(out)):
        unfinished.begin(model, out)
    try:
        trained = fit(
            model,
            sets.train,
            steps=steps,
            lr=cosine(options.lr, steps, min(100, steps // 10)),
            checkpoint=checkpoint,
            checkpoint_every=options.checkpoint_every,
            resume=options.resume,
            overwrite=options.overwrite,
            watch=watch,
            **fitting,
        ).model
    finally:
        if not checkpoint.exists():
            unfinished.end(out)  # it has learned nothing that could be sampled
    if not (_may_be_saved(out, options) and unfinished.same_weights(trained, Model.load(out))):
        _save(trained, out, options, {**settings, "steps": steps})
    unfinished.end(out)
    _say_the_end(out, run_of(out), sets, steps, watch)
    return 0


# --- before any work -----------------------------------------------------------------------------


def _finished(out: Path, options: argparse.Namespace, settings: dict[str, Any]) -> bool:
    """Checks what is at the places to be written.

    Returns:
        Whether --resume finds that the model is trained already.
    """
    from retrodiff.checkpoints.native import MARKER, own_files, read_description
    from retrodiff.disk.files import check_free
    from retrodiff.training import unfinished
    from retrodiff.training.checkpoint import Checkpoint
    from retrodiff.training.run_folder import check_run, run_of

    if not (options.resume and unfinished.is_unfinished(out)):
        unfinished.check_beside(out)
    file = unfinished.checkpoint_of(out)
    state = Checkpoint(file, resume=options.resume, overwrite=options.overwrite).load()
    at_the_end = False
    if _may_be_saved(out, options):
        if state is None:
            extra = read_description(out).get("extra")
            before = extra.get("training") if isinstance(extra, dict) else None
            if isinstance(before, dict) and _same(before, settings):
                return True
        else:  # killed at the very end, perhaps with the model in its place
            at_the_end = state.done == state.run.get("steps")
            at_the_end &= options.steps in (None, state.done)
    if not at_the_end:
        check_free(out, MARKER, options.overwrite, own_files)
    kept = file.exists() or (out / MARKER).exists()
    check_run(run_of(out), resume=options.resume, overwrite=options.overwrite, kept=kept)
    return False


def _same(before: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a model was trained with these settings; a time stands for any number of steps."""
    free = {"steps"} if settings["steps"] is None else {"minutes"}
    mine, theirs = (
        {name: value for name, value in each.items() if name not in free}
        for each in (settings, before)
    )
    return mine == theirs


def _may_be_saved(out: Path, options: argparse.Namespace) -> bool:
    """Whether the training may have been killed between saving its model and cleaning up."""
    from retrodiff.checkpoints.native import MARKER

    return options.resume and not options.overwrite and (out / MARKER).is_file()


def _settings(options: argparse.Namespace, network: Network) -> dict[str, Any]:
    """The options that decide what is trained, as JSON-able values."""
    from retrodiff.disk.files import plain_json

    names = ("batch_size", "lr", "ema", "seed", "exclude_self", "validation", "steps", "minutes")
    settings = {name: getattr(options, name) for name in (*names, *PASSED_ON)}
    if settings["steps"] is None and settings["minutes"] is None:
        settings["minutes"] = MINUTES
    return plain_json({**network.settings(), **settings})


# --- training ------------------------------------------------------------------------------------


def _passed_on(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `fit` that are passed only if they are given."""
    return {name: value for name in PASSED_ON if (value := getattr(options, name)) is not None}


def _steps(
    options: argparse.Namespace,
    out: Path,
    model: Model,
    sets: Sets,
    fitting: dict[str, Any],
) -> tuple[int, int]:
    """Steps of the training and steps between looks at the model.

    Steps are given, or those of the training that goes on, or what the time allows.
    """
    from retrodiff.training import unfinished
    from retrodiff.training.checkpoint import read_state
    from retrodiff.training.grids import Grids
    from retrodiff.training.held_out import HeldOut
    from retrodiff.training.pace import measure_pace
    from retrodiff.training.run_folder import read_run, run_of

    if options.steps is not None:
        return options.steps, _often(options.steps)
    checkpoint = unfinished.checkpoint_of(out)
    if options.resume and checkpoint.exists():
        steps = int(read_state(checkpoint).run["steps"])
        every = (read_run(run_of(out)) or {}).get("every")
        return steps, every if isinstance(every, int) else _often(steps)
    minutes = MINUTES if options.minutes is None else options.minutes
    looks: list[Any] = []
    if sets.held_out is not None and options.validate_every != 0:
        looks.append(HeldOut(sets.held_out, 1, trained=sets.train, limit=MEASURED).measure)
    if options.sample_every != 0:
        shown = sets.train if sets.held_out is None else sets.held_out
        looks.append(Grids(run_of(out), shown, 1, trained=sets.train).draw)
    pace = measure_pace(model, sets.train, looks=looks, lr=options.lr, **fitting)
    steps, times = pace.steps(minutes, LOOKS)
    print(
        f"{minutes:g} minutes are about {steps:,} steps of {options.batch_size} images here; "
        f"--steps {steps} repeats this training"
    )
    return steps, -(-steps // times)


def _often(steps: int) -> int:
    """Steps between looks where a number of steps is given."""
    return max(RARELY, -(-steps // LOOKS))


def _watchers(
    options: argparse.Namespace, folder: Path, sets: Sets, usual: int, about: dict[str, Any]
) -> list[Watcher]:
    """What shows the training."""
    from retrodiff.training.grids import Grids
    from retrodiff.training.held_out import HeldOut
    from retrodiff.training.log import Log
    from retrodiff.training.outlook import Outlook

    sample_every, validate_every = (
        usual if every is None else every
        for every in (options.sample_every, options.validate_every)
    )
    held_out = grids = None
    if sets.held_out is not None and validate_every:
        held_out = HeldOut(sets.held_out, validate_every, trained=sets.train, limit=MEASURED)
    if sample_every:
        trained = None if sets.held_out is None else sets.train
        grids = Grids(folder, sets.held_out or sets.train, sample_every, trained=trained)
    log = Log(folder, held_out=held_out, grids=grids, about=about)
    watch = (held_out, grids, log, Outlook(len(sets.train), sets.size))
    return [watcher for watcher in watch if watcher is not None]


def _save(model: Model, out: Path, options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Saves the model with the options of its training."""
    from retrodiff.checkpoints.native import save_components

    parts = {field.name: getattr(model, field.name) for field in fields(model)}
    save_components(parts, out, overwrite=options.overwrite, extra={"training": settings})


def _say_the_end(out: Path, folder: Path, sets: Sets, steps: int, watch: list[Watcher]) -> None:
    """What was trained, how well, and where to look."""
    from retrodiff.training.grids import Grids
    from retrodiff.training.held_out import HeldOut
    from retrodiff.training.run_folder import CURVES

    for watcher in watch:
        if isinstance(watcher, HeldOut):
            print(watcher.summary())
    places = [str(w.file(steps)) for w in watch if isinstance(w, Grids)] + [str(folder / CURVES)]
    print(f"look at {' and '.join(places)}")
    print(f"trained on {len(sets.train)} images for {steps} steps: {out}")
