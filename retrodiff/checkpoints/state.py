"""The tensors of a module by name: taken out, compared, filled in again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retrodiff.encoders.fingerprint import COMPILED, plain_state


def plain_module(component: Any) -> Any:
    """The module itself where ``torch.compile`` has wrapped it."""
    while isinstance(component, nn.Module) and "_orig_mod" in component._modules:
        component = component._modules["_orig_mod"]
    return component


def own_state(module: nn.Module, elsewhere: Sequence[str] = ()) -> dict[str, Tensor]:
    """The module's tensors under the names that they have without ``torch.compile``.

    Args:
        module: whose tensors.
        elsewhere: children that are kept by themselves.
    """
    state = plain_state(module)
    skipped = tuple(f"{name}." for name in elsewhere)
    return {k: v for k, v in state.items() if not k.startswith(skipped)} if skipped else state


def uniform_dtype(state: Mapping[str, Tensor]) -> torch.dtype | None:
    """The type that all floating-point tensors have, if it is not torch's default."""
    kinds = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    kind = kinds.pop() if len(kinds) == 1 else None
    return None if kind == torch.get_default_dtype() else kind


def fill(
    module: nn.Module, state: Mapping[str, Tensor], what: str, elsewhere: Sequence[str] = ()
) -> None:
    """Copies ``state`` into ``module``; names every missing, extra and misshapen tensor.

    Args:
        module: what receives the tensors.
        state: by parameter name.
        what: the module's name in the error.
        elsewhere: children that are filled by themselves.

    Raises:
        ValueError: a tensor does not fit, or holds numbers that are not finite.
    """
    wanted = own_state(module, elsewhere)
    wrong = [f"missing {k}" for k in wanted if k not in state]
    wrong += [f"extra {k}" for k in state if k not in wanted]
    wrong += [
        f"{k} has shape {tuple(state[k].shape)} for {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    if wrong:
        raise ValueError(
            f"the saved weights do not match {what} ({type(plain_module(module)).__name__}), "
            f"{len(wrong)} tensors: {_some(wrong, '; ')}. Was the file written for another "
            "architecture?"
        )
    infinite = not_finite(state, {k.replace(COMPILED, "") for k, _ in module.named_parameters()})
    if infinite:
        raise ValueError(
            f"the saved weights of {what} hold numbers that are not finite, in "
            f"{_some(infinite, ', ')}: the training diverged, or the file is damaged; use an "
            "earlier one"
        )
    with torch.no_grad():
        for key, tensor in state.items():
            wanted[key].copy_(tensor)


def not_finite(state: Mapping[str, Tensor], parameters: set[str] | None = None) -> list[str]:
    """Names of the tensors that hold NaN or, unless they are buffers such as masks, infinity.

    Args:
        state: tensors by name.
        parameters: names that are no buffers; None: all.
    """
    found = []
    for key, tensor in state.items():
        if tensor.is_floating_point() or tensor.is_complex():
            strict = parameters is None or key in parameters
            bad = ~torch.isfinite(tensor) if strict else torch.isnan(tensor)
            if bool(bad.any()):
                found.append(key)
    return found


def _some(names: list[str], between: str) -> str:
    more = f"{between}and {len(names) - 10} more" if names[10:] else ""
    return between.join(names[:10]) + more
