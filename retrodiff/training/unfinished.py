"""What ``retrodiff train OUT`` keeps beside OUT until it has finished.

``OUT.training.safetensors`` is the checkpoint. ``OUT.training`` is the model as it was before the
first step, a folder like any saved model: with the checkpoint's weights it can be sampled while the
training goes on, and after it was interrupted or killed.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from retrodiff.checkpoints.native import MARKER, own_files
from retrodiff.disk.files import check_free
from retrodiff.model import Model
from retrodiff.training.fit import from_checkpoint
from retrodiff.training.objective import Objective


def checkpoint_of(out: Path) -> Path:
    """The checkpoint of the training of a model."""
    return out.with_name(out.name + ".training.safetensors")


def model_of(out: Path) -> Path:
    """The model as it was before the training."""
    return out.with_name(out.name + ".training")


def is_unfinished(out: Path) -> bool:
    """Whether a training of this model can be sampled from its checkpoint."""
    return checkpoint_of(out).is_file() and (model_of(out) / MARKER).is_file()


def begin(model: Model, out: Path) -> None:
    """Keeps the model that will be trained."""
    model.save(model_of(out), overwrite=True)


def check_beside(out: Path) -> None:
    """Refuses, before any work, to write where something else is."""
    check_free(model_of(out), MARKER, True, own_files)


def load_unfinished(out: str | Path, **components: Any) -> Model:
    """The model with what an unfinished training has learned so far: the averaged weights.

    Args:
        out: folder that the model will have.
        components: as for `Model.load`.

    Raises:
        FileNotFoundError: there is no unfinished training of it.
    """
    out = Path(out).expanduser()
    if not is_unfinished(out):
        raise FileNotFoundError(
            f"there is no unfinished training of {out}: {checkpoint_of(out)} and {model_of(out)} "
            "are what one leaves"
        )
    return from_checkpoint(Model.load(model_of(out), **components), checkpoint_of(out))


def same_weights(one: Model, other: Model) -> bool:
    """Whether what training changes is the same in two models, bit by bit."""
    mine, theirs = (Objective(model).state_dict() for model in (one, other))
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[name].cpu(), theirs[name].cpu()) for name in mine
    )


def end(out: Path) -> None:
    """Removes what was kept of a training that has finished, and nothing else; checkpoint last."""
    folder = model_of(out)
    if (folder / MARKER).is_file():
        for name in own_files(folder):
            (folder / name).unlink(missing_ok=True)
        for place in (folder / "encoder", folder):
            with suppress(OSError):
                place.rmdir()
    checkpoint_of(out).unlink(missing_ok=True)
