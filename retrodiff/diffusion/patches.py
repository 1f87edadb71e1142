"""Neighbors that are seen and not only summed up: the cells of their pictures as tokens."""

# pyright: strict

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from retrodiff.diffusion.conditioner import Wrapper
from retrodiff.interfaces import Conditioner, Context, Neighbors, Query, Tokens
from retrodiff.numbers import whole

PLACE = 3.0
"""What marks a cell's place: large enough to be seen beside latents of unit variance."""


@dataclass(frozen=True)
class NeighborPatches(Wrapper):
    """The cells of the neighbors' pictures as further tokens, beside those of another conditioner.

    An embedding says what a neighbor shows; its latents show how it looks: outlines, colors, where
    things are. Each neighbor's latents (c, h, w) are cut into grid x grid cells, and each cell is a
    token of the stream ``patches``: its numbers, and a one-hot vector of its place. The tokens of
    the inner conditioner get zeros there, so that all streams have one width. The idea of
    IP-Adapter's fine-grained features (Ye et al. 2023), of the neighbors that a database gives.

    A token that is no row of the database (index -1, the prompt) has no picture: its patches are
    masked. `Dropped` goes around it.

    Args:
        conditioner: what gives the tokens of query and neighbors.
        channels: c of the latents, as the denoiser sees them.
        size: h = w of the latents.
        grid: cells along each side; it divides ``size``.

    Raises:
        ValueError: ``size`` cannot be cut into ``grid`` cells.

    Examples:
        >>> from retrodiff.diffusion import NeighborPatches, PromptAndNeighbors
        >>> NeighborPatches(PromptAndNeighbors("unit"), channels=16, size=8, grid=4).widths(192)
        {'query': 272, 'neighbors': 272, 'patches': 272}
    """

    conditioner: Conditioner
    channels: int
    size: int
    grid: int

    def __post_init__(self) -> None:
        whole("channels", self.channels)
        whole("size", self.size)
        if self.size % whole("grid", self.grid):
            raise ValueError(f"size={self.size} cannot be cut into grid={self.grid} cells a side")

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """That of the denoiser's latents."""
        return self.channels, self.size, self.size

    @property
    def extra(self) -> int:
        """Numbers of a cell and of its place."""
        return self.channels * (self.size // self.grid) ** 2 + self.grid**2

    def widths(self, dim: int) -> dict[str, int]:
        """The inner streams and ``patches``, all of one width.

        Raises:
            ValueError: the inner streams have several widths.
        """
        inner = self.conditioner.widths(dim)
        if len(set(inner.values())) > 1:
            raise ValueError(f"the streams {inner} have several widths: wrap them in Projected")
        width = max(inner.values(), default=0) + self.extra
        return dict.fromkeys([*inner, "patches"], width)

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """The inner context, wider, and k * grid² tokens of the neighbors' pictures.

        Raises:
            ValueError: the neighbors have no latents, or those of another shape.
        """
        inner = self.conditioner.condition(query, replace(neighbors, latents=None))
        latents, shape = neighbors.latents, self.latents_shape
        if latents is None or latents.ndim != 5 or tuple(latents.shape[2:]) != shape:
            found = "none" if latents is None else f"those of shape {tuple(latents.shape[2:])}"
            raise ValueError(
                f"NeighborPatches sees latents {shape}, but the neighbors have {found}"
            )
        cells = rearrange(
            latents, "b k c (y p) (x q) -> b k (y x) (c p q)", y=self.grid, x=self.grid
        )
        place = PLACE * torch.eye(self.grid**2).to(cells).expand(*cells.shape[:2], -1, -1)
        rows = neighbors.indices >= 0
        if neighbors.mask is not None:
            rows = rows & neighbors.mask
        values = torch.cat([cells, place], -1) * rows[..., None, None]
        mask = rows.repeat_interleave(self.grid**2, -1)
        # Without a picture its patches are the null condition, as dropping shows them in training.
        mask = mask | ~mask.any(-1, keepdim=True)
        wide = next((t.values.shape[-1] for t in inner.streams.values()), 0)
        patches = F.pad(rearrange(values, "b k n d -> b (k n) d"), (wide, 0))
        return self._with(inner, Tokens(patches, mask))

    def null(self, context: Context) -> Context:
        """The inner null, and patches of zeros."""
        return self._with(
            self.conditioner.null(self._inner(context)), context.streams["patches"].zeros()
        )

    def drop(self, context: Context, generator: torch.Generator | None = None) -> Context:
        """What the inner conditioner shows in training, and all patches."""
        inner = self.conditioner.drop(self._inner(context), generator)
        return self._with(inner, context.streams["patches"])

    def _with(self, inner: Context, patches: Tokens) -> Context:
        streams = {
            name: replace(t, values=self._padded(t.values)) for name, t in inner.streams.items()
        }
        return replace(inner, streams={**streams, "patches": patches})

    def _padded(self, values: Tensor) -> Tensor:
        return F.pad(values, (0, self.extra))

    def _inner(self, context: Context) -> Context:
        streams = {
            name: replace(t, values=t.values[..., : -self.extra])
            for name, t in context.streams.items()
            if name != "patches"
        }
        return replace(context, streams=streams)
