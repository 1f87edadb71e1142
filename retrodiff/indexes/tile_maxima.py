"""The highest score in each tile of rows, without a matrix of rows x queries.

On a GPU with Triton one kernel reads the rows once and writes a number per tile and query. Without
it (and on a CPU) products of a few thousand rows are made and reduced at once. The first call of
each class of shapes compares some tiles with the products in float64: exact search relies on it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrodiff.indexes.candidates import float_margin
from retrodiff.kernel_trials import Finding, Trials

TILE = 64
"""Rows that share a maximum."""

TRIALS = Trials(
    "the search kernel",
    "Products in PyTorch (the same neighbors, slower)",
    "Another version of triton or torch may mend it",
)

_SCORES = 2**23  # scores held at a time
_COMPARED = 256  # tiles that a check looks at


def tile_maxima(
    values: Tensor,  # (n, d)
    scale: Tensor,  # (n,)
    queries: Tensor,  # (b, d)
) -> Tensor:
    """The maximum of ``values @ queries.T * scale`` over each tile of rows: (tiles, b) float32.

    Args:
        values: float16, bfloat16 or int8.
        scale: float32; a row with a negative scale counts as -inf.
        queries: float32 on a CPU; on a GPU bfloat16 with bfloat16 rows, else float16.
    """
    if not _triton(values):
        return multiplied(values, scale, queries)
    return TRIALS.run(
        TileClass.of(values, scale, queries),
        values.device,
        lambda: launched(values, scale, queries),
        lambda: multiplied(values, scale, queries),
        lambda out: [judged(out, values, scale, queries)],
    )


class TileClass(NamedTuple):
    """What decides which code is compiled: types, widths, and how numbers and bytes are divided."""

    device: torch.device
    types: tuple[torch.dtype, ...]
    width: int
    columns: int
    kinds: tuple[bool, ...]

    @classmethod
    def of(cls, values: Tensor, scale: Tensor, queries: Tensor) -> TileClass:
        """The class of a call."""
        (n, d), b = values.shape, len(queries)
        starts = (t.data_ptr() for t in (values, scale, queries))
        kinds = (*(i % 16 == 0 for i in (n, b, *starts)), b == 1, b > 128)
        return cls(values.device, (values.dtype, queries.dtype), d, _columns(b), kinds)

    def __str__(self) -> str:
        cuda = self.device.type == "cuda"
        place = torch.cuda.get_device_name(self.device) if cuda else str(self.device)
        rows, queries = (str(dtype).removeprefix("torch.") for dtype in self.types)
        return f"{place} with rows in {rows} and queries in {queries}, {self.width} wide"


def judged(found: Tensor, values: Tensor, scale: Tensor, queries: Tensor) -> Finding:
    """The worst of some tiles, the first and the last among them, against float64.

    The bound is what exact search allows for: see `ResidentIndex`.
    """
    n, d = values.shape
    tiles = torch.linspace(0, len(found) - 1, min(len(found), _COMPARED), device=values.device)
    tiles = tiles.round().long()
    rows = tiles[:, None] * TILE + torch.arange(TILE, device=values.device)
    factor = torch.where(rows < n, scale[rows.clamp_max(n - 1)], -1.0).double()
    unit = values[rows.clamp_max(n - 1)].double() * factor[..., None]  # (tiles, TILE, d)
    wide = queries.double()
    scores = (unit @ wide.T).masked_fill_(factor[..., None] < 0, -torch.inf)
    exact = scores.amax(1)
    size = unit.norm(dim=2).amax(1)[:, None] * wide.norm(dim=1)
    got = found[tiles].double()
    off = torch.where(got == exact, 0, (got - exact).abs() / size.clamp_min(1e-30))
    error = off.nan_to_num(nan=torch.inf).max().item()
    return Finding(part="the highest score of a tile", error=error, allowed=2 * float_margin(d))


def multiplied(values: Tensor, scale: Tensor, queries: Tensor) -> Tensor:
    """`tile_maxima` in plain PyTorch."""
    n, b = len(values), len(queries)
    out = torch.empty(-(-n // TILE), b, dtype=torch.float32, device=values.device)
    step = max(_SCORES // (b * TILE), 1) * TILE
    for start in range(0, n, step):
        part, factor = values[start : start + step], scale[start : start + step, None]
        scores = _product(part, queries).mul_(factor).masked_fill_(factor < 0, -torch.inf)
        if len(part) % TILE:
            rest = scores.new_full((-len(part) % TILE, b), -torch.inf)
            scores = torch.cat([scores, rest])
        first = start // TILE
        out[first : first + len(scores) // TILE] = scores.view(-1, TILE, b).amax(1)
    return out


def launched(
    values: Tensor, scale: Tensor, queries: Tensor, sizes: tuple[int, int, int] | None = None
) -> Tensor:
    """`tile_maxima` by the Triton kernel.

    Args:
        values: (n, d).
        scale: (n,).
        queries: (b, d).
        sizes: rows of a program, channels read at a time, stages; None: what suits the device.
    """
    from retrodiff.indexes.tile_kernel import tile_maxima_kernel

    (n, d), b = values.shape, len(queries)
    columns = _columns(b)
    rows, channels, stages = sizes or launch_sizes(_shared_memory(values.device), columns)
    out = torch.empty(-(-n // TILE), b, dtype=torch.float32, device=values.device)
    groups = -(-b // columns)
    kernel: Any = tile_maxima_kernel
    kernel[(-(-n // rows) * groups,)](
        values,
        scale,
        queries,
        out,
        n,
        b,
        groups,
        D=d,
        ROWS=rows,
        TILE=TILE,
        COLUMNS=columns,
        CHANNELS=channels,
        STAGES=stages,
        num_warps=8 if rows * columns >= 128 * 128 else 4,
    )
    return out


def _columns(queries: int) -> int:
    """Queries of a program."""
    return max(16, min(128, 1 << (queries - 1).bit_length()))


def launch_sizes(shared: int, columns: int) -> tuple[int, int, int]:
    """Rows of a program, channels at a time and stages that fit into so much shared memory."""
    channels = 64
    for rows in (256, 128, 64):
        stages = shared // ((rows + columns) * channels * 2)
        if stages >= 3 or rows == 64:
            return rows, channels, max(2, min(stages, 4))
    raise AssertionError


def _product(part: Tensor, queries: Tensor) -> Tensor:
    """Scores (n, b) in float32; of halves on a GPU by its tensor cores, added up in float32."""
    if part.device.type == "cuda" and _mm_widens():
        return torch.mm(part.to(queries.dtype), queries.T, out_dtype=torch.float32)
    # TF32, where it is allowed, takes halves as they are.
    return part.float() @ queries.T.float()


@functools.cache
def _mm_widens() -> bool:
    """Whether torch.mm of halves can give float32."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return (major, minor) >= (2, 8)


def _triton(values: Tensor) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return values.device.type == "cuda" or interpreted


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 100_000
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 100_000))
