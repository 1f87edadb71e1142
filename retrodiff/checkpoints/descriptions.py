"""Components as JSON under their public names, and back.

A component is ``{"class": "diffusion.DDIM", "config": {"eta": 0.0}}``: a public name and the
arguments of its constructor, which may be components again. Reading constructs the public
components of this package and nothing else, and every argument is compared with the constructor's
own annotation first. Tensors are kept apart, under the name of the place where they belong.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor, nn

from retrodiff.checkpoints.public import PACKAGE, class_named, public_name
from retrodiff.checkpoints.state import fill, own_state, plain_module, uniform_dtype
from retrodiff.disk.budget import TooLarge, within
from retrodiff.text import escaped, printable

EDITED = f"was model.json edited, or written by another version of {PACKAGE}?"

LONGEST = 4096
"""Entries of a list or characters of a text in a component's arguments."""

WHOLE = (-(2**31), 2**40)
"""Range of whole numbers in a component's arguments."""

RANGES: dict[str, tuple[int, int]] = {
    "k": (0, 2**20), "steps": (1, 10**6), "class_top": (1, 2**31), "length": (2, 10**6),
    "patch": (1, 2**16), "factor": (1, 2**16), "heads": (1, 2**16), "depth": (0, 2**16),
}  # fmt: skip
"""Narrower ones of some arguments, wherever they appear."""


# --- to JSON -------------------------------------------------------------------------------------


def describe(component: Any, weights: dict[str, Tensor], prefix: str) -> Any:
    """A component as plain JSON; its tensors go to ``weights`` under ``prefix``."""
    if component is None or isinstance(component, (bool, np.bool_)):
        return component if component is None else bool(component)
    if isinstance(component, str):
        return escaped(component)
    if isinstance(component, numbers.Integral):
        return int(component)
    if isinstance(component, (float, np.floating)):
        value = float(component)
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(component, (list, tuple)):
        items = cast("list[Any]", component)
        return [describe(x, weights, f"{prefix}.{i}") for i, x in enumerate(items)]
    if isinstance(component, dict) and all(isinstance(key, str) for key in component):
        entries = cast("dict[str, Any]", component)
        return {escaped(key): describe(x, weights, f"{prefix}.{key}") for key, x in entries.items()}
    if isinstance(component, Tensor):
        weights[prefix] = component
        return {"tensor": prefix}
    component = plain_module(component)
    kind = type(component)
    name = public_name(kind)
    if name is None:
        if isinstance(component, nn.Module):
            weights.update({f"{prefix}.{k}": v for k, v in own_state(component).items()})
        return {"custom": f"{kind.__module__}.{kind.__qualname__}"}
    if isinstance(component, nn.Module):
        config = cast("dict[str, Any]", component.config())  # type: ignore[operator]
        inner = [key for key, value in config.items() if isinstance(value, nn.Module)]
        weights.update({f"{prefix}.{k}": v for k, v in own_state(component, inner).items()})
    else:
        config = {f.name: getattr(component, f.name) for f in dataclasses.fields(component)}
    described = {key: describe(x, weights, f"{prefix}.{key}") for key, x in config.items()}
    return {"class": name, "config": described}


# --- from JSON -----------------------------------------------------------------------------------


def construct(description: Any, expected: Any, weights: Mapping[str, Tensor], prefix: str) -> Any:
    """Builds the component that `describe` wrote down, if it is of the expected kind.

    Args:
        description: JSON.
        expected: annotation of the argument that it is for.
        weights: tensors by place.
        prefix: its own place.

    Raises:
        ValueError: it is something else, or its weights do not fit; one line.
    """
    options = _options(expected)
    if description is None and type(None) in options:
        return None
    options = [option for option in options if option is not type(None)]
    if _is_named(description):
        raise _unknown(cast("dict[str, Any]", description)["custom"], prefix)
    failed: list[ValueError] = []
    for option in options:
        try:
            return _one(description, option, weights, prefix)
        except TooLarge:
            raise
        except ValueError as error:
            failed.append(error)
    if len(failed) == 1:
        raise failed[0]
    raise _wrong(prefix, description, " or ".join(_words(option) for option in options))


def _one(description: Any, expected: Any, weights: Mapping[str, Tensor], prefix: str) -> Any:
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        if any(type(description) is type(x) and description == x for x in inner):
            return description
        raise _wrong(prefix, description, " or ".join(map(repr, inner)))
    if expected in (bool, int, float, str):
        return _plain(description, expected, prefix)
    if expected is Tensor:
        return _tensor(description, weights, prefix)
    if origin in (list, tuple, Sequence):
        items = _listed(description, prefix)
        kinds = [inner[0]] * len(items) if origin is not tuple or inner[1:] == (...,) else inner
        if len(kinds) != len(items):
            raise _wrong(prefix, description, f"a list of {len(kinds)}")
        made = [
            construct(x, kind, weights, f"{prefix}.{i}")
            for i, (x, kind) in enumerate(zip(items, kinds, strict=True))
        ]
        return tuple(made) if origin is tuple else made
    if origin in (dict, Mapping):
        if not isinstance(description, dict) or len(description) > LONGEST:
            raise _wrong(prefix, description, "an object")
        return {k: construct(x, inner[1], weights, f"{prefix}.{k}") for k, x in description.items()}
    return _component(description, expected, weights, prefix)


def _component(description: Any, expected: Any, weights: Mapping[str, Tensor], prefix: str) -> Any:
    if isinstance(description, dict) and set(description) == {"tensor"}:
        _tensor(description, weights, str(description["tensor"]))
    if not isinstance(description, dict) or set(description) != {"class", "config"}:
        raise _wrong(prefix, description, _words(expected))
    kind, config = class_named(description["class"]), description["config"]
    given = arguments_from(config, kind, weights, prefix)
    inner = [key for key, value in given.items() if _is_component(value)]
    skipped = tuple(f"{prefix}.{key}." for key in inner)
    state = {
        key.removeprefix(f"{prefix}."): tensor
        for key, tensor in weights.items()
        if key.startswith(f"{prefix}.") and not key.startswith(skipped)
    }
    if not issubclass(kind, nn.Module):
        if stray := [key for key in state if key.split(".")[0] not in config]:
            raise ValueError(
                f"the saved weights hold {printable(f'{prefix}.{stray[0]}')}, which "
                f"{kind.__name__} does not have: {EDITED}"
            )
        state = {}
    component = _built(kind, given, state, prefix)
    if isinstance(expected, type) and not isinstance(component, expected):
        raise _wrong(prefix, description, _words(expected))
    if isinstance(component, nn.Module):
        if (dtype := uniform_dtype(state)) is not None:
            component.to(dtype)
        fill(component, state, prefix, inner)
    return component


def _built(kind: type, given: dict[str, Any], state: Mapping[str, Tensor], prefix: str) -> Any:
    try:
        with within(state, prefix) if issubclass(kind, nn.Module) else nullcontext():
            return kind(**given)
    except TooLarge:
        raise
    except Exception as error:  # numbers that do not go together: whatever it raises, one line
        reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
        raise ValueError(
            f"{prefix} does not take what model.json hands it ({reason}): {EDITED}"
        ) from error


def arguments_from(
    config: Any, kind: type, weights: Mapping[str, Tensor], prefix: str, partial: bool = False
) -> dict[str, Any]:
    """The arguments of a class from JSON, each of the kind that its constructor states.

    Args:
        config: JSON.
        kind: the class.
        weights: tensors by place.
        prefix: place of the object; empty for a model, whose parts are named by themselves.
        partial: some arguments come from elsewhere.

    Raises:
        ValueError: one is unknown, missing, or of another kind.
    """
    if not isinstance(config, dict):
        raise _wrong(prefix, config, f"the arguments of {kind.__name__}")
    known = arguments(kind)
    for name in config:
        if name not in known:
            raise ValueError(
                f"{prefix or 'model.json'} hands {kind.__name__} an argument "
                f"{printable(name[:80])!r}, which it does not take: {EDITED}"
            )
    missing = [name for name, (_, needed) in known.items() if needed and name not in config]
    if missing and not partial:
        raise ValueError(f"{prefix} lacks {', '.join(missing)} of {kind.__name__}: {EDITED}")
    dot = f"{prefix}." if prefix else ""
    return {
        name: construct(value, known[name][0], weights, f"{dot}{name}")
        for name, value in config.items()
    }


@lru_cache
def arguments(kind: type) -> dict[str, tuple[Any, bool]]:
    """Annotation of each argument of a class, and whether it must be given."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = [f for f in dataclasses.fields(kind) if f.init]
        absent = dataclasses.MISSING
        return {
            f.name: (hints[f.name], f.default is absent and f.default_factory is absent)
            for f in fields
        }
    hints = typing.get_type_hints(kind.__init__)
    taken = list(inspect.signature(kind).parameters.values())
    open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    if any(p.kind in open_ended for p in taken):
        raise TypeError(f"{kind.__name__} takes any argument, so no file may describe one")
    return {p.name: (hints[p.name], p.default is p.empty) for p in taken}


# --- single values -------------------------------------------------------------------------------


def _plain(value: Any, expected: type, prefix: str) -> Any:
    if expected is float and isinstance(value, dict) and set(value) == {"float"}:
        if value["float"] not in ("inf", "-inf"):
            raise _wrong(prefix, value["float"], "a number")
        return float(value["float"])
    right = (int, float) if expected is float else expected
    if not isinstance(value, right) or (isinstance(value, bool) and expected is not bool):
        raise _wrong(prefix, value, _words(expected))
    if isinstance(value, str) and len(value) > LONGEST:
        raise _wrong(prefix, value, f"a text of at most {LONGEST} characters")
    if isinstance(value, int) and not isinstance(value, bool):
        least, most = RANGES.get(prefix.rpartition(".")[2], WHOLE)
        if not least <= value <= most:
            raise _wrong(prefix, value, f"a whole number from {least} to {most}")
    return float(cast("float", value)) if expected is float else value


def _listed(value: Any, prefix: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > LONGEST:
        raise _wrong(prefix, value, f"a list of at most {LONGEST}")
    return value


def _tensor(description: Any, weights: Mapping[str, Tensor], prefix: str) -> Tensor:
    if description != {"tensor": prefix}:
        raise _wrong(prefix, description, "a tensor under its own name")
    if prefix not in weights:
        raise ValueError(f"the saved weights lack {printable(prefix[:200])}: copy the whole folder")
    return weights[prefix]


def _options(expected: Any) -> list[Any]:
    union = typing.get_origin(expected) in (typing.Union, types.UnionType)
    return list(typing.get_args(expected)) if union else [expected]


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _words(expected: Any) -> str:
    named = getattr(expected, "__name__", str(expected))
    return _WORDS.get(expected, f"a component ({named})")


def _wrong(prefix: str, value: Any, wanted: str) -> ValueError:
    shown = printable(repr(value))
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return ValueError(f"{printable(prefix)} is {shown}, not {wanted}: {EDITED}")


def _unknown(name: Any, prefix: str) -> ValueError:
    shown = printable(str(name)[:200])
    reason = (
        "holds what a file cannot describe"
        if shown.split(".")[0] == PACKAGE
        else f"is not part of {PACKAGE} and is never imported from a file"
    )
    return ValueError(
        f"{prefix} was saved as {shown}, which {reason}: pass it as "
        f"load(..., {prefix.split('.')[0]}=...)"
    )


def is_custom(description: Any) -> bool:
    """Whether a class of the user's own is anywhere in a description."""
    if isinstance(description, dict):
        return _is_named(description) or any(map(is_custom, description.values()))
    return isinstance(description, list) and any(map(is_custom, description))


def _is_component(value: Any) -> bool:
    return isinstance(value, nn.Module) or dataclasses.is_dataclass(value)


def _is_named(description: Any) -> bool:
    """Whether a description is no more than the name of a class of the user's own."""
    return (
        isinstance(description, dict)
        and set(description) == {"custom"}
        and isinstance(description["custom"], str)
    )
