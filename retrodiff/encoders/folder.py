"""Keeps an encoder of one's own in a folder: ``encoder.json`` and ``encoder.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from retrodiff.encoders.clip import CLIPEncoder
from retrodiff.encoders.fingerprint import weights_hash
from retrodiff.encoders.timm import TimmEncoder
from retrodiff.files import write_json, write_safetensors

E = TypeVar("E", CLIPEncoder, TimmEncoder)

FORMAT = 1


def save_encoder(encoder: CLIPEncoder | TimmEncoder, path: str | Path) -> None:
    """Writes the encoder's configuration, weights and fingerprint into a folder."""
    path = Path(path)
    module = encoder.model if isinstance(encoder, CLIPEncoder) else encoder.network
    write_safetensors(path / "encoder.safetensors", module.state_dict(), {"format": str(FORMAT)})
    config = {"format": FORMAT, **encoder.config(), "weights": encoder.fingerprint.weights}
    write_json(path / "encoder.json", config)


def load_encoder(
    path: str | Path, *, device: torch.device | str = "cpu"
) -> CLIPEncoder | TimmEncoder:
    """The encoder that `save_encoder` wrote; its weights are checked against their hash."""
    path = Path(path)
    config = _described(path)
    if config.pop("format") > FORMAT:
        raise ValueError(f"{path} has a newer format than {FORMAT}: upgrade retrodiff")
    kind, weights = config.pop("kind"), config.pop("weights")
    state = _weights(path / "encoder.safetensors")
    if (found := weights_hash(state)) != weights:
        raise ValueError(
            f"{path}: encoder.safetensors has weights {found}, encoder.json expects {weights}: "
            "the two files are not from one encoder"
        )
    config.pop("pretrained", None)  # whatever was downloaded then is in the folder now
    if kind == "clip":
        encoder = CLIPEncoder.from_config(config.pop("config"), device=device, **config)
    elif kind == "open_clip":
        encoder = CLIPEncoder(device=device, **config)
    elif kind == "timm":
        encoder = TimmEncoder(device=device, **config)
    else:
        raise ValueError(f"{path / 'encoder.json'}: unknown kind of encoder {kind!r}")
    module = encoder.model if isinstance(encoder, CLIPEncoder) else encoder.network
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: encoder.safetensors does not fit encoder.json, was one of them edited? "
            f"{reason:.500}"
        ) from error
    return encoder


def _described(path: Path) -> dict[str, Any]:
    file = path / "encoder.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no encoder.json: not a folder made by save_encoder")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): the file is damaged") from None
    if not (isinstance(config, dict) and {"format", "kind", "weights"} <= set(config)):
        raise ValueError(f"{file} does not describe an encoder: the file is damaged")
    return cast("dict[str, Any]", config)


def _weights(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: copy the whole folder")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size:,} bytes) is no safetensors file, or truncated: {error}"
        ) from error


def encoder_from_string(
    text: str, *, pretrained: bool = True, device: torch.device | str = "cpu", **options: Any
) -> CLIPEncoder | TimmEncoder:
    """The encoder that a command line names.

    Args:
        text: ``open_clip:NAME:TAG``, ``timm:NAME`` or a folder made by `save_encoder`.
        pretrained: False: random weights, whatever the name says.
        device: where the weights live.
        **options: further arguments of the encoder, such as ``image_size`` or ``preprocessing``.
    """
    kind, _, rest = text.partition(":")
    if kind == "open_clip" and rest:
        name, _, tag = rest.partition(":")
        if pretrained and not tag:
            raise ValueError(
                f"{text!r} names no weights: add a tag (open_clip:{name}:TAG) or --no-pretrained"
            )
        tag = tag if pretrained else None
        return _seeded(lambda: CLIPEncoder(name, tag, device=device, **options))
    if kind == "timm" and rest:
        return _seeded(lambda: TimmEncoder(rest, pretrained, device=device, **options))
    if not Path(text).exists():
        raise FileNotFoundError(
            f"no encoder {text!r}: give open_clip:NAME:TAG, timm:NAME or a folder of save_encoder"
        )
    if options:
        raise ValueError(f"{text} is a saved encoder, its {', '.join(options)} cannot be changed")
    return load_encoder(text, device=device)


def _seeded(make: Callable[[], E]) -> E:
    """Random weights must be the same ones every time a name is given, or nothing would match."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()
