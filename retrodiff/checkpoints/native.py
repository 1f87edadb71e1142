"""Saves a model as a folder (one JSON file, and safetensors for weights), and loads it again.

``model.json`` describes each component by its public name and its constructor's arguments (nested,
for wrappers and networks; see `retrodiff.checkpoints.descriptions`). Loading constructs public
components of this package only, after their arguments and their weights have been compared; a
component of your own is named in the file but never imported from it: hand it to `load` in its
slot. Weights are in ``weights.safetensors`` under ``slot.parameter``, an encoder in a folder of its
own that `load_encoder` and the command line also read. The database is not copied: the file keeps
its place and fingerprint (see `retrodiff.checkpoints.database_place`), and loading refuses another
one. One that has no path (in memory, a view, another program's table) has to be handed in again.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from retrodiff.checkpoints.database_place import (
    DATABASE,
    copied_files,
    copy_database,
    described_copy,
    reopened,
)
from retrodiff.checkpoints.database_place import described as described_database
from retrodiff.checkpoints.descriptions import (
    arguments,
    arguments_from,
    describe,
    is_custom,
)
from retrodiff.checkpoints.public import PACKAGE
from retrodiff.checkpoints.sharded import load_shards, save_sharded
from retrodiff.checkpoints.state import fill, not_finite, own_state
from retrodiff.components import modules
from retrodiff.disk.files import check_free, place, plain_json, write_folder, write_json
from retrodiff.disk.shipped import SHIPPED
from retrodiff.disk.untrusted import inside, read_json
from retrodiff.encoders.fingerprint import difference
from retrodiff.interfaces import Encoder, Fingerprint, member
from retrodiff.text import printable

FORMAT = 2
"""Written; 1 (module paths in place of public names) is read, too."""

MARKER = "model.json"


def save_components(
    parts: Mapping[str, Any],
    folder: Path,
    *,
    overwrite: bool = False,
    include_database: bool = False,
    dtype: torch.dtype | None = None,
    extra: Any = None,
) -> Path:
    """Writes ``model.json`` and ``weights.safetensors``; the folder appears whole or not at all.

    Several processes may save to one path: they take turns.

    Args:
        parts: component by slot.
        folder: to be written.
        overwrite: replace an earlier model there.
        include_database: copy the database into the folder.
        dtype: of float32 weights in the file, encoders apart; None: their own. They are loaded as
            float32.
        extra: anything to keep beside it, as plain JSON values.

    Returns:
        The folder.
    """
    from retrodiff.encoders import Cached, CLIPEncoder, TimmEncoder, save_encoder
    from retrodiff.encoders.described import problem

    folder = place(folder)
    check_free(folder, MARKER, overwrite, own_files)
    weights: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    encoder: Any = parts.get("encoder")
    while isinstance(encoder, Cached):  # which changes no number
        encoder = encoder.encoder
    parts = {**parts, "encoder": encoder} if "encoder" in parts else parts
    ours = encoder if type(encoder) in (CLIPEncoder, TimmEncoder) else None
    # Published weights that were never needed are not fetched for saving; their name is kept.
    published = isinstance(ours, CLIPEncoder) and _only_named(ours)
    about: Any = None if ours is None else plain_json(ours.config())
    if published and (reason := problem(about)) is not None:
        warnings.warn(
            f"the model is saved without its encoder, whose weights are not here yet ({reason}): "
            "hand it in when you load the model, load(..., encoder=...)",
            stacklevel=3,
        )
    for slot, part in parts.items():
        if slot == "database" and include_database:
            described[slot] = described_copy(part)
        elif slot == "database":
            described[slot] = None if part is None else described_database(part, folder)
        elif slot == "encoder" and ours is not None:
            described[slot] = {"name": about} if published else {"folder": "encoder"}
        else:
            described[slot] = describe(part, weights, slot)
    if infinite := not_finite(weights):
        warnings.warn(
            f"weights that are not finite are saved, in {', '.join(infinite[:3])}: the model "
            "cannot be loaded again",
            stacklevel=3,
        )
    narrowed = [name for name, tensor in weights.items() if tensor.dtype == torch.float32]
    narrowed = [] if dtype in (None, torch.float32) else narrowed
    weights |= {name: weights[name].to(dtype) for name in narrowed}
    value = {
        "format": FORMAT,
        "library": PACKAGE,
        "components": described,
        "fingerprint": None if encoder is None else vars(member(encoder, Encoder, "identity")),
        "extra": plain_json(extra),
        **({"narrowed": str(dtype).removeprefix("torch.")} if narrowed else {}),
    }

    def write(temporary: Path) -> None:
        if ours is not None and not published:
            save_encoder(ours, temporary / "encoder")
        if include_database:
            copy_database(parts["database"], temporary)
        save_sharded(weights, temporary, "weights", metadata={"format": str(FORMAT)})
        write_json(temporary / MARKER, value)

    return write_folder(folder, write, marker=MARKER, own=own_files, overwrite=overwrite)


def own_files(folder: Path) -> set[str]:
    """The files of a model's folder that `save_components` wrote."""
    weights = re.compile(r"weights(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    found = {file.name for file in folder.iterdir() if weights.fullmatch(file.name)}
    found |= {MARKER, "encoder/encoder.json", "encoder/encoder.safetensors"}
    return found | (copied_files(folder) if _included(folder) else set())


def _included(folder: Path) -> bool:
    """Whether the database in a model's folder was copied there with the model."""
    try:
        return read_json(folder / MARKER)["components"]["database"]["path"] == DATABASE
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_description(folder: Path) -> dict[str, Any]:
    """``model.json`` of a saved model, its format checked."""
    file, shown = folder / MARKER, printable(folder)
    if not file.is_file() and (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{shown} is a diffusers pipeline and no saved model: hand it to a preset, "
            "presets.rdm_768(checkpoint=...), or to load_diffusers"
        )
    if not folder.exists():
        raise FileNotFoundError(
            f"{shown} does not exist: give the folder of a saved model, or the name of one with a "
            f"package ({', '.join(SHIPPED)})"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{shown} has no model.json: it is not a saved model")
    value = read_json(inside(folder, MARKER))
    if not isinstance(value, dict) or "format" not in value:
        raise ValueError(
            f"{shown}/{MARKER} does not describe a saved model: it has no format number"
        )
    value = cast("dict[str, Any]", value)
    if type(value["format"]) is not int or not 1 <= value["format"] <= FORMAT:
        raise ValueError(
            f"{shown} has format {printable(str(value['format'])[:20])}, but this version reads "
            f"formats 1 to {FORMAT}: update {PACKAGE}"
        )
    if not isinstance(value.get("components"), dict):
        raise ValueError(f"{shown}/{MARKER} lists no components: the file is damaged")
    return value


def load_components(
    folder: Path,
    given: Mapping[str, Any],
    model: type,
    *,
    token: str | None = None,
    trust_database: bool = False,
) -> dict[str, Any]:
    """Component by slot; those in ``given`` take the place of the saved ones.

    A given component in a slot that was saved with a class of the user's own inside it is what that
    class could not be imported for: it is filled with the saved weights.

    Args:
        folder: of a saved model.
        given: component by slot.
        model: the dataclass whose fields the slots are.
        token: for a database on the Hub; None: the one of ``hf auth login``.
        trust_database: open the database wherever the file says that it is.

    Raises:
        FileNotFoundError: there is no model, or a file of it is missing.
        ValueError: it is damaged, or does not fit; one line.
        PermissionError: the database is at a place that the caller has to confirm.
    """
    slots = arguments(model)
    if unknown := [name for name in given if name not in slots]:
        raise ValueError(f"a model has no {unknown[0]}: its parts are {', '.join(slots)}")
    value = read_description(folder)
    described: dict[str, Any] = value["components"]
    weights = load_shards(folder, "weights")
    if (narrow := value.get("narrowed")) is not None:
        wide = torch.float32
        weights = {
            name: tensor.to(wide) if str(tensor.dtype) == f"torch.{narrow}" else tensor
            for name, tensor in weights.items()
        }
    extra = sorted(name for name in weights if name.split(".")[0] not in described)
    if extra:
        raise ValueError(
            f"the weights in {printable(folder)} have {len(extra)} tensors of no component: "
            f"{printable(', '.join(extra[:10])[:500])}. Do they belong to its model.json?"
        )
    if given.get("encoder") is not None and value.get("fingerprint") is not None:
        saved = Fingerprint.from_json(value["fingerprint"], f"the fingerprint in {MARKER}")
        _check_encoder(folder, given["encoder"], saved)
    parts: dict[str, Any] = {}
    left: dict[str, Any] = {}
    for slot, description in described.items():
        if slot in given:
            if is_custom(description):
                _fill_given(given[slot], weights, slot)
        elif slot == "database":
            continue
        elif slot == "encoder" and isinstance(description, dict) and not is_custom(description):
            parts[slot] = _encoder(description, folder)
        else:
            left[slot] = description
    if "database" in described and "database" not in given:
        parts["database"] = reopened(
            described["database"], folder, token=token, trust=trust_database
        )
    # Large networks last, so that whatever is wrong elsewhere is said at once.
    heavy = {name.split(".")[0] for name in weights}
    left = dict(sorted(left.items(), key=lambda entry: entry[0] in heavy))
    parts |= arguments_from(left, model, weights, "", partial=True)
    needed = {name for name, (_, must) in slots.items() if must}
    if missing := needed - {*parts, *given}:
        raise ValueError(
            f"model.json describes no {', '.join(sorted(missing))}: the file is damaged"
        )
    return {**parts, **given}


def _fill_given(component: Any, weights: Mapping[str, Tensor], slot: str) -> None:
    """Copies saved weights into a component that was handed in, inside of wrappers, too."""
    mine: dict[str, Tensor] = {}
    describe(component, mine, slot)
    for module in modules(component):
        names = {tensor.data_ptr(): name for name, tensor in own_state(module).items()}
        for key, tensor in mine.items():
            if tensor.numel() and tensor.data_ptr() in names:
                at = key.removesuffix(names[tensor.data_ptr()])
                state = {k.removeprefix(at): v for k, v in weights.items() if k.startswith(at)}
                fill(module, state, at.removesuffix("."))
                break


def _encoder(description: dict[str, Any], folder: Path) -> Any:
    from retrodiff.encoders import load_encoder
    from retrodiff.encoders.folder import named_encoder

    if description == {"folder": "encoder"}:
        return load_encoder(inside(folder, "encoder"))
    if set(description) == {"name"}:
        return named_encoder(description["name"])
    raise ValueError(
        "the model's encoder is described by something else than its folder or its name: was "
        "model.json edited?"
    )


def _only_named(encoder: Any) -> bool:
    """Whether an encoder is known by its published name alone, its weights not here yet."""
    return not encoder.loaded and not Path(str(encoder.pretrained)).is_file()


def _check_encoder(folder: Path, encoder: Any, saved: Fingerprint) -> None:
    differs = difference(encoder, saved)
    if differs is not None:
        raise ValueError(
            f"the encoder is not the one that the model in {printable(folder)} was saved with, "
            f"{printable(differs)}: hand that one in, or change it knowingly: "
            "load(..., encoder=None).replace(encoder=...)"
        )
