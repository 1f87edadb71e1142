"""Reads what is asked of a model: one mode per image, and numbers in their ranges.

Everything that can be wrong about a request is found here, before anything is encoded or sampled.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from torch import Tensor

from retrodiff.interfaces import Mode, Query
from retrodiff.numbers import LARGEST_SEED, real, whole
from retrodiff.pictures.converting import to_images

Kind = Literal["prompts", "classes", "images", "query", "n"]

MODES: tuple[Mode, ...] = get_args(Mode)
FITTING: Mapping[str, tuple[Mode, ...]] = {
    "prompts": ("text+neighbors", "text", "neighbors"),
    "classes": ("class", "text", "text+neighbors", "neighbors"),
    "images": ("image",),
    "query": ("neighbors", "text", "text+neighbors"),
    "n": ("unconditional",),
}
"""Modes that go with each kind of request, the default first."""

ELSEWHERE = {
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "num_inference_steps": "steps",
    "num_steps": "steps",
    "prompt": "prompts",
    "image": "images",
    "label": "classes",
    "init_image": "start",
    "denoising_strength": "strength",
    "generator": "seed",
    "scheduler": "sampler",
    "num_images": "n",
    "num_samples": "n",
}
"""What other libraries call the arguments of `Model.sample`."""


@dataclass(frozen=True, eq=False)
class Request:
    """What `retrodiff.Model.sample` was asked for, checked.

    Args:
        kind: which argument says what is asked.
        value: its value: texts, a list of images (c, h, w), a Query, or a number.
        modes: one per image.
        k: tokens that condition an image.
        steps: of the sampler.
        seed: of everything random.
        batch_size: images per network call.
        start: an image (c, h, w) for each, that is edited; empty: images begin as noise.
        strength: how much of each is redone, 0 to 1.
    """

    kind: Kind
    value: Any
    modes: tuple[Mode, ...]
    k: int
    steps: int
    seed: int
    batch_size: int
    start: tuple[Tensor, ...] = ()
    strength: float = 1.0

    def __len__(self) -> int:
        return len(self.modes)


def read_request(
    given: Mapping[str, Any],
    mode: Mode | Sequence[Mode] | None,
    *,
    k: Any,
    steps: Any,
    seed: Any,
    batch_size: Any,
    start: Any = None,
    strength: Any = None,
) -> Request:
    """The request that the arguments of `Model.sample` make.

    Args:
        given: ``prompts``, ``classes``, ``images``, ``query`` and ``n``, all but one None.
        mode: one word, one per image, or None for the default of the kind.
        k: 0 or more.
        steps: 1 or more.
        seed: 0 to 2⁶⁴ - 1.
        batch_size: 1 or more.
        start: one picture for all images, or one for each; None: images begin as noise.
        strength: 0 to 1, beside ``start`` only.

    Raises:
        ValueError: none or several were given, a mode does not go with them, or a value is of the
            wrong type or out of range.
    """
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(
            "sample takes exactly one of prompts, classes, images, query and n, got "
            f"{', '.join(named) or 'none'}"
        )
    kind = cast("Kind", named[0])
    numbers = {
        "k": whole("k", k, 0),
        "steps": whole("steps", steps),
        "seed": whole("seed", seed, 0, LARGEST_SEED),
        "batch_size": whole("batch_size", batch_size),
    }
    value, total = _value(kind, given[kind])
    if total < 1:
        raise ValueError(f"{kind} asks for {total} images, but at least one is needed")
    edited = _edited(start, strength, total)
    return Request(kind, value, _modes(kind, total, mode), **numbers, **edited)


def refuse_unknown(arguments: Mapping[str, Any], known: Sequence[str]) -> None:
    """One line for arguments that `Model.sample` does not have, with the names that it has."""
    for name in arguments:
        near = [ELSEWHERE[name]] if name in ELSEWHERE else difflib.get_close_matches(name, known, 1)
        way = f"it is called {near[0]}" if near else f"it takes {', '.join(known)}"
        raise TypeError(f"sample has no argument {name!r}: {way}")


def _value(kind: Kind, value: Any) -> tuple[Any, int]:
    """The value in the form that `Request` holds, and for how many images it asks."""
    if kind == "n":
        number = whole("n", value)
        return number, number
    if kind == "images":
        images = to_images(value, name="images")
        return images, len(images)
    if kind == "query":
        query = _query(value)
        return query, len(query)
    if isinstance(value, (str, bytes)):
        raise ValueError(f"{kind} is one string, but a list is taken: [{value!r}]")
    if not hasattr(value, "__iter__"):
        raise ValueError(f"{kind} is {type(value).__name__}, but a list of texts is taken")
    texts = list(value)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{kind}[{i}] is {type(text).__name__}, but a list of texts is taken")
    return [str(text) for text in texts], len(texts)


def _edited(start: Any, strength: Any, total: int) -> dict[str, Any]:
    """``start`` and ``strength`` of a request, for as many images as it asks for."""
    if start is None and strength is None:
        return {}
    if start is None:
        raise ValueError(f"strength={strength!r} has no effect without start=, the image to edit")
    if strength is None:
        raise ValueError(
            "start needs strength=, how much of it is redone: 0 gives it back, 1 forgets it"
        )
    single = getattr(start, "ndim", 0) in (2, 3)
    images = to_images([start] if single else start, name="start")
    if len(images) not in (1, total):
        raise ValueError(
            f"start has {len(images)} images, but {total} are asked for: give one for all, or one "
            "for each"
        )
    images = images * total if len(images) == 1 else images
    if len(shapes := sorted({tuple(image.shape) for image in images})) > 1:
        raise ValueError(f"start has images of {shapes[0]} and of {shapes[1]}: give one size")
    return {"start": tuple(images), "strength": real("strength", strength, 0, 1)}


def _query(query: Any) -> Query:
    """A query of the caller's own in float32 on the CPU."""
    if not isinstance(query, Query) or not isinstance(cast("Any", query).embedding, Tensor):
        held = query.embedding if isinstance(query, Query) else query
        raise ValueError(
            f"query is made of {type(held).__name__}: give Query(embedding), with a torch tensor "
            "(b, d)"
        )
    embedding = query.embedding.detach()
    if embedding.ndim not in (2, 3):
        raise ValueError(
            f"query has embeddings of shape {tuple(embedding.shape)}, expected (b, d), or (b, r, "
            "d) for r regions or queries of each image"
        )
    if embedding.is_complex():
        raise ValueError(f"query has embeddings of {embedding.dtype}, expected floats")
    embedding = embedding.cpu().float()
    if not bool(embedding.isfinite().all()):
        raise ValueError("query has embeddings that are not finite: look for NaN in them")
    for name, other in (("ids", query.ids), ("source", query.source or None)):
        if other is not None and len(other) != len(query):
            raise ValueError(f"query has {len(query)} embeddings, but {len(other)} {name}")
    ids = None if query.ids is None else query.ids.cpu()
    return Query(embedding, query.source, ids)


def _modes(kind: Kind, total: int, mode: Mode | Sequence[Mode] | None) -> tuple[Mode, ...]:
    fitting = FITTING[kind]
    if mode is None:
        mode = fitting[0]
    modes = (mode,) * total if isinstance(mode, str) else tuple(mode)
    if len(modes) != total:
        raise ValueError(f"mode has {len(modes)} words for {total} rows of {kind}")
    for word in dict.fromkeys(modes):
        if word not in MODES:
            raise ValueError(f"unknown mode {word!r}: choose one of {', '.join(MODES)}")
        if word not in fitting:
            other = next(key for key, words in FITTING.items() if word in words)
            raise ValueError(
                f"mode {word!r} does not go with {kind}: give {other}, or use "
                f"{' or '.join(fitting)}"
            )
    return modes
