"""Model and loss as one module, so that DDP and FSDP can wrap what is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retrodiff.interfaces import Neighbors, Query
from retrodiff.model import Model
from retrodiff.training.parts import TRAINED, trainable_modules


class Objective(nn.Module):
    """The training loss of a model; its parameters are those of what generates and conditions.

    Parameters inside of wrappers are among them, see `trainable_modules`.

    Args:
        model: encoder and autoencoder stay as they are.

    Raises:
        ValueError: nothing in it can be trained.

    Examples:
        >>> import torch
        >>> from retrodiff import presets
        >>> from retrodiff.training import Objective, TrainingSet
        >>> objective = Objective(presets.ldm())
        >>> data = TrainingSet.alone(torch.rand(8, 1, 8, 8) * 2 - 1)
        >>> images, query, neighbors = data.batch(torch.arange(4))
        >>> objective(images, query, neighbors).shape  # one loss for each image
        torch.Size([4])
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        found = trainable_modules(model)
        if not any(p.requires_grad for module in found.values() for p in module.parameters()):
            names = [type(part).__name__ for slot in TRAINED if (part := getattr(model, slot))]
            raise ValueError(
                f"no parameter of {' or '.join(names)} requires a gradient, so there is nothing to "
                "train"
            )
        for name, module in found.items():
            self.add_module(name, module)

    def forward(
        self,
        images: Tensor,
        query: Query,
        neighbors: Neighbors,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Loss (b,) of images (b, c, h, w); see `Model.loss`."""
        return self.model.loss(images, query, neighbors, generator)
