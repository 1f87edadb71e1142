"""Limits the size of a network built from a description to that of its saved weights.

A file of a few bytes can describe a network of terabytes, or one of a million layers. The weights
beside it say how much is right: a constructor that wants more is stopped before it gets it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

SPARE = 1 << 24
"""Numbers that a constructor may use beside its parameters: masks, tables of positions."""

MODULES = 64
"""Modules for each saved tensor: activations and containers have none."""


class TooLarge(ValueError):
    """A described network is larger than its saved weights."""


@contextmanager
def within(weights: Mapping[str, Tensor], what: str) -> Iterator[None]:
    """In this block, networks may be built that are as large as the weights, and no larger.

    Args:
        weights: that the network will be filled with.
        what: its name in the error.

    Raises:
        TooLarge: it would need more.
    """
    numbers = sum(tensor.numel() for tensor in weights.values())
    tensors, mine = len(weights), threading.get_ident()
    wants = f"{what} describes a network of more than"

    def refuse(more: str) -> None:
        raise TooLarge(f"{wants} {more} that were saved with it: do the files belong together?")

    built = {"numbers": 0, "tensors": 0, "modules": 0}

    def parameter(module: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() != mine or value is None:
            return
        built["numbers"] += value.numel()
        built["tensors"] += 1
        if built["tensors"] > 4 * tensors + 1024:
            refuse(f"the {tensors:,} tensors")
        if built["numbers"] > 2 * numbers + SPARE:
            refuse(f"the {numbers:,} numbers")

    def inner(module: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() == mine:
            built["modules"] += 1
            if built["modules"] > MODULES * (tensors + 1024):
                refuse(f"the {tensors:,} tensors")

    hooks = [
        register_module_parameter_registration_hook(cast("Any", parameter)),
        register_module_module_registration_hook(cast("Any", inner)),
    ]
    try:
        with _Allocations(numbers + SPARE, lambda: refuse(f"the {numbers:,} numbers")):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Allocations(TorchFunctionMode):
    """Looks at the size of every tensor before it is made."""

    def __init__(self, most: int, refuse: Any):
        super().__init__()
        self.most, self.refuse = most, refuse

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _size(getattr(func, "__name__", ""), args, kwargs) > self.most:
            self.refuse()
        return func(*args, **kwargs)


def _size(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Numbers in the result of a function of torch, as far as its arguments tell."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    plain = [value for value in args if not isinstance(value, Tensor)]
    sizes: Any = kwargs.get("size", plain[0] if plain else ())
    if not isinstance(sizes, (list, tuple)):
        sizes = plain
    sizes = [n for n in cast("list[Any]", sizes) if isinstance(n, (int, float))]
    if name == "eye":
        return math.prod(sizes) if len(sizes) > 1 else math.prod(sizes * 2)
    if name == "arange":
        step = abs(kwargs.get("step", sizes[2] if len(sizes) > 2 else 1)) or 1
        return max([abs(n) for n in sizes], default=0) / step
    if name in ("linspace", "logspace"):
        return kwargs.get("steps", sizes[2] if len(sizes) > 2 else 0)
    if name in _SIZED or name.startswith("new_"):
        return math.prod(sizes)
    if name in ("repeat", "tile") and tensors:
        return math.prod(sizes) * max(1, tensors[0].numel())
    return _broadcast(tensors) if len(tensors) > 1 else 0


_SIZED = {"empty", "zeros", "ones", "rand", "randn", "full", "empty_strided"}


def _broadcast(tensors: list[Tensor]) -> int:
    shapes = [tuple(reversed(tensor.shape)) for tensor in tensors]
    return math.prod(max(sizes) for sizes in zip_longest(*shapes, fillvalue=1))
