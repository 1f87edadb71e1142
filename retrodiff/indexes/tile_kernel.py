"""The Triton kernel of `tile_maxima`: rows are read once, a number per tile and query is written.

This file imports triton: import it inside functions only.
"""

# ruff: noqa: D103 - what the kernel takes is said where it is launched, in `tile_maxima.py`
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def tile_maxima_kernel(
    values,  # (n, D)
    scale,  # (n,)
    queries,  # (b, D)
    out,  # (tiles, b)
    n,
    b,
    groups,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Programs of the same rows run side by side, so that they come from memory once.
    program = tl.program_id(0)
    block, group = program // groups, program % groups
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = group * COLUMNS + tl.arange(0, COLUMNS)
    start = rows.to(tl.int64)[:, None] * D
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for c0 in tl.range(0, D, CHANNELS, num_stages=STAGES):
        c = c0 + tl.arange(0, CHANNELS)
        alive, wanted = (rows < n)[:, None], (columns < b)[None, :]
        if D % CHANNELS != 0:
            alive = alive & (c < D)[None, :]
            wanted = wanted & (c < D)[:, None]
        x = tl.load(values + start + c[None, :], mask=alive, other=0)
        q = tl.load(queries + columns[None, :] * D + c[:, None], mask=wanted, other=0)
        total = tl.dot(x.to(q.dtype), q, total, input_precision="ieee")
    factor = tl.load(scale + rows, mask=rows < n, other=-1.0)[:, None]
    score = tl.where(factor >= 0, total * factor, float("-inf"))
    highest = tl.max(tl.reshape(score, (ROWS // TILE, TILE, COLUMNS)), 1)
    tiles = block * (ROWS // TILE) + tl.arange(0, ROWS // TILE)
    inside = (tiles * TILE < n)[:, None] & (columns < b)[None, :]
    place = tiles.to(tl.int64)[:, None] * b + columns[None, :]
    tl.store(out + place, highest, mask=inside)
