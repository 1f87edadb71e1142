"""Runs an encoder's network on images or tokens, batch after batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from retrodiff.pictures.converting import CHANNELS, to_batch, to_images
from retrodiff.precision import full_precision


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """No gradients, no autocast and evaluation mode, until the end of the block.

    Embeddings that a database stores and those that are asked of it must be of one precision.
    """
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), full_precision():
            yield
    finally:
        module.train(training)


def prepared(
    images: Any, prepare: Callable[[Tensor], Tensor], batch_size: int, channels: int = 3
) -> Iterator[Tensor]:
    """Images of any kind -> batches of what a network takes, prepared where the images are.

    Args:
        images: whatever `retrodiff.pictures.to_images` takes; of numbers of channels that it does
            not know, float tensors (b, c, h, w) only.
        prepare: the preprocessing.
        batch_size: images per batch.
        channels: of an image.
    """
    if channels not in CHANNELS:
        for part in images.split(batch_size):
            yield prepare(part)
    elif isinstance(images, Tensor):
        for part in to_batch(images).split(batch_size):
            yield prepare(part)
    elif len(images := to_images(images)):
        for start in range(0, len(images), batch_size):
            some = images[start : start + batch_size]
            yield torch.cat([prepare(image[None]) for image in some])


def embedded(
    run: Callable[[Tensor], Tensor], module: nn.Module, parts: Iterable[Tensor], dim: int, what: str
) -> Tensor:
    """Batches -> embeddings (b, d), float32 on the CPU, wherever the network is.

    Args:
        run: the network.
        module: that has its weights.
        parts: prepared images, or tokens; they are moved to the weights, floats in their dtype.
        dim: width d.
        what: what a row of them is called, ``image`` or ``prompt``.

    Raises:
        ValueError: an embedding is not finite.
    """
    found = [torch.empty(0, dim, dtype=torch.float32, device="cpu")]
    with inference(module):
        weight = next(module.parameters())
        for part in parts:
            if len(part):
                dtype = weight.dtype if part.is_floating_point() else None
                found.append(run(part.to(weight.device, dtype)).float().cpu())
    out = torch.cat(found)
    bad = (~out.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the encoder gives NaN or infinity for {what} {bad[0]} ({len(bad)} of {len(out)}): "
            "are its weights damaged, or its dtype too narrow?"
        )
    return out
