"""Puts a training into its checkpoint, and continues it from there with the same settings only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from retrodiff.training.checkpoint import ANEW, State, disagreement
from retrodiff.training.rates import LearningRate, rate_disagreement


class Kept(Protocol):
    """Something that grows during a training and belongs into its checkpoints."""

    def state(self) -> dict[str, Tensor]:
        """Tensors by name."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` returned."""
        ...


def check_same(
    path: Path, state: State, about: Mapping[str, Any], steps: int, lr: LearningRate
) -> None:
    """Refuses to continue a training with other settings."""
    run = dict(state.run)
    before, description = run.pop("steps", None), run.pop("lr", None)
    differs = disagreement(run, about)
    if differs is None and steps < state.done:
        differs = f"{state.done} steps done already, but this one has steps={steps}"
    if differs is None:
        differs = rate_disagreement(lr, state.tensors["rates"], description, before == steps)
    if differs is not None:
        raise ValueError(f"{path} belongs to a training with {differs}: give the same, {ANEW}")


def tensors_of(
    module: nn.Module,
    named: Mapping[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    kept: Mapping[str, Kept],
) -> dict[str, Tensor]:
    """All that changes in a training, by name."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in named.items():
        tensors[f"parameter.{name}"] = parameter
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
    tensors |= {f"buffer.{name}": buffer for name, buffer in module.named_buffers()}
    for part, keeper in kept.items():
        tensors |= {f"{part}.{key}": value for key, value in keeper.state().items()}
    return tensors


def restore(
    path: Path,
    state: State,
    module: nn.Module,
    named: Mapping[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    kept: Mapping[str, Kept],
) -> None:
    """Copies a state into what is trained, after all of it has been compared."""
    weights, buffers = state.part("parameter"), state.part("buffer")
    for mine, theirs in ((named, weights), (dict(module.named_buffers()), buffers)):
        for name in {**mine, **theirs}:
            one, other = (_kind(side.get(name)) for side in (theirs, mine))
            if one != other:
                raise ValueError(
                    f"{path} was written for another network: {name} is {one} there, and {other} "
                    f"in this one: build the same network, {ANEW}"
                )
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in state.part("optimizer").items():
        kind, _, name = key.partition(".")
        moments.setdefault(name, {})[kind] = value
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
            for optimizer in optimizers:
                if name in moments and _updates(optimizer, parameter):
                    optimizer.state[parameter] = {
                        kind: value if kind == "step" else value.to(parameter.device)
                        for kind, value in moments[name].items()
                    }
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    for part, keeper in kept.items():
        keeper.load(state.part(part))


def _updates(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    return any(p is parameter for group in optimizer.param_groups for p in group["params"])


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
