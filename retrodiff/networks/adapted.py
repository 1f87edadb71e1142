"""A diffusers network with an adapter, as a network of this library: to be trained and sampled."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from retrodiff.interfaces import Context
from retrodiff.networks.placed import Placed, check_rows
from retrodiff.networks.retrieval_adapter import PreparedNeighbors, RetrievalAdapter
from retrodiff.networks.streams import join_streams
from retrodiff.networks.transformer import repeated


class Adapted(Placed):
    """``network(x, timesteps, context)`` of an adapter: what denoisers, and so `fit`, take.

    The base gets the same other inputs in every row, such as the embedding of an empty prompt: the
    adapter then learns what neighbors say beside a text, not in place of one.

    Args:
        adapter: with its base.
        shape: (c, h, w) of a latent.
        inputs: what else the base's ``forward`` needs, by name, each with one row, such as
            ``{"encoder_hidden_states": (1, 77, 768)}``.

    Raises:
        ValueError: the base takes no input of that name, or one has several rows.

    Examples:
        >>> import torch
        >>> from diffusers import UNet2DConditionModel
        >>> from retrodiff.diffusion import EpsDenoiser
        >>> from retrodiff.networks import Adapted, RetrievalAdapter
        >>> unet = UNet2DConditionModel(
        ...     sample_size=8,
        ...     block_out_channels=(32,),
        ...     layers_per_block=1,
        ...     down_block_types=("CrossAttnDownBlock2D",),
        ...     up_block_types=("CrossAttnUpBlock2D",),
        ...     cross_attention_dim=12,
        ... )
        >>> adapter = RetrievalAdapter(unet, dim=16)
        >>> empty_prompt = torch.zeros(1, 5, 12)
        >>> network = Adapted(adapter, (4, 8, 8), {"encoder_hidden_states": empty_prompt})
        >>> EpsDenoiser(network).shape
        (4, 8, 8)
    """

    def __init__(
        self,
        adapter: RetrievalAdapter,
        shape: tuple[int, int, int],
        inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.adapter, self.shape = adapter, tuple(shape)
        self.widths = {"neighbors": adapter.dim}
        names = list(inspect.signature(adapter.base.forward).parameters)
        self.first = names[0]
        self.inputs = tuple(inputs or {})
        for name, tensor in (inputs or {}).items():
            if name not in names or name in (self.first, "timestep"):
                raise ValueError(
                    f"{type(adapter.base).__name__} takes no {name!r} beside latents and timestep: "
                    f"it takes {', '.join(names)}"
                )
            if tensor.shape[0] != 1:
                raise ValueError(f"{name} has {tensor.shape[0]} rows: give one, it is repeated")
            self.register_buffer(f"input_{name}", tensor, persistent=False)

    def prepare(self, context: Context) -> PreparedNeighbors:
        """The neighbors as every layer needs them, for all steps."""
        tokens = join_streams(context, self.widths, None, self.dtype)
        assert tokens is not None
        return self.adapter.prepare(tokens)

    def forward(self, x: Tensor, timesteps: Tensor, context: Context | PreparedNeighbors) -> Tensor:
        """Latents (b, c, h, w), timesteps (b,), context -> output (rows of the context, c, h, w).

        Raises:
            ValueError: x or context do not fit, or the base's output is of another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, the network takes (b, "
                f"{', '.join(map(str, self.shape))})"
            )
        prepared = context if isinstance(context, PreparedNeighbors) else self.prepare(context)
        check_rows(x, prepared.rows)
        wide = repeated(x.to(self.dtype), prepared.rows)
        times = repeated(timesteps.expand(len(x)), prepared.rows)
        more: dict[str, Any] = {}
        for name in self.inputs:
            tensor = self.get_buffer(f"input_{name}")
            more[name] = tensor.expand(prepared.rows, *tensor.shape[1:])
        out = self.adapter(
            **{self.first: wide}, timestep=times, **more, neighbors=prepared, return_dict=False
        )[0]
        if not isinstance(out, torch.Tensor) or out.shape != wide.shape:
            shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(
                f"{type(self.adapter.base).__name__} gives {shape} for latents of "
                f"{tuple(wide.shape)}: take a base that predicts one number for each"
            )
        return out.to(x.dtype)
