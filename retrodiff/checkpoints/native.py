"""A model as a folder: one JSON that says what it is, safetensors for everything with numbers.

``model.json`` describes each component by its class and its constructor's arguments (nested, for
wrappers and networks). Loading constructs classes of this package only; a component of your own is
named in the file but never imported from it: hand it to `load` in its slot. Weights are in
``weights.safetensors`` under ``slot.parameter``, an encoder in a folder of its own that
`load_encoder` and the command line also read. The database is not copied: the file keeps its path
and fingerprint, and loading refuses another one. One that has no path (in memory, a view, another
program's table) has to be handed in again.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from retrodiff.checkpoints.shards import load_shards, save_sharded
from retrodiff.encoders.fingerprint import difference, known_fingerprint
from retrodiff.files import place, write_folder, write_json
from retrodiff.interfaces import Fingerprint

FORMAT = 1
MARKER = "model.json"
_PACKAGE = __name__.split(".")[0]


def describe(component: Any, weights: dict[str, Tensor], prefix: str) -> Any:
    """A component as plain JSON; its tensors go to ``weights`` under ``prefix``."""
    if component is None or isinstance(component, (bool, int, float, str)):
        return component
    if isinstance(component, (list, tuple)):
        items = cast("list[Any]", component)
        return [describe(x, weights, f"{prefix}.{i}") for i, x in enumerate(items)]
    if isinstance(component, dict):
        entries = cast("dict[str, Any]", component)
        return {key: describe(x, weights, f"{prefix}.{key}") for key, x in entries.items()}
    if isinstance(component, Tensor):
        weights[prefix] = component
        return {"tensor": prefix}
    kind = type(component)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__.split(".")[0] != _PACKAGE:
        if isinstance(component, nn.Module):
            weights.update({f"{prefix}.{k}": v for k, v in component.state_dict().items()})
        return {"custom": name}
    if isinstance(component, nn.Module):
        config = cast("dict[str, Any]", component.config())  # type: ignore[operator]
        own = getattr(component, "saved_state", component.state_dict)()
        state = {k: v for k, v in own.items() if not _inside(k, config)}
        if state:
            weights.update({f"{prefix}.{key}": tensor for key, tensor in state.items()})
    elif dataclasses.is_dataclass(component):
        config = {f.name: getattr(component, f.name) for f in dataclasses.fields(component)}
    else:
        return {"custom": name}
    inner = {key: describe(x, weights, f"{prefix}.{key}") for key, x in config.items()}
    return {"class": name, "config": inner}


def construct(description: Any, weights: Mapping[str, Tensor], prefix: str) -> Any:
    """The component that `describe` described."""
    if isinstance(description, list):
        items = cast("list[Any]", description)
        return [construct(x, weights, f"{prefix}.{i}") for i, x in enumerate(items)]
    if not isinstance(description, dict):
        return description
    entries = cast("dict[str, Any]", description)
    if set(entries) == {"tensor"}:
        if entries["tensor"] not in weights:
            raise ValueError(f"the saved weights lack {entries['tensor']}: copy the whole folder")
        return weights[entries["tensor"]]
    if "custom" in entries:
        name = entries["custom"]
        reason = (
            "holds what a file cannot describe"
            if name.split(".")[0] == _PACKAGE
            else f"is not part of {_PACKAGE} and is never imported from a file"
        )
        raise ValueError(
            f"{prefix} was saved as {name}, which {reason}: pass it as "
            f"load(..., {prefix.split('.')[0]}=...)"
        )
    if "class" not in entries:
        return {key: construct(x, weights, f"{prefix}.{key}") for key, x in entries.items()}
    kind = _class_named(entries["class"])
    config = {key: construct(x, weights, f"{prefix}.{key}") for key, x in entries["config"].items()}
    try:
        component = kind(**config)
    except TypeError as error:
        raise ValueError(
            f"{prefix} does not take what model.json hands it ({error}): was the file edited, or "
            f"written by another version of {_PACKAGE}?"
        ) from error
    if isinstance(component, nn.Module):
        state = {
            key.removeprefix(f"{prefix}."): tensor
            for key, tensor in weights.items()
            if key.startswith(f"{prefix}.") and not _inside(key.removeprefix(f"{prefix}."), config)
        }
        load_state(component, state, prefix, [k for k in config if _holds(config[k])])
    return component


def load_state(
    module: nn.Module, state: Mapping[str, Tensor], what: str, elsewhere: list[str] | None = None
) -> None:
    """Copies ``state`` into ``module``; names every missing, extra and misshapen tensor.

    Args:
        module: what receives the tensors.
        state: by parameter name.
        what: the module's name in the error.
        elsewhere: children that are filled by themselves.
    """
    own = getattr(module, "saved_state", module.state_dict)()
    skipped = tuple(f"{name}." for name in elsewhere or [])
    wanted = {k: v for k, v in own.items() if not k.startswith(skipped)} if skipped else own
    wrong = [f"missing {k}" for k in wanted if k not in state]
    wrong += [f"extra {k}" for k in state if k not in wanted]
    wrong += [
        f"{k} has shape {tuple(state[k].shape)} for {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    if wrong:
        shown = "; ".join(wrong[:10]) + (f"; and {len(wrong) - 10} more" if wrong[10:] else "")
        raise ValueError(
            f"the saved weights do not match {what} ({type(module).__name__}), {len(wrong)} "
            f"tensors: {shown}. Was the file written for another architecture?"
        )
    with torch.no_grad():
        for key, tensor in state.items():
            wanted[key].copy_(tensor)


def save_components(
    parts: Mapping[str, Any], folder: Path, *, overwrite: bool = False, extra: Any = None
) -> None:
    """Writes ``model.json`` and ``weights.safetensors``; the folder appears whole or not at all.

    Args:
        parts: component by slot.
        folder: to be written.
        overwrite: replace an earlier model there.
        extra: anything JSON-able to keep beside it.
    """
    from retrodiff.encoders import CLIPEncoder, TimmEncoder, save_encoder

    folder = place(folder)
    weights: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    encoder = parts.get("encoder")
    ours = isinstance(encoder, (CLIPEncoder, TimmEncoder))
    # Published weights that were never needed are not fetched for saving; their name is kept.
    fetched = getattr(encoder, "loaded", True)
    for slot, part in parts.items():
        if slot == "database":
            described[slot] = None if part is None else _database(part, folder)
        elif slot == "encoder" and ours:
            described[slot] = {"folder": slot} if fetched else {"name": encoder.config()}
        else:
            described[slot] = describe(part, weights, slot)

    def write(temporary: Path) -> None:
        if isinstance(encoder, (CLIPEncoder, TimmEncoder)) and fetched:
            save_encoder(encoder, temporary / "encoder")
        save_sharded(weights, temporary, "weights", metadata={"format": str(FORMAT)})
        value = {
            "format": FORMAT,
            "library": _PACKAGE,
            "components": described,
            "fingerprint": _fingerprint(encoder),
            "extra": extra,
        }
        write_json(temporary / "model.json", value)

    write_folder(folder, write, marker=MARKER, own=own_files, overwrite=overwrite)


def own_files(folder: Path) -> set[str]:
    """The files of a model's folder that `save_components` wrote."""
    weights = re.compile(r"weights(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    found = {file.name for file in folder.iterdir() if weights.fullmatch(file.name)}
    return {MARKER, "encoder/encoder.json", "encoder/encoder.safetensors"} | found


def read_description(folder: Path) -> dict[str, Any]:
    """``model.json`` of a saved model, its format checked."""
    file = folder / "model.json"
    if not file.is_file() and (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} is a diffusers pipeline and no saved model: hand it to a preset, "
            "presets.rdm_768(checkpoint=...), or to load_diffusers"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no model.json: it is not a saved model")
    try:
        value = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): the file is damaged") from None
    if not isinstance(value, dict) or "format" not in value:
        raise ValueError(f"{file} does not describe a saved model: it has no format number")
    value = cast("dict[str, Any]", value)
    if value["format"] != FORMAT:
        raise ValueError(
            f"{folder} has format {value['format']}, but this version reads format {FORMAT}: "
            f"update {_PACKAGE}"
        )
    if not isinstance(value.get("components"), dict):
        raise ValueError(f"{file} lists no components: the file is damaged")
    return value


def load_components(
    folder: Path, given: Mapping[str, Any] | None = None, *, token: str | None = None
) -> dict[str, Any]:
    """Component by slot; those in ``given`` take the place of the saved ones.

    A given component in a slot that was saved with a class of the user's own inside it is what that
    class could not be imported for: it is filled with the saved weights.

    Args:
        folder: of a saved model.
        given: component by slot.
        token: for a database on the Hub; None: the one of ``hf auth login``.
    """
    from retrodiff.encoders import CLIPEncoder, load_encoder

    given = given or {}
    value = read_description(folder)
    described: dict[str, Any] = value["components"]
    weights = load_shards(folder, "weights")
    extra = sorted(name for name in weights if name.split(".")[0] not in described)
    if extra:
        raise ValueError(
            f"the weights in {folder} have {len(extra)} tensors of no component: "
            f"{', '.join(extra[:10])}. Do they belong to its model.json?"
        )
    if given.get("encoder") is not None and value.get("fingerprint") is not None:
        _check_encoder(folder, given["encoder"], Fingerprint(**value["fingerprint"]))
    parts: dict[str, Any] = {}
    for slot, description in described.items():
        if slot in given:
            if _is_custom(description) and isinstance(given[slot], nn.Module):
                inside = {k: v for k, v in weights.items() if k.startswith(f"{slot}.")}
                state = {k.removeprefix(f"{slot}."): v for k, v in inside.items()}
                load_state(given[slot], state, slot)
            continue
        if slot == "database":
            parts[slot] = _reopened(description, folder, token)
        elif isinstance(description, dict) and set(description) == {"folder"}:
            parts[slot] = load_encoder(folder / description["folder"])
        elif isinstance(description, dict) and set(description) == {"name"}:
            parts[slot] = CLIPEncoder(
                **{k: v for k, v in description["name"].items() if k != "kind"}
            )
        else:
            parts[slot] = construct(description, weights, slot)
    return {**parts, **given}


def _class_named(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    if module.split(".")[0] != _PACKAGE or not attribute.isidentifier():
        raise ValueError(f"the file names the class {name!r}, which is not part of {_PACKAGE}")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        raise ValueError(
            f"the file names the class {name!r}, which this version of {_PACKAGE} does not have"
        ) from None
    if not (isinstance(kind, type) and (issubclass(kind, nn.Module) or _plain(kind))):
        raise ValueError(f"the file names {name!r}, which is no component")
    return kind


def _is_custom(description: Any) -> bool:
    """Whether a class of the user's own is anywhere in a description."""
    if isinstance(description, dict):
        entries = cast("dict[str, Any]", description)
        return "custom" in entries or any(_is_custom(value) for value in entries.values())
    return isinstance(description, list) and any(
        _is_custom(x) for x in cast("list[Any]", description)
    )


def _plain(kind: type) -> bool:
    return dataclasses.is_dataclass(kind)


def _holds(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _inside(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a state-dict key belongs to a child that is described (and saved) by itself."""
    child = key.split(".")[0]
    return child in config and _holds(config[child])


def _fingerprint(encoder: Any) -> Any:
    """What says whether another encoder is this one; None where there is nothing to compare."""
    return None if encoder is None else dict(vars(known_fingerprint(encoder)))


def _check_encoder(folder: Path, encoder: Any, saved: Fingerprint) -> None:
    differs = difference(encoder, saved)
    if differs is not None:
        raise ValueError(
            f"the encoder is not the one that the model in {folder} was saved with, {differs}: "
            "hand that one in, or change it knowingly: load(..., encoder=None).replace(encoder=...)"
        )


def shared_address(database: Any) -> str | None:
    """Where a database lies on the Hub, commit included; None: it does not."""
    address = getattr(database, "address", None)
    return address if isinstance(address, str) and address.startswith("hf:") else None


def _database(database: Any, folder: Path) -> Any:
    from retrodiff.databases import ArrayDatabase

    path = getattr(database, "path", None)
    if path is None:
        kind = type(database)
        if not isinstance(database, ArrayDatabase):  # that one cannot be expected to be anywhere
            warnings.warn(
                f"the model is saved without its database: a {kind.__name__} has no folder to be "
                "opened again from, so hand it in when you load the model, load(..., database=...)",
                stacklevel=4,
            )
        return {"custom": f"{kind.__module__}.{kind.__qualname__}"}
    mark = vars(database.fingerprint)
    if (address := shared_address(database)) is not None:
        return {"address": address, "fingerprint": mark}
    return {
        "path": str(Path(path).resolve()),
        "relative": os.path.relpath(Path(path).resolve(), folder.resolve()),
        "fingerprint": mark,
    }


def _reopened(description: Any, folder: Path, token: str | None) -> Any:
    """The database where it was, or at the same place relative to the model."""
    if description is None or "custom" in description:
        return None
    from retrodiff.databases import open_database

    saved = Fingerprint(**description["fingerprint"])
    if "address" in description:
        place = description["address"]
    else:
        places = (folder / description["relative"], Path(description["path"]))
        place = next((path for path in places if path.exists()), None)
    if place is None:
        raise FileNotFoundError(
            f"the model's database is neither at {description['path']} nor at "
            f"{description['relative']} beside the model: pass it as load(..., database=...)"
        )
    database = open_database(place, token=token)
    if database.fingerprint != saved:
        raise ValueError(
            f"the database at {place} is not the one the model was saved with "
            f"(rows={database.fingerprint.rows!r} against rows={saved.rows!r}): pass the "
            "right one as load(..., database=...)"
        )
    return database
