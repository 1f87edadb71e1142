"""Study (f), on scanned digits, which have text: the demo's, trained with several seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from retrodiff.demo import digits

SEEDS = (0, 1, 2)
MODES = {"text": "text", "text_neighbors": "text + k-1 neighbors", "neighbors": "k neighbors"}
SETS = {
    "trained classes": "accuracy",
    "held-out, not in D": "before",
    "held-out, in D": "after",
}


def train(folder: Path, settings: Any = None, seeds: tuple[int, ...] = SEEDS) -> None:
    """Trains and judges the digits with each seed that is not there yet."""
    for seed in seeds:
        file = folder / f"seed {seed}.json"
        if not file.exists():
            work = folder / f"seed {seed}"
            work.mkdir(parents=True, exist_ok=True)
            report = digits.run(work, settings or digits.Settings(), seed).report
            from retrodiff.disk.files import write_json

            write_json(file, report)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The asked digit's share by set of classes, mode and seed."""
    found: list[dict[str, Any]] = []
    for file in sorted(folder.glob("seed *.json")):
        report = json.loads(file.read_text())
        unseen = report["unseen"]
        shares = {
            "accuracy": report["accuracy"],
            "before": unseen["before_they_are_in_D"],
            "after": unseen["after"],
        }
        for name, key in SETS.items():
            n = report["n_per_mode"] if key == "accuracy" else 100
            found += [
                {
                    "line": name,
                    "at": label,
                    "seed": int(file.stem.removeprefix("seed ")),
                    "share": shares[key][mode],
                    "n": n,
                }
                for mode, label in MODES.items()
            ]
    return found
