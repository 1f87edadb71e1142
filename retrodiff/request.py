"""What may be asked of a model: the modes of the paper, and what each of them needs."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor

from retrodiff.interfaces import Encoder, Mode, Query, TextEncoder

MODES: tuple[Mode, ...] = get_args(Mode)


def read_request(
    prompts: Sequence[str] | None,
    classes: Sequence[str] | None,
    images: Tensor | None,
    query: Query | None,
    n: int | None,
    mode: Mode | Sequence[Mode] | None,
) -> tuple[list[Mode], dict[str, Any]]:
    """What `Model.sample` was asked: one mode per image, and the one argument that was given.

    Raises:
        ValueError: none or several were given, or a mode does not go with them.
    """
    given: dict[str, Any] = {
        name: value
        for name, value in {
            "prompts": prompts,
            "classes": classes,
            "images": images,
            "query": query,
        }.items()
        if value is not None
    }
    if len(given) > 1 or (not given and n is None) or (given and n is not None):
        named = ", ".join([*given, *(["n"] if n is not None else [])]) or "none"
        raise ValueError(
            f"sample takes exactly one of prompts, classes, images, query and n, got {named}"
        )
    name, value = next(iter(given.items()), ("n", n))
    if isinstance(value, str):
        raise ValueError(f"{name} is one string, but a list is taken: [{value!r}]")
    total = value if isinstance(value, int) else len(cast("Sequence[Any]", value))
    if total < 1:
        raise ValueError(f"{name} asks for {total} images, but at least one is needed")
    defaults: dict[str, Mode] = {
        "prompts": "text+neighbors",
        "classes": "class",
        "images": "image",
        "query": "neighbors",
        "n": "unconditional",
    }
    mode = mode or defaults[name]
    modes: list[Mode] = [mode] * total if isinstance(mode, str) else list(mode)
    if len(modes) != total:
        raise ValueError(f"mode has {len(modes)} words for {total} rows of {name}")
    fitting: dict[str, tuple[Mode, ...]] = {
        "prompts": ("text", "text+neighbors", "neighbors"),
        "classes": ("class", "text", "text+neighbors", "neighbors"),
        "images": ("image",),
        "query": ("text", "text+neighbors", "neighbors"),
        "n": ("unconditional",),
    }
    for word in dict.fromkeys(modes):
        if word not in MODES:
            raise ValueError(f"unknown mode {word!r}: choose one of {', '.join(MODES)}")
        if word not in fitting[name]:
            raise ValueError(
                f"mode {word!r} does not go with {name}: give "
                f"{next(key for key, words in fitting.items() if word in words)}, or use "
                f"{' or '.join(fitting[name])}"
            )
    return modes, {name: value}


def encoded(
    name: str, value: Any, rows: list[int], encoder: Encoder | None, template: str
) -> Query:
    """Some rows of ``images``, ``prompts`` or ``classes`` as queries; equal prompts go together.

    Args:
        name: which of the three.
        value: the images (n, c, h, w), prompts or class names of all rows.
        rows: which of them.
        encoder: what places them.
        template: turns a class name into a prompt.

    Raises:
        ValueError: there is no encoder, or it takes no text.
    """
    if encoder is None:
        raise ValueError(f"{name} need an encoder and this model has none: set encoder=...")
    if name == "images":
        with torch.no_grad():
            return Query(encoder.encode_image(value[rows]), tuple(f"image {i}" for i in rows))
    if not hasattr(encoder, "encode_text"):
        raise ValueError(
            f"{name} need an encoder of text, but {type(encoder).__name__} has no text tower "
            "(no encode_text): use a CLIPEncoder, or ask with images="
        )
    prompts: list[str] = [value[i] for i in rows]
    if name == "classes":
        prompts = [template.format(c) for c in prompts]
    distinct = list(dict.fromkeys(prompts))
    with torch.no_grad():
        embedding = cast("TextEncoder", encoder).encode_text(distinct)
    at = torch.tensor([distinct.index(p) for p in prompts], device=embedding.device)
    return Query(embedding[at], tuple(prompts))
