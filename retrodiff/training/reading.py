"""Reads the images of a training step: in this process, or sent to others that read ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from retrodiff.training.augment import Augmentation, augmented
from retrodiff.training.images import Images, pixels
from retrodiff.training.occasion import Order


@dataclass(frozen=True)
class Reading:
    """Images of a step, as float32 in [-1, 1].

    Args:
        images: all of them.
        targets: which image each row draws; None: row i draws image i.
        order: which rows a step has.
        augment: changes the images.
    """

    images: Images
    targets: Tensor | None
    order: Order
    augment: tuple[Augmentation, ...] = ()

    def __call__(self, step: int, begun: Callable[[int], None]) -> Tensor:
        """The images (b, c, h, w) of a step.

        Images that are a file each are read one by one, so that one which ends its process is
        known by name.
        """
        rows = self.order.mine(self.order.rows(step))
        numbers = rows if self.targets is None else self.targets[rows]
        images = self._images(numbers, begun)
        if not self.augment:
            return images
        occasion = self.order.occasion(step)
        return augmented(self.augment, images, occasion.randomness("augment"))

    def _images(self, numbers: Tensor, begun: Callable[[int], None]) -> Tensor:
        if not hasattr(self.images, "name"):
            begun(int(numbers[0]))
            return pixels(self.images, numbers)
        order = numbers.argsort()  # forward, since archives and disks are faster so
        found: list[Tensor] = []
        for number in numbers[order].split(1):
            begun(int(number))
            found.append(pixels(self.images, number))
        return torch.cat(found)[order.argsort()]

    def name(self, number: int) -> str:
        """What an image is called."""
        own = getattr(self.images, "name", None)
        return f"training image {number}" if own is None else str(own(number))
