"""Random numbers drawn for each image by itself, whatever batch it is in.

`Randomness` holds one generator for each row of a batch. Components draw with `uniform` and
`normal`, which take it, a plain ``torch.Generator`` for all rows together, or None.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Randomness(torch.Generator):
    """One generator for each row of a batch, so that no row depends on the others.

    Row i of seed s draws from numpy's ``SeedSequence(s, spawn_key=(i, use))``: 128 bits, where
    torch's own CPU generator keeps the last 32 of a seed only. Make one with `of`.

    It is a torch generator, too: a component that knows nothing of rows can hand it to
    ``torch.rand(..., generator=...)``. It then draws for the whole batch at once, and an image
    depends on its batch.

    Args:
        streams: one for each row; `of` makes them.

    Examples:
        >>> import torch
        >>> from retrodiff import Randomness
        >>> from retrodiff.randomness import normal
        >>> both = normal(Randomness.of(7, range(2), "noise"), (2, 3))
        >>> second = normal(Randomness.of(7, [1], "noise"), (1, 3))
        >>> torch.equal(both[1:], second)
        True
    """

    def __new__(cls, streams: Sequence[_Stream]) -> Randomness:
        """A torch generator on the CPU."""
        del streams
        return super().__new__(cls)

    def __init__(self, streams: Sequence[_Stream]) -> None:
        self._streams = tuple(streams)
        if self._streams:
            self.manual_seed(self._streams[0].torch_seed())

    @classmethod
    def of(cls, seed: int, rows: Iterable[int], use: str) -> Randomness:
        """The randomness of some images of a seed.

        Args:
            seed: 0 or more, of any size.
            rows: numbers of the images, 0 or more.
            use: what is drawn, such as ``"noise"``: each use has randomness of its own, so that one
                does not depend on how much another has drawn.
        """
        key = zlib.crc32(use.encode())
        return cls([_Stream(seed, row, key) for row in rows])

    def __len__(self) -> int:
        return len(self._streams)

    def rows(self, rows: Tensor | slice | list[int]) -> Randomness:
        """That of some of the rows; what they draw here is drawn there, too."""
        numbers = torch.arange(len(self))[rows].tolist()
        return Randomness([self._streams[i] for i in numbers])

    def draw(self, shape: Sequence[int], one: Callable[[np.random.Generator], Any]) -> Tensor:
        """``one`` of each row's generator, stacked along b.

        Raises:
            ValueError: the shape is of another number of rows.
        """
        if len(self) != shape[0]:
            raise ValueError(
                f"randomness of {len(self)} rows cannot draw for {shape[0]}: take its own rows, "
                "randomness.rows(...)"
            )
        if not len(self):
            return torch.empty(tuple(shape))
        return torch.from_numpy(np.stack([one(stream.generator) for stream in self._streams]))


class _Stream:
    """One row's generator, made when it is first used."""

    def __init__(self, seed: int, row: int, key: int) -> None:
        self.seed, self.spawn = seed, (row, key)
        self._generator: np.random.Generator | None = None

    @property
    def generator(self) -> np.random.Generator:
        if self._generator is None:
            sequence = np.random.SeedSequence(self.seed, spawn_key=self.spawn)
            self._generator = np.random.Generator(np.random.PCG64(sequence))
        return self._generator

    def torch_seed(self) -> int:
        sequence = np.random.SeedSequence(self.seed, spawn_key=(*self.spawn, 1))
        return int(sequence.generate_state(1)[0])


def uniform(
    generator: torch.Generator | None, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Numbers in [0, 1), on the CPU, or where a torch generator of another device is.

    Args:
        generator: a `Randomness` of b rows, any other torch generator, or None: torch's global one.
        shape: (b, ...).
        dtype: float32 or float64.
    """
    if isinstance(generator, Randomness):
        kind: Any = np.float64 if dtype == torch.float64 else np.float32
        return generator.draw(shape, lambda rng: rng.random(tuple(shape[1:]), kind)).to(dtype)
    device = None if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, device=device, dtype=dtype)


def normal(
    generator: torch.Generator | None, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal numbers; on the CPU, or where a torch generator of another device is.

    Args:
        generator: as for `uniform`.
        shape: (b, ...).
        dtype: of the result; half precisions are drawn in float32, so that they get the same noise.
    """
    drawn = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(generator, Randomness):
        kind: Any = np.float64 if dtype == torch.float64 else np.float32
        noise = generator.draw(shape, lambda rng: rng.standard_normal(tuple(shape[1:]), kind))
    else:
        device = None if generator is None else generator.device
        noise = torch.randn(tuple(shape), generator=generator, device=device, dtype=drawn)
    return noise.to(dtype)


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers of the shape, type and device of ``x`` (b, ...)."""
    return normal(generator, x.shape, x.dtype).to(x.device)
