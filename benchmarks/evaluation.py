"""Figures of the evaluation: metrics against formulas, planted copies, bad generators, time.

    python benchmarks/evaluation.py metrics
    python benchmarks/evaluation.py copies
    python benchmarks/evaluation.py generators
    python benchmarks/evaluation.py speed

CIFAR-10 is read from a parquet file (``--cifar``, with a column ``image``), the pictograms from
what ``benchmarks/pictograms/data.py`` wrote (``--pictograms``; left out if not there). Features are
those of EfficientNet-Lite0 with its published weights (``benchmarks/lite0.py``).
Results go to ``benchmarks/results/evaluation_*.json``; the reports of ``generators`` to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lite0 import lite0
from torch import Tensor

from retrodiff.databases import Images
from retrodiff.evaluation import (
    authenticity,
    copying,
    density_coverage,
    evaluate,
    frechet_distance,
    inception_score,
    kernel_distance,
    mind,
    precision_recall,
    vendi,
)
from retrodiff.evaluation.planted import KINDS, plant
from retrodiff.evaluation.sets import ImageSet, planted_copies, read_source
from retrodiff.evaluation.views import Views
from retrodiff.model.generated import to_picture
from retrodiff.pictures import to_float, to_image

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Runs one of the four and writes its results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("metrics", "copies", "generators", "speed"))
    parser.add_argument("--cifar", type=Path, default=Path("data/cifar10-train.parquet"))
    parser.add_argument("--pictograms", type=Path, default=Path("runs/pictograms"))
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--size", type=int, default=96, help="side that images are resized to")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = globals()[options.what](options)
    found["features"] = f"tf_efficientnet_lite0, {options.size} pixels, {options.threads} threads"
    file = RESULTS / f"evaluation_{options.what}.json"
    file.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def metrics(options: argparse.Namespace) -> dict[str, Any]:
    """Relative difference of every metric to its formula in float64, on real features."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import evaluation_formulas as formulas

    encoder = lite0(options.size)
    pictures = cifar(options.cifar, 3000)
    a, b = (read("", part, Views(encoder)).features for part in (pictures[:1500], pictures[1500:]))
    logits = a @ torch.randn(1280, 10, generator=torch.Generator().manual_seed(0)) / 4
    precision, recall = precision_recall(a, b)
    density, coverage = density_coverage(a, b)
    pairs = {
        "Fréchet distance": (frechet_distance(a, b).value, formulas.frechet(a, b)),
        "KID": (kernel_distance(a, b, size=1500).value, formulas.kernel(a, b)),
        "inception score": (inception_score(logits).value, formulas.inception(logits)),
        "precision": (precision.value, formulas.covered(a.double(), b.double())),
        "recall": (recall.value, formulas.covered(b.double(), a.double())),
        "MIND": (mind(a, b).value, formulas.sliced(a, b, 1000, 0)),
        "density": (density.value, formulas.balls(a, b)[0]),
        "coverage": (coverage.value, formulas.balls(a, b)[1]),
        "Vendi": (vendi(a).value, formulas.entropy_of_kernel(a)),
        "AuthPct": (authenticity(a, b).value, formulas.authentic(a, b)),
    }
    return {
        name: {"value": value, "formula": formula, "relative": abs(value / formula - 1)}
        for name, (value, formula) in pairs.items()
    }


def copies(options: argparse.Namespace) -> dict[str, Any]:
    """Planted copies found, and false alarms, by kind of features and of comparison."""
    encoder = lite0(options.size)
    found: dict[str, Any] = {"CIFAR-10": _planted(cifar(options.cifar, 6000), 4000, 1000, encoder)}
    if options.pictograms.is_dir():
        pictures, training = pictograms(options.pictograms)
        held_out = (len(pictures) - training) // 2
        found["pictograms"] = _planted(pictures, training, held_out, encoder)
    return found


def _planted(pictures: list[Tensor], training: int, held_out: int, encoder: Any) -> dict[str, Any]:
    """Sensitivity, false alarms on the held-out images and on as many fresh ones."""
    views = Views(encoder, mirrored=True)
    cuts = (slice(0, training), slice(training, training + held_out), slice(-held_out, None))
    sets = [read(name, pictures[cut], views) for name, cut in zip("XHF", cuts, strict=True)]
    source, null, fresh = sets
    planted = planted_copies(source, views, n=100)
    report: dict[str, Any] = {
        "training": training,
        "held_out": held_out,
        "planted": sum(map(len, planted.values())),
    }
    pair = [(x.mirrored, null.mirrored) for x in (null, fresh)]
    told = copying(
        fresh.details, null.details, {"X": source.details}, planted={"X": planted}, mirrored=pair[1]
    )["X"]
    looser = told.looser()
    assert looser is not None
    report["details, times nearer"] = {
        "found": told.sensitivity,
        "false_alarms": told.null_rate,
        "false_alarms_fresh": told.rate,
        "by_kind": told.found(),
        "where_95_percent_are_found": {"fresh": looser[0], "held_out": looser[1]},
    }
    # What is won by each of the two: pooled features, and the plain cosine.
    images = [source.image(i) for i in _spread(training, 100)]
    generator = torch.Generator().manual_seed(0)
    pooled = {
        kind: encoder.encode_image(torch.stack([plant(i, kind, generator) for i in images]))
        for kind in KINDS
    }
    told = copying(fresh.features, null.features, {"X": source.features}, planted={"X": pooled})[
        "X"
    ]
    report["pooled features, times nearer"] = {
        "found": told.sensitivity,
        "false_alarms_fresh": told.rate,
        "by_kind": told.found(),
    }
    for name, x, h, kinds in (
        ("details, cosine", source.details, null.details, planted),
        ("pooled features, cosine", source.features, null.features, pooled),
    ):
        unit = torch.nn.functional.normalize
        keys = unit(x, dim=1)
        values = (unit(h, dim=1) @ keys.T).amax(1).sort(descending=True).values
        threshold = values[int(0.01 * (len(values) + 1)) - 1]
        by_kind = {
            kind: ((unit(c, dim=-1) @ keys.T).flatten(1).amax(1) > threshold).double().mean().item()
            for kind, c in kinds.items()
        }
        report[name] = {"found": sum(by_kind.values()) / len(by_kind), "by_kind": by_kind}
    return report


def generators(options: argparse.Namespace) -> dict[str, Any]:
    """A collapsed generator, a copying one and a perfect one, each with its report."""
    encoder = lite0(options.size)
    pictures = cifar(options.cifar, 3600)
    training, held_out, fresh = pictures[:2000], pictures[2000:2800], pictures[2800:]
    generator = torch.Generator().manual_seed(0)
    kinds = list(KINDS)
    copied = [plant(x, kinds[i % len(kinds)], generator) for i, x in enumerate(training[:800])]
    few = [plant(fresh[i % 3], kinds[i % len(kinds)], generator) for i in range(800)]
    folder = options.out
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    sets = {
        "training": training, "held-out": held_out,
        "perfect": fresh, "copying": copied, "collapsed": few,
    }  # fmt: skip
    for name, some in sets.items():
        (folder / "pictures" / name).mkdir(parents=True)
        for i, picture in enumerate(some):
            to_picture(picture).save(folder / "pictures" / name / f"{i:04d}.png")
    found: dict[str, Any] = {}
    for name in ("perfect", "copying", "collapsed"):
        report = evaluate(
            folder / "pictures" / name,
            folder / "pictures" / "held-out",
            encoder,
            training=folder / "pictures" / "training",
            progress=False,
        )
        report.save(folder / name, overwrite=True)
        found[name] = {
            "verdicts": {headline: verdict for headline, _, verdict in report.verdicts()},
            "scores": {score.name: score.value for score in report.scores},
            "real": {score.name: score.real for score in report.scores},
            "near_duplicates": report.copying["training"].rate,
            "held_out": report.copying["training"].null_rate,
            "planted_copies_found": report.copying["training"].sensitivity,
        }
    return found


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to evaluate 5,000 images against 5,000 real and 5,000 training images, 32x32."""
    pictures = cifar(options.cifar, 15_000)
    folder = options.out / "speed"
    for i, name in enumerate(("training", "held-out", "generated")):
        if not (folder / name).is_dir():
            (folder / name).mkdir(parents=True)
            for j, picture in enumerate(pictures[5000 * i : 5000 * (i + 1)]):
                to_picture(picture).save(folder / name / f"{j:04d}.png")
    started = time.perf_counter()
    encoder = lite0(options.size)
    places = [folder / name for name in ("generated", "held-out", "training")]
    report = evaluate(places[0], places[1], encoder, training=places[2])
    report.save(folder / "report", overwrite=True)
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 1), "images": 15_000, "lines": report.lines()}


def cifar(file: Path, n: int) -> list[Tensor]:
    """The first n pictures, (3, 32, 32) in [-1, 1]."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file).read(columns=["image"]).slice(0, n)
    return [to_float(to_image(picture.as_py())) for picture in table["image"]]


def pictograms(folder: Path) -> tuple[list[Tensor], int]:
    """Pictures (3, 64, 64) of three sets: those to train on, then others in random order."""
    import pyarrow.parquet as pq

    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for style in ("noto", "fluent", "twemoji"):
        table = pq.read_table(folder / f"{style}.parquet", columns=["image", "split"])
        for picture, split in zip(table["image"], table["split"], strict=True):
            parts[split.as_py() == "train"].append(to_float(to_image(picture.as_py())))
    order = torch.randperm(len(parts[False]), generator=torch.Generator().manual_seed(0))
    return [*parts[True], *(parts[False][i] for i in order)], len(parts[True])


def read(name: str, pictures: list[Tensor], views: Views) -> ImageSet:
    """Pictures with their features."""
    return read_source(name, Images(torch.stack(pictures)), views, progress=False)


def _spread(m: int, n: int) -> list[int]:
    return torch.linspace(0, m - 1, n).round().long().tolist()


if __name__ == "__main__":
    main()
