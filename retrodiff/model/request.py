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
from retrodiff.numbers import LARGEST_SEED, whole
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
    """

    kind: Kind
    value: Any
    modes: tuple[Mode, ...]
    k: int
    steps: int
    seed: int
    batch_size: int

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
) -> Request:
    """The request that the arguments of `Model.sample` make.

    Args:
        given: ``prompts``, ``classes``, ``images``, ``query`` and ``n``, all but one None.
        mode: one word, one per image, or None for the default of the kind.
        k: 0 or more.
        steps: 1 or more.
        seed: 0 to 2⁶⁴ - 1.
        batch_size: 1 or more.

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
    return Request(kind, value, _modes(kind, total, mode), **numbers)


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
