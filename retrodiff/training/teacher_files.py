"""Reads features of other networks from files: safetensors, or npz without objects."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.disk.tensors import map_file
from retrodiff.text import printable
from retrodiff.training.captioned import Captioned


def teacher_images(path: str | Path, captioned: Captioned) -> Tensor:
    """Features (n, f) of captioned pictures, in their order.

    Args:
        path: a file with ``features``, and ``names`` of the pictures where they have another order
            or number than the pictures in their source.
        captioned: the pictures.

    Raises:
        ValueError: a picture has no features in it.
    """
    features, names = _read(Path(path).expanduser())
    if names is None:
        if len(features) != captioned.count:
            raise ValueError(
                f"{path} has {len(features)} rows, but there are {captioned.count} pictures: add "
                "their names, or give one row for each in their order"
            )
        return features[captioned.numbers]
    row = {name: i for i, name in enumerate(names)}
    missing = [name for name in captioned.names if name not in row]
    if missing:
        raise ValueError(
            f"{path} has no features of {len(missing)} pictures, {printable(missing[0])} for "
            "example: its names must be those of the pictures"
        )
    return features[[row[name] for name in captioned.names]]


def teacher_texts(path: str | Path) -> tuple[list[str], Tensor]:
    """Texts and their features (m, g).

    Raises:
        ValueError: the file has no ``names``, the texts.
    """
    features, names = _read(Path(path).expanduser())
    if names is None:
        raise ValueError(f"{path} has features, but no names: which texts are they of?")
    return names, features


def _read(path: Path) -> tuple[Tensor, list[str] | None]:
    """``features`` and ``names`` of a file; in safetensors the names are JSON in its metadata."""
    if path.suffix.lower() == ".npz":
        values = _npz(path)
        found, names = values.get("features"), values.get("names")
        features = None if found is None else torch.from_numpy(np.ascontiguousarray(found))
        listed: Any = None if names is None else names.tolist()
    else:
        tensors, metadata = map_file(path)
        features = tensors.get("features")
        try:
            listed = json.loads(metadata["names"]) if "names" in metadata else None
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: names in its metadata are no JSON") from None
    if features is None or features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"{path} holds no features: floats (rows, width) under that name")
    if listed is None:
        return features.float(), None
    texts = isinstance(listed, list) and all(isinstance(name, str) for name in listed)
    if not texts or len(listed) != len(features):
        raise ValueError(f"{path}: names must be {len(features)} texts, one for each row")
    return features.float(), listed


def _npz(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give a file of features")
    try:
        with np.load(path, allow_pickle=False) as opened:
            return {name: opened[name] for name in opened.files}
    except (ValueError, OSError, zipfile.BadZipFile, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as npz: {reason}") from None
