"""Small components that tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrodiff.builder import Builder
from retrodiff.diffusion import ClassifierFree, DPMpp2M, Dropped, EDMDenoiser, NeighborEmbeddings
from retrodiff.interfaces import Database, Fingerprint, TextEncoder
from retrodiff.networks.dit import DiT

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared folder is not here")


class HashingEncoder(TextEncoder):
    """A random projection of pixels, and of characters: a text encoder that costs nothing."""

    def __init__(self, dim: int = 8, seed: int = 0) -> None:
        self._dim, self.seed = dim, seed

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            encoder="random", weights=str(self.seed), preprocessing="none", dim=self.dim
        )

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        generator = torch.Generator().manual_seed(self.seed)
        return flat @ torch.randn(flat.shape[1], self.dim, generator=generator)

    def encode_text(self, prompts: list[str]) -> torch.Tensor:
        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
            rows.append(torch.randn(self.dim, generator=generator))
        return torch.stack(rows)


def small_network(dim: int = 8, stream: str = "neighbors") -> DiT:
    torch.manual_seed(0)
    net = DiT(shape=(1, 8, 8), patch=4, width=16, depth=1, heads=2, widths={stream: dim})
    for parameter in net.parameters():  # no zero-initialized output: results must differ
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def small_recipe(encoder: HashingEncoder, database: Database) -> Builder:
    """A model of the smallest network, not built yet."""
    return (
        Builder()
        .encoder(encoder)
        .database(database)
        .conditioner(Dropped(NeighborEmbeddings("raw"), 0.1))
        .denoiser(EDMDenoiser(small_network()))
        .sampler(DPMpp2M())
        .guidance(ClassifierFree(2.0))
        .defaults(k=4, steps=3)
    )
