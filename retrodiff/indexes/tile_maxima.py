"""The highest score in each tile of rows, without a matrix of rows x queries.

On a GPU with Triton one kernel reads the rows once and writes a number per tile and query. Without
it (and on a CPU) products of a few thousand rows are made and reduced at once.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

TILE = 64
"""Rows that share a maximum."""

_SCORES = 2**23  # scores held at a time


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
    if _triton(values):
        return launched(values, scale, queries)
    return multiplied(values, scale, queries)


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
    columns = max(16, min(128, 1 << (b - 1).bit_length()))
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
