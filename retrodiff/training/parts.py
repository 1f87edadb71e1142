"""What of a model is trained: the torch modules of what generates and of its conditioner."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

from retrodiff.components import modules
from retrodiff.model import Model

TRAINED = ("denoiser", "generator", "conditioner")
SHARED = ("encoder", "database", "autoencoder", "retriever", "proposal")
"""Parts that training reads and never changes."""


def trainable_modules(model: Model) -> dict[str, nn.Module]:
    """The torch modules that training changes, by name: every one inside the trained components.

    A component that is a torch module is named as its slot: ``denoiser`` (``generator`` in a model
    that is no diffusion model) or ``conditioner``. Of a wrapper that is none, such as `Dropped`,
    the modules inside are found: ``conditioner``, then ``conditioner_1`` and so on. Encoder and
    autoencoder stay as they are, wherever they are held.

    Args:
        model: any model.
    """
    fixed = {id(module) for part in _shared(model) for module in modules(part)}
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for slot in TRAINED:
        inside = [m for m in modules(getattr(model, slot)) if id(m) not in fixed | seen]
        seen |= {id(m) for m in inside}
        found |= {f"{slot}_{i}" if i else slot: module for i, module in enumerate(inside)}
    return found


def parameters(model: Model) -> int:
    """Number of trained parameters."""
    each = {id(p): p for m in trainable_modules(model).values() for p in m.parameters()}
    return sum(p.numel() for p in each.values() if p.requires_grad)


def copied(model: Model) -> Model:
    """A model with its own copy of all that training changes; the other parts are shared."""
    memo: dict[int, Any] = {}
    for part in _shared(model):
        memo |= {id(part): part, **{id(module): module for module in modules(part)}}
    parts = copy.deepcopy({slot: getattr(model, slot) for slot in TRAINED}, memo)
    return dataclasses.replace(model, **parts)


def _shared(model: Model) -> list[Any]:
    """The parts that training does not change, a generator's own first stage among them."""
    parts = [getattr(model, name) for name in SHARED]
    parts.append(getattr(model.generator, "autoencoder", None))
    return [part for part in parts if part is not None]
