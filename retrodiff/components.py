"""Finds the components and torch modules inside a component, through any wrappers."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from retrodiff.text import printable

DEEPEST = 16


def inside(component: Any) -> Iterator[Any]:
    """The component itself and every object that its attributes hold, each once, outermost first.

    Lists, tuples, sets and dictionaries are looked into; tensors, text and numbers are left out.
    """
    yield from _inside(component, set(), 0)


def modules(component: Any) -> list[nn.Module]:
    """The torch modules of a component that no other of them contains.

    Usually the component itself; for a wrapper that is no torch module, those that it wraps.
    """
    found: list[nn.Module] = []
    contained: set[int] = set()
    for part in inside(component):
        if isinstance(part, nn.Module) and id(part) not in contained:
            found.append(part)
            contained |= {id(module) for module in part.modules()}
    return found


def where(component: Any) -> tuple[torch.device, torch.dtype] | None:
    """Device and floating type of a component's weights or buffers; None: it has none."""
    for module in modules(component):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return None


@contextmanager
def evaluating(*components: Any) -> Generator[None]:
    """Evaluation mode for all modules inside, and back to the mode of each afterwards."""
    all_modules = [m for part in components for top in modules(part) for m in top.modules()]
    training = [module for module in all_modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def first_not_finite(component: Any) -> str | None:
    """Name of the first weight that is infinite or NaN; None: all are finite."""
    for module in modules(component):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                return name
    return None


def summary(component: Any, limit: int = 160) -> str:
    """A component on one line: its repr, or class, shape and weights of a torch module."""
    plain = isinstance(component, nn.Module) and type(component).__repr__ is nn.Module.__repr__
    text = size(component) if plain else printable(repr(component))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def size(module: nn.Module) -> str:
    """A torch module in a few words, in place of the tree of its layers: ``UNet(400M weights)``."""
    count = sum(p.numel() for p in module.parameters())
    shape = getattr(module, "shape", None)
    facts = [] if shape is None else [f"shape={tuple(shape)}"]
    return f"{type(module).__name__}({', '.join([*facts, f'{_rounded(count)} weights'])})"


def _rounded(count: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _inside(value: Any, seen: set[int], depth: int) -> Iterator[Any]:
    if value is None or isinstance(value, (Tensor, str, bytes, int, float, complex, type)):
        return
    if id(value) in seen or depth > DEEPEST:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        held = list(cast("Mapping[Any, Any]", value).values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        held = list(cast("list[Any]", value))
    elif inspect.isroutine(value) or inspect.ismodule(value):
        return
    else:
        yield value
        attributes = getattr(value, "__dict__", {}).items()
        held = [v for k, v in attributes if k not in _WEIGHTS and not _empty(v)]
        if dataclasses.is_dataclass(value):
            held += [getattr(value, f.name) for f in dataclasses.fields(value)]
    for one in held:
        yield from _inside(one, seen, depth + 1)


def _empty(value: Any) -> bool:
    """Whether a value holds nothing: most attributes of a torch module are empty hooks."""
    return value is None or (isinstance(value, (dict, list, tuple, set)) and not value)


_WEIGHTS = ("_parameters", "_buffers", "__objclass__")
