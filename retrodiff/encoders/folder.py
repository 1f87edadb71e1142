"""Saves a trained encoder as a folder (``encoder.json``, ``encoder.safetensors``), and loads it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from retrodiff.disk.budget import TooLarge, within
from retrodiff.disk.files import plain_json, write_folder, write_json
from retrodiff.disk.tensors import map_tensors, write_tensors
from retrodiff.disk.untrusted import inside, read_json
from retrodiff.encoders.cache import Cached
from retrodiff.encoders.clip import CLIPEncoder
from retrodiff.encoders.described import problem
from retrodiff.encoders.fingerprint import plain_state, weights_hash
from retrodiff.encoders.timm import TimmEncoder
from retrodiff.text import printable

FORMAT = 1
MARKER, WEIGHTS = "encoder.json", "encoder.safetensors"
OURS = ("format", "weights")
"""Entries of the description that are not arguments."""


def save_encoder(
    encoder: CLIPEncoder | TimmEncoder | Cached,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the encoder's configuration, weights and fingerprint into a folder.

    Args:
        encoder: to be kept; of a `Cached` one the encoder inside.
        path: the folder; it appears whole or not at all.
        dtype: type of the weights in the file, such as ``torch.float16``; None: their own. They are
            loaded into the encoder's own type; rounding makes them other weights, so build
            databases with the encoder that `load_encoder` gives.
        overwrite: replace an earlier encoder there.

    Returns:
        The folder.

    Raises:
        ValueError: an encoder of this kind cannot be kept.
        FileExistsError: there is something at the path, and ``overwrite`` is not given.
    """
    while isinstance(encoder, Cached):  # which changes no number
        encoder = cast("CLIPEncoder | TimmEncoder", encoder.encoder)
    if not isinstance(encoder, CLIPEncoder | TimmEncoder):
        raise ValueError(
            f"{type(encoder).__name__} cannot be kept in a folder: save_encoder takes CLIPEncoder "
            "and TimmEncoder"
        )
    module = encoder.model if isinstance(encoder, CLIPEncoder) else encoder.network
    state = plain_state(module)
    if dtype is not None:
        state = _narrowed(state, dtype)
    config = {**plain_json(encoder.config()), "weights": weights_hash(state)}
    reason = problem({k: v for k, v in config.items() if k not in (*OURS, "pretrained")})
    if reason is not None:
        warnings.warn(
            f"the encoder is saved, but no file may describe it ({reason}): load it with "
            "load_encoder(path, name=..., ...), which repeats that",
            stacklevel=2,
        )

    def write(folder: Path) -> None:
        write_tensors(folder / WEIGHTS, state, {"format": str(FORMAT)})
        write_json(folder / MARKER, {"format": FORMAT, **config})

    return write_folder(path, write, marker=MARKER, own=own_files, overwrite=overwrite)


def _narrowed(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of another floating type; whole numbers stay.

    Raises:
        ValueError: a weight is too large for it.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if tensor.is_floating_point() and bool((tensor.isfinite() & found[name].isinf()).any()):
            raise ValueError(f"{name} has values too large for dtype={dtype}: use torch.bfloat16")
    return found


def own_files(folder: Path) -> set[str]:
    """The files of an encoder's folder that `save_encoder` wrote."""
    del folder
    return {MARKER, WEIGHTS}


def load_encoder(
    path: str | Path, *, device: torch.device | str = "cpu", **confirmed: Any
) -> CLIPEncoder | TimmEncoder:
    """Loads the folder written by `save_encoder`; the weights are checked against their hash.

    Of what the folder says, only names that open_clip and timm know themselves are taken, and
    arguments of a fixed list (see `retrodiff.encoders.described`): nothing in it can fetch a file
    or run code.

    Args:
        path: the folder.
        device: where the weights live.
        **confirmed: arguments of the encoder that take the place of the folder's own. They are
            yours, so any is taken: ``name="hf-hub:OWNER/NAME"``.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: it is damaged, or describes what only a caller may ask for.
    """
    path = Path(path).expanduser()
    config = _described(path)
    kind, weights = config.pop("kind"), config.pop("weights")
    config = {k: v for k, v in config.items() if k not in confirmed and k != "pretrained"}
    if (reason := problem({"kind": kind, **config}, without=confirmed)) is not None:
        raise ValueError(
            f"{path / MARKER}: {reason}. A file cannot ask for that; if you know what it is, "
            "repeat it in code: load_encoder(path, name=..., ...)"
        )
    state = _weights(path)
    if (found := weights_hash(state)) != weights:
        raise ValueError(
            f"{path}: encoder.safetensors has weights {found}, encoder.json expects "
            f"{_shown(weights)}: the two files are not from one encoder"
        )
    encoder = _built(kind, {**config, **confirmed}, state, path, device)
    module = encoder.model if isinstance(encoder, CLIPEncoder) else encoder.network
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = printable(" ".join(str(error).split())[:500])
        raise ValueError(
            f"{path}: encoder.safetensors does not fit encoder.json, was one of them edited? "
            f"{reason}"
        ) from error
    return encoder


def named_encoder(config: Any) -> CLIPEncoder:
    """An encoder of published weights that a file names; they are fetched when it is first used.

    Args:
        config: what its ``config()`` returned.

    Raises:
        ValueError: it is none of open_clip's own models and weights.
    """
    reason = "it is no description of one"
    if isinstance(config, dict) and config.get("kind") == "open_clip":
        reason = problem(cast("dict[str, Any]", config))
        if reason is None and config.get("pretrained") is None:
            reason = "it names no weights"
    if reason is not None:
        raise ValueError(
            f"the encoder that the file names cannot be taken from a file: {reason}; pass it in "
            "code, encoder=..."
        )
    return CLIPEncoder(**{k: v for k, v in config.items() if k != "kind"})


def _built(
    kind: str,
    arguments: dict[str, Any],
    state: dict[str, Tensor],
    path: Path,
    device: torch.device | str,
) -> CLIPEncoder | TimmEncoder:
    try:
        with within(state, str(path)):
            if kind == "clip":
                return CLIPEncoder.from_config(arguments.pop("config"), device=device, **arguments)
            if kind == "open_clip":
                return CLIPEncoder(device=device, **arguments)
            return TimmEncoder(device=device, **arguments)
    except TooLarge as error:
        raise ValueError(
            f"{path}: encoder.safetensors does not fit encoder.json: {error}"
        ) from None
    except Exception as error:  # numbers that do not go together: whatever it raises, one line
        reason = printable(" ".join(str(error).split())[:300]) or type(error).__name__
        raise ValueError(
            f"{path / MARKER}: no encoder can be made from this description: {reason}"
        ) from error


def _described(path: Path) -> dict[str, Any]:
    if not (path / MARKER).is_file():
        raise FileNotFoundError(f"{path} holds no encoder.json: not a folder made by save_encoder")
    file = inside(path, MARKER)
    config = read_json(file, largest=1 << 20)
    if not (isinstance(config, dict) and {"format", "kind", "weights"} <= set(config)):
        raise ValueError(f"{file} does not describe an encoder: the file is damaged")
    number = config.pop("format")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{file} has the format {_shown(number)}: the file is damaged")
    if number > FORMAT:
        raise ValueError(f"{path} has a newer format than {FORMAT}: upgrade retrodiff")
    return cast("dict[str, Any]", config)


def _weights(path: Path) -> dict[str, Tensor]:
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"{path / WEIGHTS} is missing: copy the whole folder")
    state = map_tensors(inside(path, WEIGHTS), again="copy the folder again", hashed=False)
    for name, tensor in state.items():
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            raise ValueError(
                f"{path / WEIGHTS}: {_shown(name)} holds numbers that are not finite: the training "
                "diverged, or the file is damaged"
            )
    return state


def _shown(value: Any) -> str:
    text = printable(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
