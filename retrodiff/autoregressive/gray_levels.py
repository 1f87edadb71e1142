"""Small gray pictures as codes without a trained first stage: each pixel's level is its code."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from retrodiff.numbers import whole


@dataclass(frozen=True)
class GrayLevels:
    """Images (b, 1, h, w) in [-1, 1] <-> codes (b, h, w), the nearest of evenly spaced grays.

    Args:
        levels: of gray, black and white among them: 17 for scikit-learn's digits, 256 for bytes.

    Examples:
        >>> import torch
        >>> from retrodiff.autoregressive import GrayLevels
        >>> grays = GrayLevels(3)  # black, gray, white
        >>> grays.codes(torch.tensor([[[[-1.0, 0.1, 0.9]]]])).tolist()
        [[[0, 1, 2]]]
        >>> grays.decode_codes(torch.tensor([[[0, 1, 2]]])).tolist()
        [[[[-1.0, 0.0, 1.0]]]]
    """

    levels: int

    def __post_init__(self) -> None:
        whole("levels", self.levels, 2, 65536)

    @property
    def vocabulary(self) -> int:
        """Number of codes."""
        return self.levels

    def codes(self, images: Tensor) -> Tensor:
        """Images -> numbers of their levels, 0 is black.

        Raises:
            ValueError: the images have colors.
        """
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, gray levels are of (b, 1, h, w): hand "
                "in gray images, or take a VQAutoencoder for images in color"
            )
        scaled = (images[:, 0] + 1) / 2 * (self.levels - 1)
        return scaled.round().long().clamp(0, self.levels - 1)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Numbers of levels -> images, float32."""
        return (codes.float() / (self.levels - 1) * 2 - 1).unsqueeze(1)
