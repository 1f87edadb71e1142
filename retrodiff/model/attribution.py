"""Which neighbor painted which region of a sample: shares of attention, and a picture of them."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Generator as Yields
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from retrodiff.attention.recording import MEASURES, Measure, Recorder, layers, recording
from retrodiff.components import modules
from retrodiff.diffusion.generator import DiffusionGenerator
from retrodiff.interfaces import Context, Generator, Neighbors, Value

NEIGHBORS, QUERY, PATCHES = "neighbors", "query", "patches"
"""Streams that conditioners make of neighbors, of the query, and of the neighbors' pictures."""

MEASURE: Measure = "removal"
"""What is recorded unless another measure is asked for; see benchmarks/attribution.py."""


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Value):
    """The part that each neighbor has in each region of some images.

    Averaged over the layers of the network that attend to neighbors, their heads, and the steps of
    the sampler, each counting alike (`retrodiff.attention.Recorder`). The null branch of guidance
    takes no part. It says where the network looked, which is evidence of what a neighbor does to
    the picture, not a measurement of it: *Attribution* in the documentation has both compared.

    Args:
        grid: (b, k, h, w) on the grid of the latents: the share of each neighbor among the
            neighbors, which sum to 1 at each position; 0 where a column holds no row of the
            database, or an image has no neighbors.
        streams: (b, h, w) by name: the share of all tokens of a kind, which sum to 1. ``query``
            are tokens made of the query, such as a prompt that is its own neighbor.
        size: (h, w) of the images.
        measure: what was averaged.
    """

    grid: Tensor
    streams: Mapping[str, Tensor]
    size: tuple[int, int]
    measure: Measure

    def __len__(self) -> int:
        return len(self.grid)

    @property
    def weights(self) -> Tensor:
        """Shares (b, k, h, w) of the neighbors, enlarged to the images; they sum to 1 over k."""
        wide = F.interpolate(self.grid, self.size, mode="bilinear")
        return wide / wide.sum(1, keepdim=True).clamp(min=torch.finfo().tiny)

    @property
    def means(self) -> Tensor:
        """Shares (b, k) of the neighbors in the whole image."""
        return self.grid.mean((-2, -1))

    def rows(self, rows: Tensor) -> Attribution:
        """That of some of the images."""
        streams = {name: share[rows] for name, share in self.streams.items()}
        return Attribution(self.grid[rows], streams, self.size, self.measure)


def read_measure(attribution: object) -> Measure | None:
    """The measure that the argument of `Model.sample` stands for; None for no attribution.

    Raises:
        ValueError: it is neither True, False nor a measure.
    """
    if attribution is None or isinstance(attribution, bool):
        return MEASURE if attribution else None
    if attribution not in MEASURES:
        raise ValueError(
            f"attribution={attribution!r}: give True, False, or one of {', '.join(MEASURES)}"
        )
    return attribution


class Attributing:
    """Records the attribution of a request's images, batch after batch.

    Args:
        generator: makes the images.
        measure: what counts as a part; see `retrodiff.attention.Recorder`.

    Raises:
        ValueError: the generator's network does not attend to neighbors.
    """

    def __init__(self, generator: Generator, measure: Measure) -> None:
        self.networks = (
            modules(generator.denoiser) if isinstance(generator, DiffusionGenerator) else []
        )
        if not layers(self.networks):
            name = type(getattr(generator, "denoiser", generator)).__name__
            raise ValueError(
                f"attribution needs a network that attends to neighbors, which {name} does not: "
                "leave attribution out"
            )
        self.measure: Measure = measure
        self.order = list(generator.widths)
        self.grid = cast("tuple[int, int]", tuple(generator.shape[1:]))
        self._rows: list[int] = []
        self._parts: list[tuple[Tensor, dict[str, Tensor]]] = []

    @contextmanager
    def part(self, rows: list[int], context: Context, neighbors: Neighbors) -> Yields[None]:
        """Records what runs in this block.

        Args:
            rows: numbers of the images.
            context: of these images.
            neighbors: of all images.
        """
        tokens = self._tokens(context)
        k = tokens.get(NEIGHBORS, 0)
        if not 0 < k <= neighbors.k:
            raise ValueError(
                f"attribution needs a token for each neighbor, but the conditioner makes streams "
                f"{tokens} of {neighbors.k} neighbors: leave attribution out"
            )
        with recording(self.networks, len(rows), self.grid, self.measure) as recorder:
            yield
        self._rows += rows
        self._parts.append(self._divided(recorder, tokens, neighbors.indices[rows][..., :k]))

    def result(self, size: tuple[int, int], width: int) -> Attribution:
        """The attribution of all images, in their order.

        Args:
            size: (h, w) of the images.
            width: neighbors of an image at most.
        """
        back = torch.tensor(self._rows).argsort()
        names = list(dict.fromkeys(name for _, streams in self._parts for name in streams))
        grid = [F.pad(part, (0, 0, 0, 0, 0, width - part.shape[1])) for part, _ in self._parts]
        streams = {
            name: torch.cat([s.get(name, part.new_zeros(part[:, 0].shape)) for part, s in parts])
            for name, parts in ((name, self._parts) for name in names)
        }
        whole = {name: share[back] for name, share in streams.items()}
        return Attribution(torch.cat(grid)[back], whole, size, self.measure)

    def _tokens(self, context: Context) -> dict[str, int]:
        return {name: context.streams[name].values.shape[-2] for name in self.order}

    def _divided(
        self, recorder: Recorder, tokens: Mapping[str, int], indices: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Shares of the neighbors among themselves, and of each kind of token among all."""
        parts = dict(zip(tokens, recorder.shares.split(list(tokens.values()), 1), strict=True))
        near = parts.pop(NEIGHBORS)
        if PATCHES in parts:  # those of one neighbor after those of the other
            near = near + parts.pop(PATCHES).unflatten(1, (near.shape[1], -1)).sum(2)
        streams = {name: share.sum(1) for name, share in parts.items()}
        # With regions a column is the query's if it is in all of them.
        own = indices < 0 if indices.ndim == 2 else (indices < 0).all(1)
        own = own.cpu()[..., None, None]
        if bool(own.any()):
            asked = (near * own).sum(1)
            streams[QUERY] = streams[QUERY] + asked if QUERY in streams else asked
        near = near * ~own
        total = near.sum(1, keepdim=True)
        streams[NEIGHBORS] = total[:, 0]
        return torch.where(total > 0, near / total.clamp(min=torch.finfo().tiny), 0), streams
