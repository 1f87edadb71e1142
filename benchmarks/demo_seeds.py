"""The digits half of the demo with three seeds: the worst of each figure, beside its bound.

    python benchmarks/demo_seeds.py --seeds 0 1 2 --out runs/demo_seeds.json

Takes about three times as long as the digits half of ``make demo``.
"""

import argparse
import platform
import tempfile
from pathlib import Path

import torch

from retrodiff.demo import digits
from retrodiff.disk.files import write_json


def figures(report: dict) -> dict[str, float]:
    """The figures that have a bound, each the larger the better."""
    swap = report["swap"]
    return {
        **{f"accuracy.{name}": share for name, share in report["accuracy"].items()},
        "swap.share_allowed": swap["share_allowed"],
        "swap.draws_agree": 0.10 - abs(swap["share_before"] - swap["share_of_draws_before"]),
        "loss_gap.standard_errors": report["loss_gap"]["standard_errors"],
        "not_copying": 3 - report["copying"]["standard_errors_above"],
    }


BOUNDS = {
    "accuracy.neighbors": 0.95,
    "accuracy.text_neighbors": 0.95,
    "accuracy.class": 0.95,
    "accuracy.text": 0.92,
    "swap.share_allowed": 0.90,
    "swap.draws_agree": 0.0,
    "loss_gap.standard_errors": 3.0,
    "not_copying": 0.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_seeds.json"))
    options = parser.parse_args()
    reports = {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            reports[seed] = digits.run(Path(folder), digits.Settings(), seed).report
        print(seed, {k: round(v, 3) for k, v in figures(reports[seed]).items()}, flush=True)
    worst = {
        name: min(figures(report)[name] for report in reports.values())
        for name in figures(reports[options.seeds[0]])
    }
    print(f"{'figure':32}{'worst':>9}{'bound':>9}")
    for name, value in worst.items():
        bound = BOUNDS.get(name)
        verdict = "" if bound is None else f"{bound:9.2f}  {'met' if value >= bound else 'MISSED'}"
        print(f"{name:32}{value:9.3f}{verdict}")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    write_json(
        options.out,
        {"worst": worst, "bounds": BOUNDS, "seeds": reports, "versions": versions},
    )


if __name__ == "__main__":
    main()
