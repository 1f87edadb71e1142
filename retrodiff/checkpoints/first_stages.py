"""A first stage in a folder of its own: ``first_stage.json`` and its weights as safetensors.

It is described as in a saved model (see `retrodiff.checkpoints.native`), and read with the same
distrust: only this package's own components are made, from arguments that are compared first.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from retrodiff.checkpoints.descriptions import construct, describe, is_custom
from retrodiff.checkpoints.native import MARKER as MODEL
from retrodiff.checkpoints.native import read_description
from retrodiff.checkpoints.public import PACKAGE
from retrodiff.checkpoints.sharded import load_shards, save_sharded
from retrodiff.disk.files import check_free, place, plain_json, write_folder, write_json
from retrodiff.disk.untrusted import inside, read_json
from retrodiff.encoders.fingerprint import weights_hash
from retrodiff.interfaces import Autoencoder
from retrodiff.text import printable

FORMAT = 1
MARKER = "first_stage.json"
SHEET = "reconstructions.png"
SLOT = "autoencoder"


def save_autoencoder(
    autoencoder: Autoencoder,
    folder: str | Path,
    *,
    overwrite: bool = False,
    extra: Any = None,
    sheet: bytes | None = None,
) -> Path:
    """Writes a first stage as a folder, whole or not at all.

    Args:
        autoencoder: one of this package's.
        folder: to be written.
        overwrite: replace an earlier one there.
        extra: anything to keep beside it, as plain JSON values; see `read_extra`.
        sheet: a PNG that shows what it does, kept as ``reconstructions.png``.

    Returns:
        The folder.

    Raises:
        FileExistsError: something is there.
        ValueError: the autoencoder is of a class of one's own, which no file can bring back.
    """
    folder = place(folder)
    check_free(folder, MARKER, overwrite, own_files)
    weights: dict[str, Tensor] = {}
    described = describe(autoencoder, weights, SLOT)
    if is_custom(described):
        raise ValueError(
            f"{type(autoencoder).__name__} is no first stage of {PACKAGE}, so a folder could not "
            "bring it back: save its weights yourself"
        )
    value = {
        "format": FORMAT,
        "library": PACKAGE,
        SLOT: described,
        "extra": plain_json(extra),
    }

    def write(temporary: Path) -> None:
        save_sharded(weights, temporary, "first_stage", metadata={"format": str(FORMAT)})
        if sheet is not None:
            (temporary / SHEET).write_bytes(sheet)
        write_json(temporary / MARKER, value)

    return write_folder(folder, write, marker=MARKER, own=own_files, overwrite=overwrite)


def load_autoencoder(folder: str | Path) -> Autoencoder:
    """The first stage in a folder written by `save_autoencoder`, or that of a saved model.

    Args:
        folder: of either.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or describes something else; one line.
    """
    folder = Path(folder).expanduser()
    if not (folder / MARKER).exists() and (folder / MODEL).is_file():
        description = read_description(folder)["components"].get(SLOT)
        weights = load_shards(folder, "weights")
    else:
        description = _read(folder)[SLOT]
        weights = load_shards(folder, "first_stage")
    mine = {name: tensor for name, tensor in weights.items() if name.startswith(f"{SLOT}.")}
    found: Any = construct(description, Autoencoder, mine, SLOT)
    if hasattr(found, "eval"):
        found.eval()
    return found


def stage_fingerprint(autoencoder: Autoencoder) -> str:
    """What tells a first stage from every other: its class, its arguments and its weights.

    Returns:
        32 hexadecimal digits.
    """
    weights: dict[str, Tensor] = {}
    described = describe(autoencoder, weights, SLOT)
    text = json.dumps(described, sort_keys=True) + weights_hash(weights)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_extra(folder: str | Path) -> Any:
    """What `save_autoencoder` was given as ``extra``."""
    return _read(Path(folder).expanduser()).get("extra")


def own_files(folder: Path) -> set[str]:
    """The files of a folder that `save_autoencoder` wrote."""
    weights = re.compile(r"first_stage(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    return {MARKER, SHEET} | {
        file.name for file in folder.iterdir() if weights.fullmatch(file.name)
    }


def _read(folder: Path) -> dict[str, Any]:
    shown = printable(folder)
    if not (folder / MARKER).is_file():
        raise FileNotFoundError(
            f"{shown} holds no {MARKER} and no {MODEL}: it is neither a first stage that "
            "train-autoencoder or save_autoencoder wrote nor a saved model"
        )
    value = read_json(inside(folder, MARKER))
    if not isinstance(value, dict) or "format" not in value or SLOT not in value:
        raise ValueError(f"{shown}/{MARKER} does not describe a first stage: the file is damaged")
    value = cast("dict[str, Any]", value)
    if type(value["format"]) is not int or not 1 <= value["format"] <= FORMAT:
        raise ValueError(
            f"{shown} has format {printable(str(value['format'])[:20])}, but this version reads "
            f"format {FORMAT}: update {PACKAGE}"
        )
    return value
