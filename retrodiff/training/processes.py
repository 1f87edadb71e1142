"""The processes that train together, one or many, through Hugging Face accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes:
    """This process among those that ``accelerate launch`` or ``torchrun`` started.

    In a program that was started alone accelerate is not used, unless an `Accelerator` is given.

    Args:
        accelerator: one of the caller's own; None: made here where several processes were started.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        if accelerator is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self._accelerator: Any = accelerator

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self._accelerator is None else self._accelerator.num_processes

    @property
    def index(self) -> int:
        """Number of this one, from 0 on."""
        return 0 if self._accelerator is None else self._accelerator.process_index

    @property
    def main(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.index == 0

    @property
    def device(self) -> torch.device | None:
        """Where this process trains; None: wherever the model is."""
        return self._accelerator.device if self.count > 1 else None

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module such that gradients are averaged over all processes."""
        if self.count == 1:
            return module
        from accelerate import DistributedDataParallelKwargs

        # A learned null is used in some steps only.
        self._accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        return self._accelerator.prepare_model(module, device_placement=False)

    @contextmanager
    def adding_up(self, module: nn.Module) -> Iterator[None]:
        """Gradients are added up here, and not sent yet."""
        alone = self.count == 1
        with nullcontext() if alone else self._accelerator.no_sync(module):
            yield

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        return values if self.count == 1 else self._accelerator.reduce(values, reduction="mean")

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()
