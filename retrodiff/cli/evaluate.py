"""``retrodiff evaluate``: how good generated images are, and whether they copy."""

from __future__ import annotations

import argparse
from typing import Any

from retrodiff.cli import options as types


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a folder of generated images: quality, diversity, copies",
        description="Works for the images of any generator. Prints every number with what it was "
        "computed from, and writes report.html (pictures inside) and report.json into a folder.",
    )
    parser.add_argument("--images", type=types.path, required=True, help="generated images")
    parser.add_argument(
        "--reference",
        type=types.path,
        required=True,
        help="held-out real images: neither trained on nor in the database",
    )
    parser.add_argument(
        "--features",
        required=True,
        metavar="ENCODER",
        help="network of the features: open_clip:NAME:TAG, timm:NAME, or a folder; best another "
        "one than conditions the model",
    )
    parser.add_argument(
        "--training", type=types.path, help="training images, to look for copies of them"
    )
    parser.add_argument(
        "--database", type=types.path, help="a database, to look for copies of its rows"
    )
    parser.add_argument(
        "--out", type=types.new_folder, default="evaluation", help="folder of the report"
    )
    parser.add_argument("--device", type=types.device, default="cpu", help="of the network")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report there")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Reads, measures, writes."""
    from pathlib import Path

    from retrodiff.disk.files import check_free, plain_json, write_folder, write_json
    from retrodiff.encoders import encoder_from_string
    from retrodiff.evaluation import evaluate

    check_free(options.out, MARKER, options.overwrite, own_files)
    encoder = encoder_from_string(options.features, device=options.device)
    report = evaluate(
        options.images,
        options.reference,
        encoder,
        training=options.training,
        database=options.database,
    )

    def write(folder: Path) -> None:
        (folder / PAGE).write_text(report.html(), "utf-8")
        write_json(folder / MARKER, plain_json({"format": 1, **report.json()}))

    write_folder(options.out, write, marker=MARKER, own=own_files, overwrite=options.overwrite)
    for line in report.lines():
        print(line)
    print(f"look at {options.out}/{PAGE}")
    return 0


MARKER, PAGE = "report.json", "report.html"


def own_files(folder: Any) -> set[str]:
    """What an evaluation wrote into a folder."""
    return {MARKER, PAGE}
