"""The Triton kernels of absorbed neighbor cross-attention: one forward, two backward.

Forward: a program owns a tile of rows, takes their mean and deviation, multiplies the normalized
rows by the thin table m, takes softmaxes of k numbers, multiplies by u, adds bias and x, and writes
once; x comes from memory once, the second and third look at it from the cache.
Backward: `backward_rows` does the same for the gradient of x and leaves the attention and its
gradient (thin) behind; `backward_tables` sums them over the rows into the gradients of m, u, the
offset and the bias. LayerNorm's two row means need no pass of their own: with s = y · m and dy = ds
· mᵀ, mean(dy) = ds · mean(m) and mean(dy · y) = ds · s / c.

A head's k columns are padded to a power of two (KP), heads to groups of HG; a table is stored
without padding. With more than one group the attention goes through `scratch` (kept by the cache),
and the product with u needs no padding at all.

This file imports triton: import it inside functions only.
"""

# ruff: noqa: D103 - what a kernel takes is said where it is launched, in `fused.py`
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _positions(tile, region, size, block_width, row_width, grid_width, BN: tl.constexpr):
    """Rows of a tile of one region: where they lie among the n positions, and which exist."""
    index = tile * BN + tl.arange(0, BN)
    start = (region // grid_width) * (size // block_width) * row_width
    start += (region % grid_width) * block_width
    return start + (index // block_width) * row_width + index % block_width, index < size


@triton.jit
def _columns(group, K: tl.constexpr, H: tl.constexpr, KP: tl.constexpr, HG: tl.constexpr):
    """Columns of a group of heads: their row in the tables, and which exist."""
    j = tl.arange(0, HG * KP)
    head = group * HG + j // KP
    return head * K + j % KP, (head < H) & (j % KP < K)


@triton.jit
def _narrow(value, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Float32 in another dtype, rounded to nearest even (the interpreter cuts bfloat16 off)."""
    if PRECISION == "interpreted" and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _load_rows(ptr, rows, alive, c0, C: tl.constexpr, BC: tl.constexpr):
    """(BN, BC) float32 of rows of c numbers."""
    cols = c0 + tl.arange(0, BC)
    mask = alive[:, None]
    if C % BC != 0:
        mask = mask & (cols < C)[None, :]
    return tl.load(ptr + rows[:, None] * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_table(ptr, j, valid, c0, C: tl.constexpr, BC: tl.constexpr):
    """(J, BC) of a table, in its own dtype."""
    cols = c0 + tl.arange(0, BC)
    mask = valid[:, None]
    if C % BC != 0:
        mask = mask & (cols < C)[None, :]
    return tl.load(ptr + j[:, None] * C + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(
    ptr, rows, alive, c0, value, C: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr
):
    cols = c0 + tl.arange(0, BC)
    mask = alive[:, None]
    if C % BC != 0:
        mask = mask & (cols < C)[None, :]
    value = _narrow(value, ptr.dtype.element_ty, PRECISION)
    tl.store(ptr + rows[:, None] * C + cols[None, :], value, mask=mask)


@triton.jit
def _load_vector(ptr, c0, C: tl.constexpr, BC: tl.constexpr):
    cols = c0 + tl.arange(0, BC)
    return tl.load(ptr + cols, mask=cols < C, other=0.0).to(tl.float32)


@triton.jit
def _moments(
    x,
    rows,
    alive,
    eps,
    C: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Mean and 1 / deviation of each row, by chunks joined as in Chan et al. 1983: stable."""
    mean = tl.zeros((BN,), tl.float32)
    squares = tl.zeros((BN,), tl.float32)
    for c0 in tl.range(0, C, BC, num_stages=STAGES):
        value = _load_rows(x, rows, alive, c0, C, BC)
        count = tl.minimum(C - c0, BC) * 1.0
        part = tl.sum(value, 1) / count
        centered = value - part[:, None]
        if C % BC != 0:
            centered = tl.where((c0 + tl.arange(0, BC) < C)[None, :], centered, 0.0)
        delta = part - mean
        share = count / (c0 + count)
        mean += delta * share
        squares += tl.sum(centered * centered, 1) + delta * delta * (c0 * share)
    return mean, 1.0 / tl.sqrt_rn(squares / C + eps)


@triton.jit
def _normalized(x, rows, alive, mean, rstd, c0, C: tl.constexpr, BC: tl.constexpr):
    value = (_load_rows(x, rows, alive, c0, C, BC) - mean[:, None]) * rstd[:, None]
    if C % BC != 0:
        value = tl.where((c0 + tl.arange(0, BC) < C)[None, :], value, 0.0)
    return value


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """Total + a · b; the interpreter cannot multiply bfloat16 and gets exact float32 copies."""
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _softmax(scores, BN: tl.constexpr, HG: tl.constexpr, KP: tl.constexpr):
    """Softmax over each head's columns; a head with none left gives zeros."""
    split = tl.reshape(scores, (BN, HG, KP))
    top = tl.max(split, 2)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(split - top[:, :, None])
    total = tl.sum(weight, 2)
    total = tl.where(total < 0.5, 1.0, total)
    return tl.reshape(weight / total[:, :, None], (BN, HG * KP))


@triton.jit
def forward_kernel(
    x,
    m,
    offset,
    u,
    bias,
    out,
    scratch,
    n,
    size,
    live,
    block_width,
    row_width,
    grid_width,
    eps,
    C: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    KP: tl.constexpr,
    HG: tl.constexpr,
    GROUPS: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BJ: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    J: tl.constexpr = H * K
    region = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    rows, alive = _positions(tl.program_id(0), region, size, block_width, row_width, grid_width, BN)
    x += sample * n * C
    out += sample * n * C
    if sample >= live:
        for c0 in tl.range(0, C, BC, num_stages=STAGES):
            value = _load_rows(x, rows, alive, c0, C, BC) + _load_vector(bias, c0, C, BC)[None, :]
            _store_rows(out, rows, alive, c0, value, C, BC, PRECISION)
    else:
        table = sample * tl.num_programs(1) + region
        m += table * J * C
        u += table * J * C
        offset += table * J
        scratch += sample * n * J
        dtype = m.dtype.element_ty
        mean, rstd = _moments(x, rows, alive, eps, C, BC, BN, STAGES)
        attention = tl.zeros((BN, HG * KP), dtype)
        for group in range(GROUPS):
            j, valid = _columns(group, K, H, KP, HG)
            scores = tl.zeros((BN, HG * KP), tl.float32)
            for c0 in tl.range(0, C, BC, num_stages=STAGES):
                y = _normalized(x, rows, alive, mean, rstd, c0, C, BC)
                y = _narrow(y, dtype, PRECISION)
                tile = _load_table(m, j, valid, c0, C, BC)
                scores = _dot(y, tl.trans(tile), scores, PRECISION)
            scores += tl.load(offset + j, mask=valid, other=float("-inf"))[None, :]
            attention = _narrow(_softmax(scores, BN, HG, KP), dtype, PRECISION)
            if GROUPS > 1:
                where = scratch + rows[:, None] * J + j[None, :]
                tl.store(where, attention, mask=alive[:, None] & valid[None, :])
        if GROUPS > 1:
            tl.debug_barrier()
        for c0 in tl.range(0, C, BC, num_stages=STAGES):
            value = tl.zeros((BN, BC), tl.float32) + _load_vector(bias, c0, C, BC)[None, :]
            if GROUPS == 1:
                j, valid = _columns(0, K, H, KP, HG)
                tile = _load_table(u, j, valid, c0, C, BC)
                value = _dot(attention, tile, value, PRECISION)
            else:
                for j0 in range(0, J, BJ):
                    j = j0 + tl.arange(0, BJ)
                    some = tl.load(
                        scratch + rows[:, None] * J + j[None, :],
                        mask=alive[:, None] & (j < J)[None, :],
                        other=0.0,
                    )
                    tile = _load_table(u, j, j < J, c0, C, BC)
                    value = _dot(some, tile, value, PRECISION)
            # x comes last: the products would else be rounded to its size, one after the other.
            value += _load_rows(x, rows, alive, c0, C, BC)
            _store_rows(out, rows, alive, c0, value, C, BC, PRECISION)


@triton.jit
def backward_rows_kernel(
    grad,
    x,
    m,
    m_mean,
    offset,
    u,
    grad_x,
    attention,
    grad_scores,
    mean_of,
    rstd_of,
    n,
    size,
    live,
    block_width,
    row_width,
    grid_width,
    eps,
    C: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    KP: tl.constexpr,
    HG: tl.constexpr,
    GROUPS: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BJ: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    J: tl.constexpr = H * K
    region = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    rows, alive = _positions(tl.program_id(0), region, size, block_width, row_width, grid_width, BN)
    x += sample * n * C
    grad += sample * n * C
    grad_x += sample * n * C
    if sample >= live:
        for c0 in tl.range(0, C, BC, num_stages=STAGES):
            _store_rows(
                grad_x, rows, alive, c0, _load_rows(grad, rows, alive, c0, C, BC), C, BC, PRECISION
            )
    else:
        table = sample * tl.num_programs(1) + region
        m += table * J * C
        u += table * J * C
        m_mean += table * J
        offset += table * J
        attention += sample * n * J
        grad_scores += sample * n * J
        dtype = m.dtype.element_ty
        mean, rstd = _moments(x, rows, alive, eps, C, BC, BN, STAGES)
        tl.store(mean_of + sample * n + rows, mean, mask=alive)
        tl.store(rstd_of + sample * n + rows, rstd, mask=alive)
        mean_dy = tl.zeros((BN,), tl.float32)
        mean_dyy = tl.zeros((BN,), tl.float32)
        ds = tl.zeros((BN, HG * KP), dtype)
        for group in range(GROUPS):
            j, valid = _columns(group, K, H, KP, HG)
            scores = tl.zeros((BN, HG * KP), tl.float32)
            dp = tl.zeros((BN, HG * KP), tl.float32)
            for c0 in tl.range(0, C, BC, num_stages=STAGES):
                y = _normalized(x, rows, alive, mean, rstd, c0, C, BC)
                y = _narrow(y, dtype, PRECISION)
                tile = _load_table(m, j, valid, c0, C, BC)
                scores = _dot(y, tl.trans(tile), scores, PRECISION)
                g = _narrow(_load_rows(grad, rows, alive, c0, C, BC), dtype, PRECISION)
                tile = _load_table(u, j, valid, c0, C, BC)
                dp = _dot(g, tl.trans(tile), dp, PRECISION)
            shift = tl.load(offset + j, mask=valid, other=float("-inf"))
            p = _softmax(scores + shift[None, :], BN, HG, KP)
            where = rows[:, None] * J + j[None, :]
            exists = alive[:, None] & valid[None, :]
            tl.store(attention + where, _narrow(p, dtype, PRECISION), mask=exists)
            p3 = tl.reshape(p, (BN, HG, KP))
            dp3 = tl.reshape(dp, (BN, HG, KP))
            ds3 = p3 * (dp3 - tl.sum(p3 * dp3, 2)[:, :, None])
            ds = _narrow(tl.reshape(ds3, (BN, HG * KP)), dtype, PRECISION)
            tl.store(grad_scores + where, ds, mask=exists)
            wide = ds.to(tl.float32)
            column_mean = tl.load(m_mean + j, mask=valid, other=0.0)
            mean_dy += tl.sum(wide * column_mean[None, :], 1)
            mean_dyy += tl.sum(wide * scores, 1) / C
        if GROUPS > 1:
            tl.debug_barrier()
        for c0 in tl.range(0, C, BC, num_stages=STAGES):
            dy = tl.zeros((BN, BC), tl.float32)
            if GROUPS == 1:
                j, valid = _columns(0, K, H, KP, HG)
                tile = _load_table(m, j, valid, c0, C, BC)
                dy = _dot(ds, tile, dy, PRECISION)
            else:
                for j0 in range(0, J, BJ):
                    j = j0 + tl.arange(0, BJ)
                    some = tl.load(
                        grad_scores + rows[:, None] * J + j[None, :],
                        mask=alive[:, None] & (j < J)[None, :],
                        other=0.0,
                    )
                    tile = _load_table(m, j, j < J, c0, C, BC)
                    dy = _dot(some, tile, dy, PRECISION)
            y = _normalized(x, rows, alive, mean, rstd, c0, C, BC)
            dx = (dy - mean_dy[:, None] - y * mean_dyy[:, None]) * rstd[:, None]
            dx += _load_rows(grad, rows, alive, c0, C, BC)
            _store_rows(grad_x, rows, alive, c0, dx, C, BC, PRECISION)


@triton.jit
def backward_tables_kernel(
    grad,
    x,
    attention,
    grad_scores,
    mean_of,
    rstd_of,
    grad_m,
    grad_offset,
    grad_u,
    grad_bias,
    n,
    size,
    regions,
    block_width,
    row_width,
    grid_width,
    C: tl.constexpr,
    J: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BJ: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    c0 = tl.program_id(0) * BC
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    table = tl.program_id(2).to(tl.int64)
    sample = table // regions
    region = (table % regions).to(tl.int32)
    x += sample * n * C
    grad += sample * n * C
    attention += sample * n * J
    grad_scores += sample * n * J
    dtype = attention.dtype.element_ty
    dm = tl.zeros((BJ, BC), tl.float32)
    du = tl.zeros((BJ, BC), tl.float32)
    total = tl.zeros((BC,), tl.float32)
    shift = tl.zeros((BJ,), tl.float32)
    for tile in tl.range(0, tl.cdiv(size, BN), num_stages=STAGES):
        rows, alive = _positions(tile, region, size, block_width, row_width, grid_width, BN)
        mean = tl.load(mean_of + sample * n + rows, mask=alive, other=0.0)
        rstd = tl.load(rstd_of + sample * n + rows, mask=alive, other=0.0)
        where = rows[None, :] * J + j[:, None]
        exists = alive[None, :] & (j < J)[:, None]
        ds = tl.load(grad_scores + where, mask=exists, other=0.0)
        p = tl.load(attention + where, mask=exists, other=0.0)
        y = _normalized(x, rows, alive, mean, rstd, c0, C, BC)
        y = _narrow(y, dtype, PRECISION)
        g = _load_rows(grad, rows, alive, c0, C, BC)
        dm = _dot(ds, y, dm, PRECISION)
        du = _dot(p, _narrow(g, dtype, PRECISION), du, PRECISION)
        total += tl.sum(g, 0)
        shift += tl.sum(ds.to(tl.float32), 1)
    _store_rows(grad_m + table * J * C, j, j < J, c0, dm, C, BC, PRECISION)
    _store_rows(grad_u + table * J * C, j, j < J, c0, du, C, BC, PRECISION)
    if tl.program_id(1) == 0:
        cols = c0 + tl.arange(0, BC)
        tl.store(grad_bias + table * C + cols, total, mask=cols < C)
    if c0 == 0:
        tl.store(grad_offset + table * J + j, shift, mask=j < J)
