"""A moving average of the weights, by torch-ema, with its state kept by parameter name.

Sampling uses the averaged weights (Ho et al. 2020). torch-ema itself keeps a positional list, which
breaks silently when a parameter is added or reordered; names do not.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from retrodiff.numbers import real

M = TypeVar("M", bound=nn.Module)


class NamedEMA:
    """torch-ema's average of a module's parameters.

    Args:
        module: whose parameters are averaged, after it was moved and wrapped.
        decay: per update, 0 to 1; the first updates use (1 + n) / (10 + n) where that is smaller.
        name: what it is called in checkpoints; each average of a training has its own.

    Examples:
        >>> import torch
        >>> from retrodiff.training import NamedEMA
        >>> module = torch.nn.Linear(2, 2)
        >>> average = NamedEMA(module, decay=0.999)
        >>> average.update()
        >>> type(average.copy_to(module)).__name__
        'Linear'
    """

    def __init__(self, module: nn.Module, decay: float, name: str = "ema") -> None:
        from torch_ema import ExponentialMovingAverage

        self.name = name
        self.decay = real("ema", decay, 0, 1)
        self._named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self._average: Any = ExponentialMovingAverage([p for _, p in self._named], self.decay)

    def update(self) -> None:
        """After every optimizer step."""
        self._average.update([p for _, p in self._named])

    def state(self) -> dict[str, Tensor]:
        """Averages by parameter name, and the number of updates."""
        named = zip(self._named, self._average.shadow_params, strict=True)
        return {
            "updates": torch.tensor(self._average.num_updates),
            **{f"average.{name}": shadow for (name, _), shadow in named},
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` returned.

        Raises:
            ValueError: the names differ.
        """
        wanted = {f"average.{name}" for name, _ in self._named} | {"updates"}
        if wanted != set(state):
            odd = sorted(wanted ^ set(state))
            raise ValueError(f"the saved average does not fit the module: {', '.join(odd[:10])}")
        self._average.num_updates = int(state["updates"])
        for (name, _), shadow in zip(self._named, self._average.shadow_params, strict=True):
            shadow.copy_(state[f"average.{name}"])

    def copy_to(self, module: M) -> M:
        """Writes the averages into a module with the same parameter names; returns it."""
        state = self.state()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if f"average.{name}" in state:
                    parameter.copy_(state[f"average.{name}"])
        return module
