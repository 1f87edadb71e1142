"""The folder that shows a training: metrics, curves, sample grids, TensorBoard events.

``retrodiff train IMAGES OUT`` writes it as ``OUT.run``, and leaves it when the training has ended.
``run.json`` marks it as such; what is not its own is never touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrodiff.disk.files import make_folder, plain_json, write_json

FORMAT = 1
MARKER = "run.json"
METRICS = "metrics.csv"
CURVES = "curves.png"
EVENTS = "events"
_OWN = re.compile(rf"{METRICS}|{CURVES}|samples-\d{{6,}}\.png|{EVENTS}/events\.out\.tfevents\..*")


def run_of(out: Path) -> Path:
    """The run folder of the training of a model."""
    return out.with_name(out.name + ".run")


def read_run(folder: Path) -> dict[str, Any] | None:
    """What ``run.json`` says; None: the folder is no run folder."""
    try:
        value = json.loads((folder / MARKER).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and "finished" in value else None


def check_run(folder: Path, *, resume: bool, overwrite: bool, kept: bool) -> None:
    """Refuses, before any work, a run folder that holds something else.

    Args:
        folder: the run folder to be.
        resume: a training that is recorded there goes on.
        overwrite: a record there may be replaced.
        kept: whether a checkpoint or a model stands beside it; the record of a training that left
            neither and did not finish is in nobody's way.

    Raises:
        FileExistsError: something else is there, or the record of another training.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    run = read_run(folder)
    if run is None:
        raise FileExistsError(
            f"{folder} exists and has no {MARKER}, so it is no record of a training: move it away, "
            "or give the model another name"
        )
    if not (resume or overwrite) and (kept or run["finished"]):
        raise FileExistsError(
            f"{folder} is the record of another training: give the model another name, or replace "
            "it (overwrite=True)"
        )


def begin_run(folder: Path, about: Mapping[str, Any], done: int) -> None:
    """Makes the folder; a training that starts anew removes what an earlier one wrote there."""
    make_folder(folder)
    if done == 0 and read_run(folder) is not None:
        for path in sorted(folder.glob("**/*")):
            if path.is_file() and _OWN.fullmatch(path.relative_to(folder).as_posix()):
                path.unlink()
    mark_run(folder, about, finished=False)


def mark_run(folder: Path, about: Mapping[str, Any], *, finished: bool) -> None:
    """Writes ``run.json``."""
    value = {"format": FORMAT, "finished": finished, **plain_json(dict(about))}
    write_json(folder / MARKER, value)
