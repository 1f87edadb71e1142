"""Caches the embeddings of images and prompts."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from retrodiff.encoders.prompts import prompt_list
from retrodiff.interfaces import Encoder, Fingerprint, member
from retrodiff.pictures.converting import to_images


class Cached(Encoder):
    """An encoder that encodes the same image or prompt only once.

    The key is the content together with the encoder's fingerprint, so that no answer is stale.

    Args:
        encoder: encodes what is new; with a text tower, so has this one.
        capacity: embeddings kept; the ones unused for longest are forgotten first.

    Examples:
        >>> import torch
        >>> from retrodiff.encoders import Cached, TimmEncoder
        >>> cached = Cached(TimmEncoder("test_resnet", image_size=32))
        >>> cached.encode_image(torch.zeros(2, 3, 32, 32)).shape  # one pass of one image
        torch.Size([2, 96])
    """

    def __init__(self, encoder: Encoder, capacity: int = 100_000):
        self.encoder = encoder
        self.capacity = capacity
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        if hasattr(encoder, "encode_text"):
            self.encode_text = self._encode_text

    @property
    def dim(self) -> int:
        """Width d of an embedding."""
        return self.encoder.dim

    @property
    def fingerprint(self) -> Fingerprint:
        """The wrapped encoder's own: a cache changes no number."""
        return self.encoder.fingerprint

    @property
    def identity(self) -> Fingerprint:
        """The wrapped encoder's own."""
        return member(self.encoder, Encoder, "identity")

    @property
    def loaded(self) -> bool:
        """Whether the weights of the wrapped encoder are in memory."""
        return member(self.encoder, Encoder, "loaded")

    @property
    def preparation(self) -> Callable[[Tensor], Tensor] | None:
        """The wrapped encoder's own."""
        return member(self.encoder, Encoder, "preparation")

    def to(self, device: torch.device | str) -> Cached:
        """Moves the wrapped encoder's weights; returns this one."""
        member(self.encoder, Encoder, "to")(device)
        return self

    def encode_image(self, images: Any) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] of any size -> embeddings (b, d), raw scale."""
        if not isinstance(images, Tensor):
            images = to_images(images)
        return self._look_up(
            [b"image" + _content(image) for image in images],
            lambda new: self.encoder.encode_image(_chosen(images, new)),
        )

    def encode_prepared(self, prepared: Tensor) -> Tensor:
        """Images that `preparation` returned -> embeddings (b, d), raw scale."""
        return self._look_up(
            [b"prepared" + _content(image) for image in prepared],
            lambda new: member(self.encoder, Encoder, "encode_prepared")(prepared[new]),
        )

    def _encode_text(self, prompts: Sequence[str]) -> Tensor:
        prompts = prompt_list(prompts)
        encode: Callable[[list[str]], Tensor] = getattr(self.encoder, "encode_text")  # noqa: B009
        return self._look_up(
            [b"text" + prompt.encode() for prompt in prompts],
            lambda new: encode([prompts[i] for i in new]),
        )

    def _look_up(self, contents: list[bytes], encode: Callable[[list[int]], Tensor]) -> Tensor:
        who = repr(self.encoder.fingerprint).encode()
        keys = [hashlib.sha256(who + content).hexdigest() for content in contents]
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
        if found:
            return torch.stack(found)
        return torch.empty(0, self.dim, dtype=torch.float32, device="cpu")


def _content(image: Tensor) -> bytes:
    """Everything that tells an image from another: type, shape, values."""
    header = f"{image.dtype}{tuple(image.shape)}".encode()
    return header + image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _chosen(images: Tensor | list[Tensor], numbers: list[int]) -> Any:
    return images[numbers] if isinstance(images, Tensor) else [images[i] for i in numbers]
