"""Remembers what an encoder said about images and prompts that it has seen."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from retrodiff.interfaces import Encoder, Fingerprint, TextEncoder


class Cached(Encoder):
    """An encoder that looks at the same image or prompt once.

    The key is the content together with the encoder's weights hash, so nothing in it can be stale.

    Args:
        encoder: the encoder that is asked about what is new; with a text tower, so has this one.
        capacity: embeddings kept; the ones unused for longest are forgotten first.
    """

    def __init__(self, encoder: Encoder, capacity: int = 100_000):
        self.encoder = encoder
        self.capacity = capacity
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        if isinstance(encoder, TextEncoder):
            self.encode_text = self._encode_text

    @property
    def dim(self) -> int:
        """Width d of an embedding."""
        return self.encoder.dim

    @property
    def fingerprint(self) -> Fingerprint:
        """The wrapped encoder's own: a cache changes no number."""
        return self.encoder.fingerprint

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] of any size -> embeddings (b, d), raw scale."""
        header = f"{images.dtype}{tuple(images.shape[1:])}".encode()
        keys = [
            header + image.contiguous().view(torch.uint8).numpy().tobytes()
            for image in images.detach().cpu()
        ]
        return self._look_up(keys, lambda new: self.encoder.encode_image(images[new]))

    def _encode_text(self, prompts: Sequence[str]) -> Tensor:
        assert isinstance(self.encoder, TextEncoder)
        encode = self.encoder.encode_text
        keys = [b"text" + prompt.encode() for prompt in prompts]

        def encode_new(new: list[int]) -> Tensor:
            return encode([str(prompts[i]) for i in new])

        return self._look_up(keys, encode_new)

    def _look_up(self, contents: list[bytes], encode: Callable[[Any], Tensor]) -> Tensor:
        weights = self.encoder.fingerprint.weights.encode()
        keys = [hashlib.sha256(weights + content).hexdigest() for content in contents]
        new = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._known}
        order = sorted(new.values())
        if order:
            for i, embedding in zip(order, encode(order).detach(), strict=True):
                self._known[keys[i]] = embedding
        for key in keys:
            self._known.move_to_end(key)
        found = [self._known[key] for key in keys]
        while len(self._known) > self.capacity:
            self._known.popitem(last=False)
        return torch.stack(found) if found else torch.empty(0, self.dim)
