"""From a folder of one's own to a model and its report, by the four commands, each timed.

    python benchmarks/own_folder.py --minutes 10

The folder is 600 pictograms of one set as PNG files (``benchmarks/pictograms/data.py`` gets them);
the reference are pictures of the same set in none of the 600. Everything else is a default.
Writes runs/own_folder and benchmarks/results/own_folder.json.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from retrodiff.disk.files import write_json


def main() -> None:
    """Writes the folders, runs the commands, keeps the times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/pictograms/fluent.parquet"))
    parser.add_argument("--out", type=Path, default=Path("runs/own_folder"))
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--size", type=int, default=32)
    options = parser.parse_args()
    if options.out.exists():
        shutil.rmtree(options.out)
    options.out.mkdir(parents=True)
    counts = write_folders(options)
    lines = {
        "encoder": "train-encoder photos encoder",
        "judge": "train-encoder photos judge --seed 1",
        "train": f"train photos model --encoder encoder --minutes {options.minutes:g} "
        f"--size {options.size}",
        "evaluate": "evaluate --model model --n 256 --reference unseen --features judge "
        "--training photos --run model.run --out report",
    }
    seconds: dict[str, float] = {}
    for name, line in lines.items():
        started = time.perf_counter()
        command = [sys.executable, "-m", "retrodiff", *line.split()]
        code = subprocess.run(command, cwd=options.out, check=False).returncode
        seconds[name] = round(time.perf_counter() - started, 1)
        print(f"retrodiff {line}: {seconds[name]} s, exit code {code}", flush=True)
        if code:
            sys.exit(code)
    metrics = (options.out / "model.run" / "metrics.csv").read_text("utf-8").splitlines()
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "processor": platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **counts,
        "commands": lines,
        "seconds": seconds,
        "metrics": [metrics[0], metrics[-1]],
    }
    write_json(Path("benchmarks/results/own_folder.json"), found)


def write_folders(options: argparse.Namespace) -> dict[str, int]:
    """The pictures of one's own, and unseen ones of the same kind."""
    import pyarrow.parquet as pq

    rows = pq.read_table(options.data).to_pylist()
    own = [row for row in rows if row["split"] == "train"]
    step = len(own) / options.pictures
    chosen = [own[int(i * step)] for i in range(options.pictures)]
    unseen = [row for row in rows if row["split"] != "train"]
    for folder, some in (("photos", chosen), ("unseen", unseen)):
        place = options.out / folder
        place.mkdir()
        for row in some:
            name = row["title"].replace("/", "-").replace(os.sep, "-").replace(" ", "_")
            (place / f"{name}.png").write_bytes(row["image"])
    return {"pictures": len(chosen), "unseen": len(unseen)}


if __name__ == "__main__":
    main()
