"""Model and loss as one module, so that DDP and FSDP can wrap what is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retrodiff.interfaces import Neighbors, Query
from retrodiff.model import Model


class Objective(nn.Module):
    """The training loss of a model; its parameters are those of denoiser and conditioner.

    Args:
        model: encoder and autoencoder stay as they are.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        if not isinstance(model.denoiser, nn.Module):
            raise ValueError(
                f"{type(model.denoiser).__name__} is no torch module, so there is nothing to train"
            )
        self.denoiser = model.denoiser
        if isinstance(model.conditioner, nn.Module):
            self.conditioner = model.conditioner

    def forward(
        self,
        images: Tensor,
        query: Query,
        neighbors: Neighbors,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Loss (b,) of images (b, c, h, w); see `Model.loss`."""
        return self.model.loss(images, query, neighbors, generator)
