"""``retrodiff demo``: a trained model and its databases, and a training from scratch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from retrodiff.cli import options as types


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "demo",
        help="sample a trained model from several databases, then train one from scratch",
    )
    parser.add_argument(
        "--out", type=types.new_folder, default="runs/demo", help="folder to be written"
    )
    parser.add_argument("--seed", type=types.seed, default=0, help="of everything random")
    parser.add_argument(
        "--swap-in",
        action="append",
        default=[],
        metavar="NAME=DATABASE",
        help="one more database for the pictograms, built with --encoder pictograms",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the demo and prints its table; 1 if the samples copy."""
    from retrodiff import demo

    more: dict[str, Path] = {}
    for given in options.swap_in:
        name, equals, folder = given.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--swap-in {given}: give a name and a database, with = between them")
        more[name] = Path(folder)
    settings = demo.Settings(pictograms=demo.pictograms.Settings(swapped_in=more))
    try:
        report = demo.run(
            options.out, seed=options.seed, settings=settings, overwrite=options.overwrite
        )
    except demo.CopyingError as error:
        print(f"retrodiff: {error}", file=sys.stderr)
        return 1
    print(demo.table(report))
    print(f"look at {options.out}/samples.png, demo.gif, attribution.png and digits.png")
    return 0
