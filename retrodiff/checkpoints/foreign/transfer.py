"""Copies foreign weights into our networks, one tensor at a time; every name is accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from retrodiff.checkpoints.foreign.tensor_names import Names

SHOWN = 10
"""Tensors that an error names."""


class Transfer:
    """Networks to be filled from one set of tensors, with all problems in one error.

    Plan every network first, then `check`, then `fill`.

    Args:
        source: where the tensors come from, for the error.
        tensors: by their own names; may be memory-mapped.
    """

    def __init__(self, source: str, tensors: Mapping[str, Tensor]):
        self.source, self.tensors = source, tensors
        self.problems: list[str] = []
        self._plan: list[tuple[nn.Module, dict[str, str]]] = []

    def plan(self, module: nn.Module, names: Names, key: Callable[[str], str] = str) -> None:
        """Finds each tensor of a network.

        Args:
            module: the network, on the meta device.
            names: its modules' names in the source.
            key: from ``names[module].weight`` to the full name in the source.
        """
        theirs = {own: key(name) for own, name in their_names(module, names).items()}
        for own, parameter in module.state_dict().items():
            name = theirs[own]
            tensor = self.tensors.get(name)
            if tensor is None:
                self.problems.append(f"missing {name}")
            elif _trimmed(tensor.shape) != _trimmed(parameter.shape):
                shapes = f"{tuple(tensor.shape)} for {tuple(parameter.shape)}"
                self.problems.append(f"{name} has shape {shapes}")
            elif not tensor.is_floating_point() or tensor.is_meta:
                kind = "no numbers (meta)" if tensor.is_meta else f"dtype {tensor.dtype}"
                self.problems.append(f"{name} has {kind}, weights are floating point")
        self._plan.append((module, theirs))

    def extra(self, names: Iterable[str]) -> None:
        """Counts tensors that no network has as problems."""
        self.problems += [f"extra {name}" for name in names]

    def check(self, hint: str) -> None:
        """Raises one error for all problems, the first ten named.

        Args:
            hint: the way out.

        Raises:
            ValueError: there are any.
        """
        if not self.problems:
            self._check_bytes()
            return
        rest = len(self.problems) - SHOWN
        shown = "; ".join(self.problems[:SHOWN]) + (f"; and {rest} more" if rest > 0 else "")
        raise ValueError(
            f"{self.source} does not fit the architecture, {len(self.problems)} tensors: {shown}. "
            f"{hint}"
        )

    def fill(self, dtype: torch.dtype) -> None:
        """Gives the planned networks memory and copies their weights.

        Raises:
            ValueError: some of the numbers are not finite, in the source or in ``dtype``.
        """
        broken: list[str] = []
        narrow = False
        for module, theirs in self._plan:
            module.to(dtype).to_empty(device="cpu")
            for own, parameter in module.state_dict().items():
                tensor = self.tensors[theirs[own]].reshape(parameter.shape)
                parameter.copy_(tensor)
                if not _finite(parameter):
                    broken.append(theirs[own])
                    narrow = narrow or _finite(tensor)
        if not broken:
            return
        shown = ", ".join(broken[:SHOWN]) + (
            f" and {len(broken) - SHOWN} more" * bool(broken[SHOWN:])
        )
        if narrow:
            raise ValueError(
                f"{self.source} has {len(broken)} tensors that do not fit into {dtype}: {shown}. "
                "Load it with dtype=torch.float32 or torch.bfloat16"
            )
        raise ValueError(
            f"{self.source} has {len(broken)} tensors with numbers that are not finite (NaN or "
            f"infinite): {shown}. The training diverged, or the file is damaged: take an earlier "
            "checkpoint"
        )

    def _check_bytes(self) -> None:
        """A file may show few bytes under many names or in large shapes: no weights are like that.

        Raises:
            ValueError: the networks would take more numbers than the source holds.
        """
        wanted = sum(p.numel() for module, _ in self._plan for p in module.state_dict().values())
        storages = {t.untyped_storage().data_ptr(): t for t in self.tensors.values()}
        held = sum(t.untyped_storage().nbytes() // t.dtype.itemsize for t in storages.values())
        if wanted > held:
            raise ValueError(
                f"{self.source} holds {held:,} numbers, but shows {wanted:,} as weights: the same "
                "ones several times, so that the file is damaged or no checkpoint of a model"
            )


def their_names(module: nn.Module, names: Names) -> dict[str, str]:
    """Name in the source of every tensor of a network, without the source's prefix."""
    theirs: dict[str, str] = {}
    for own in module.state_dict():
        place, _, leaf = own.rpartition(".")
        theirs[own] = f"{names[place]}.{leaf}"
    return theirs


def _trimmed(shape: torch.Size) -> list[int]:
    """Without trailing ones: a 1x1 convolution and a linear layer are the same."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return sizes


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are; without a mask of the tensor's size."""
    if tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize < 2:  # float8 has no reductions
        tensor = tensor.float()
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))
