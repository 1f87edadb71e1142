"""The gradients of absorbed attention, written out: what the backward kernels are held against.

Products run in the tables' type and everything else at least in float32, as in the kernels.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from retrodiff.attention.absorbed import AttentionTables
from retrodiff.attention.reference import join_regions, split_regions


def absorbed_gradients(
    grad: Tensor,
    x: Tensor,
    tables: AttentionTables,
    eps: float = 1e-5,
    shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, m, offset, u and the bias, from that of `absorbed_attention`'s result.

    Args:
        grad: (b, n, c).
        x: (b, n, c).
        tables: of these b rows.
        eps: of the LayerNorm.
        shape: see `split_regions`.

    Returns:
        In the types of x and the tables; that of the bias (c,) at least float32.
    """
    live, r, h, dtype = tables.m.shape[0], tables.regions, tables.heads, tables.m.dtype
    wide = torch.promote_types(x.dtype, torch.float32)

    def split(rows: Tensor) -> Tensor:
        return rearrange(split_regions(rows, r, shape), "b r n c -> (b r) n c")

    rows = x[:live].to(wide)
    deviation = rows - rows.mean(-1, keepdim=True)
    rstd = (deviation.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal = deviation * rstd
    y, g = split(normal).to(dtype), split(grad[:live]).to(dtype)
    m, u = (rearrange(table, "b r j c -> (b r) j c") for table in (tables.m, tables.u))
    scores = (y @ m.mT).to(wide) + rearrange(tables.offset, "b r j -> (b r) 1 j")
    p = rearrange(scores, "s n (h k) -> s n h k", h=h).softmax(-1)
    dp = rearrange((g @ u.mT).to(wide), "s n (h k) -> s n h k", h=h)
    ds = rearrange(p * (dp - (p * dp).sum(-1, keepdim=True)), "s n h k -> s n (h k)").to(dtype)
    p = rearrange(p, "s n h k -> s n (h k)").to(dtype)
    dy = rearrange((ds @ m).to(wide), "(b r) n c -> b r n c", r=r)
    dy = join_regions(dy, shape)
    dx = dy - dy.mean(-1, keepdim=True) - normal * (dy * normal).mean(-1, keepdim=True)
    dx = dx * rstd + grad[:live].to(wide)
    grad_x = torch.cat([dx.to(x.dtype), grad[live:].to(x.dtype)])
    back = dict(r=r)
    return (
        grad_x,
        rearrange(ds.mT @ y, "(b r) j c -> b r j c", **back),
        rearrange(ds.sum(1, dtype=wide), "(b r) j -> b r j", **back).to(tables.offset.dtype),
        rearrange(p.mT @ g, "(b r) j c -> b r j c", **back),
        grad.sum((0, 1), dtype=wide),
    )
