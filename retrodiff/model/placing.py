"""Moves the weights of a model between devices and types, and compiles its network."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import nn

from retrodiff.components import modules
from retrodiff.devices import get_device

KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types that networks compute in."""


class Placed:
    """Methods of `retrodiff.Model` for devices and types."""

    def parts(self) -> dict[str, Any]:
        """The components and numbers by slot."""
        raise NotImplementedError

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        encoder_dtype: torch.dtype | None = None,
    ) -> Self:
        """Moves every component that has weights, in place; returns the model itself.

        Other models that share a component move with it, as with ``torch.nn.Module.to``.

        Args:
            device: of all components; None: they stay where they are.
            dtype: of all but encoders, such as ``torch.bfloat16``; None: as it is. Images are
                float32 in any case.
            encoder_dtype: of encoders, whose embeddings then differ: databases that were built in
                another type are refused. None: as it is.

        Raises:
            ValueError: no such device here, or a type that networks do not compute in.
        """
        device = None if device is None else get_device(device)
        for name, kind in (("dtype", dtype), ("encoder_dtype", encoder_dtype)):
            if kind is not None and kind not in KINDS:
                known = ", ".join(map(str, KINDS))
                raise ValueError(f"{name}={kind!r}: networks compute in one of {known}")
        for part in self.parts().values():
            for module in modules(part):
                encoder = hasattr(module, "encode_image")
                module.to(device, encoder_dtype if encoder else dtype)
        return self

    def cuda(self) -> Self:
        """Moves all weights to the GPU."""
        return self.to("cuda")

    def cpu(self) -> Self:
        """Moves all weights to the CPU."""
        return self.to("cpu")

    def half(self) -> Self:
        """Brings the weights of all but encoders to float16."""
        return self.to(dtype=torch.float16)

    def bfloat16(self) -> Self:
        """Brings the weights of all but encoders to bfloat16."""
        return self.to(dtype=torch.bfloat16)

    def compile(self, **options: Any) -> Self:
        """Compiles the network with ``torch.compile``, in place; returns the model itself.

        The first batch of each size and number of tokens takes a minute or so. Nothing of it is
        saved: a loaded model has to be compiled again.

        Args:
            options: of ``torch.compile``, such as ``mode="max-autotune"``.
        """
        for module in modules(self.parts()["generator"] or self.parts()["denoiser"]):
            inner = getattr(module, "network", module)
            cast("nn.Module", inner).compile(**options)
        return self
