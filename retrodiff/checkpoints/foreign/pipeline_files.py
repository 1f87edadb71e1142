"""Which files hold the weights of a pipeline's parts: variants, shards, safetensors or pickles.

diffusers names a part's weights ``diffusion_pytorch_model.safetensors`` or ``.bin``; a variant such
as ``fp16`` stands before the ending, and large parts are cut into shards with an index.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from retrodiff.checkpoints.foreign.parsed import read_json

INDEX_BYTES = 16 * 1024**2
"""Largest index of shards: 100 bytes for each tensor."""

PARTS = ("unet", "vae", "vqvae")
NAME = "diffusion_pytorch_model"

_FILE = re.compile(rf"{NAME}(?:\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)")
_INDEX = re.compile(rf"{NAME}\.(?P<kind>safetensors|bin)\.index(?:\.(?P<variant>\w+))?\.json")

DESCRIPTIONS = ("model_index.json", "scheduler/*.json", *(f"{part}/*.json" for part in PARTS))
"""The configurations, and the indexes of shards."""


def weight_files(names: Iterable[str]) -> dict[tuple[str | None, str], str]:
    """Files that open the weights of a part, by variant (None: the full one) and kind.

    Args:
        names: of the files in the part's folder.
    """
    found: dict[tuple[str | None, str], str] = {}
    for name in sorted(names):
        match = _FILE.fullmatch(name) or _INDEX.fullmatch(name)
        if match is not None:  # an index comes before the single file that it replaces
            found.setdefault((match["variant"], match["kind"]), name)
    return found


def chosen(names: Iterable[str], folder: str, variant: str | None = None) -> str | None:
    """The file to open; None where there is no weight file at all.

    The full weights where they are there, else the only variant; safetensors before pickles.

    Args:
        names: of the files in the part's folder.
        folder: the part, for errors.
        variant: None: as above.

    Raises:
        FileNotFoundError: the variant is not there.
        ValueError: there are several variants to choose from.
    """
    files = weight_files(names)
    if not files:
        return None
    variants = sorted({name for name, _ in files if name is not None})
    if variant is None and not any(name is None for name, _ in files):
        if len(variants) > 1:
            raise ValueError(
                f"{folder} holds the weights in several variants and not in full: say "
                f"variant={' or variant='.join(map(repr, variants))}"
            )
        variant = variants[0]
    for kind in ("safetensors", "bin"):
        if (variant, kind) in files:
            return files[variant, kind]
    raise FileNotFoundError(
        f"{folder} has no weights of variant={variant!r}: it has "
        f"{', '.join(map(repr, variants)) or 'the full ones only, leave variant out'}"
    )


def missing_shards(opener: Path) -> list[str]:
    """Files that an index names and that are not beside it; none for a file that is no index.

    Raises:
        ValueError: the index is damaged, or names files elsewhere.
    """
    if opener.suffix != ".json":
        return []
    return [name for name in shards(opener) if not (opener.parent / name).is_file()]


def shards(index: Path) -> list[str]:
    """The files that an index names, each once.

    Raises:
        ValueError: the index is damaged, or names files elsewhere.
    """
    places = read_json(index, INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise ValueError(f"{index} is no index of weight files: it has no weight_map")
    files = sorted(set(cast("dict[str, str]", places).values()))
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"{index} names {file!r:.80}: shards lie beside their index")
    return files


def stages(variant: str | None = None) -> list[tuple[str, ...]]:
    """Patterns to fetch one after the other until a part has weights.

    Full weights before variants, unless a variant is asked for; safetensors before pickles.
    """
    kinds = ("safetensors", "bin")
    if variant is not None:
        return [
            tuple(
                f"{NAME}{form}.{kind}" for form in (f".{variant}", f".{variant}-*", f"-*.{variant}")
            )
            for kind in kinds
        ]
    full = [(f"{NAME}.{kind}", f"{NAME}-*-of-*.{kind}") for kind in kinds]
    return [*full, *((f"{NAME}*.{kind}",) for kind in kinds)]


def has_weights(folder: Path, variant: str | None = None) -> bool:
    """Whether a part's folder holds weights, with all their shards."""
    try:
        opener = chosen(present(folder), str(folder), variant)
    except FileNotFoundError:
        return False
    return opener is not None and not missing_shards(folder / opener)


def present(folder: Path) -> list[str]:
    """Names of the files in a part's folder."""
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
