"""An embedding for each region of an image, so that every region can have neighbors of its own."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor

from retrodiff.interfaces import Encoder, Fingerprint, TextEncoder, member
from retrodiff.numbers import whole


class Regions(Encoder):
    """Encodes the blocks of a square grid, each as an image of its own.

    A database of such blocks is built with the inner encoder; fingerprints are those of that one.

    Args:
        encoder: of blocks; with a text tower, a prompt is that of every region.
        side: blocks along each side; an image has side * side, in reading order.

    Examples:
        >>> import torch
        >>> from retrodiff.encoders import Regions, TimmEncoder
        >>> regions = Regions(TimmEncoder("test_resnet", image_size=32), side=2)
        >>> regions.encode_image(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 4, 96])
    """

    def __init__(self, encoder: Encoder, side: int) -> None:
        self.encoder, self.side = encoder, whole("side", side)
        if hasattr(encoder, "encode_text"):
            self.encode_text = self._encode_text

    def __repr__(self) -> str:
        return f"Regions({self.encoder!r}, side={self.side})"

    @property
    def dim(self) -> int:
        """Width d of an embedding."""
        return self.encoder.dim

    @property
    def fingerprint(self) -> Fingerprint:
        """The inner encoder's."""
        return self.encoder.fingerprint

    @property
    def identity(self) -> Fingerprint:
        """The inner encoder's."""
        return member(self.encoder, Encoder, "identity")

    @property
    def loaded(self) -> bool:
        """Whether the inner encoder's weights are in memory."""
        return member(self.encoder, Encoder, "loaded")

    def blocks(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> their blocks (b * r, c, h / side, w / side).

        Raises:
            ValueError: they cannot be cut evenly.
        """
        height, width = images.shape[-2:]
        if height % self.side or width % self.side:
            raise ValueError(
                f"images of {height}x{width} cannot be cut into {self.side}x{self.side} regions: "
                "resize them to a multiple"
            )
        pattern = "b c (p h) (q w) -> (b p q) c h w"
        return rearrange(images, pattern, p=self.side, q=self.side).contiguous()

    def encode_image(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, r, d)."""
        found = self.encoder.encode_image(self.blocks(images))
        return found.unflatten(0, (len(images), self.side**2))

    def _encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (b, r, d), the same for every region."""
        inner = self.encoder
        assert isinstance(inner, TextEncoder)
        found = inner.encode_text(prompts).unsqueeze(1)
        return found.expand(-1, self.side**2, -1).contiguous()
