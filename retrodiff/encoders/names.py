"""Finds the encoder that a text names: on a command line, in a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from retrodiff.disk.shipped import shipped
from retrodiff.encoders.clip import CLIPEncoder
from retrodiff.encoders.folder import load_encoder
from retrodiff.encoders.timm import TimmEncoder, timm_name
from retrodiff.text import printable

E = TypeVar("E", CLIPEncoder, TimmEncoder)

FORMS = "open_clip:NAME:TAG, timm:NAME, the folder of a saved encoder, or pictograms"
"""What a text may look like."""

OPTIONS = ("preprocessing", "image_size")
"""What may stand behind a name, after a comma."""


def encoder_from_string(
    text: str, *, pretrained: bool = True, device: torch.device | str = "cpu", **options: Any
) -> CLIPEncoder | TimmEncoder:
    """The encoder that a text names, as on a command line.

    Args:
        text: ``open_clip:NAME:TAG`` with the tag of its weights, or with a checkpoint file in its
            place; ``timm:NAME``, also with a tag (``timm:resnet18.a1_in1k``); either with
            ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER`` as NAME, of which open_clip needs no TAG.
            Or the folder of `save_encoder`, also as ``folder:PATH``, or the name of a model that
            comes in a package, such as ``pictograms``. Behind a name may stand
            ``,preprocessing=rdm`` and ``,image_size=384``.
        pretrained: False: random weights, the same ones each time, whatever the name says.
        device: where the weights live.
        **options: further arguments of the encoder, such as ``image_size`` or ``preprocessing``.

    Raises:
        ValueError: the name is unknown, or the options do not fit it.
        FileNotFoundError: there is no such folder.

    Examples:
        >>> encoder_from_string("timm:test_resnet,image_size=64", pretrained=False).dim
        96
    """
    named, options = _split(text, options)
    kind, _, rest = named.partition(":")
    if kind in ("hf-hub", "hf_hub") and rest.startswith("timm/"):
        kind, rest = "timm", named  # a page of timm's weights says so
    if kind == "open_clip" and rest:
        name, tag = _clip_parts(rest)
        if pretrained and not tag and ":" not in name:
            import open_clip

            tags = open_clip.list_pretrained_tags_by_model(name)
            some = f" (TAG is one of {', '.join(tags)})" if tags else ""
            raise ValueError(
                f"{text!r} names no weights: add a tag, open_clip:{name}:TAG{some}, or take random "
                "ones, pretrained=False (--no-pretrained)"
            )
        if not pretrained and ":" in name:
            raise ValueError(f"{text!r} brings its own weights: leave --no-pretrained out")
        tag = tag if pretrained else None
        return _seeded(lambda: CLIPEncoder(name, tag, device=device, **options))
    if kind == "timm" and rest:
        return _seeded(lambda: TimmEncoder(rest, pretrained, device=device, **options))
    folder = Path(rest if kind == "folder" and rest else text).expanduser()
    if (model := shipped(text)) is not None:
        folder = model / "encoder"
    if not folder.exists():
        raise FileNotFoundError(_unknown(text))
    if options:
        raise ValueError(f"{folder} is a saved encoder, its {', '.join(options)} cannot be changed")
    if not pretrained:
        raise ValueError(
            f"{folder} is a saved encoder with weights of its own: leave pretrained=False "
            "(--no-pretrained) out"
        )
    return load_encoder(folder, device=device)


def _split(text: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name, and the options together with those that stand behind it."""
    found: dict[str, Any] = {}
    while "," in text:
        start, _, last = text.rpartition(",")
        key, equals, value = last.partition("=")
        if not equals or key not in OPTIONS:
            break
        if key in found or options.get(key) is not None:
            raise ValueError(f"{key} of {start!r} is given twice")
        if key == "image_size" and not value.isdecimal():
            raise ValueError(f"image_size={value!r} of {start!r} is no whole number")
        found[key] = int(value) if key == "image_size" else value
        text = start
    return text, {**{k: v for k, v in options.items() if v is not None}, **found}


def _clip_parts(text: str) -> tuple[str, str | None]:
    """Model and tag of open_clip; one with a source has no tag."""
    source, _, rest = text.partition(":")
    if source in ("hf-hub", "local-dir"):
        return text, None
    return source, rest or None


def _unknown(text: str) -> str:
    """Why a text that is no existing folder names nothing, and what may have been meant."""
    shown = f"no encoder {printable(text[:200])!r}"
    if text.startswith(("hf-hub:", "hf_hub:")):
        return f"{shown}: say whose it is, timm:{text} or open_clip:{text}"
    bare = text.partition(":")[0].partition("/")[0]
    try:
        timm_name(text)
    except ValueError:
        pass
    else:
        return f"{shown}: do you mean timm:{text}?"
    import open_clip

    if bare in open_clip.list_models():
        return f"{shown}: do you mean open_clip:{text}?"
    return f"{shown}: give {FORMS}"


def _seeded(make: Callable[[], E]) -> E:
    """Random weights must be the same ones every time a name is given, or nothing would match."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()
