"""Softmax-attention whose gradient in bfloat16 is fast on a CPU, too.

Torch's own gradient takes up to eleven times as long there as the formula written out, for the few
positions and neighbors of a small latent (`benchmarks/attention_gradient.py`); a third of a
training step went into it. In float32 and for many positions torch's is the faster one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL = 256 * 256
"""Scores of a head, positions times tokens, up to which the formula is the faster one."""


def dot_product_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """``softmax(query keys^T / sqrt(e)) values``, as torch's `scaled_dot_product_attention`.

    Args:
        query: (b, h, n, e).
        keys: (b, h, k, e).
        values: (b, h, k, e).
        mask: broadcastable to (b, h, n, k), True where a position may look; at least one token of
            each row. None: everywhere.
        causal: each position looks at the tokens up to its own number; without a mask.

    Returns:
        (b, h, n, e).
    """
    if not _slow(query, keys, values):
        return F.scaled_dot_product_attention(query, keys, values, mask, is_causal=causal)
    scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(values.dtype) @ values


def _slow(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether torch's own gradient is slow."""
    return (
        torch.is_grad_enabled()
        and (query.requires_grad or keys.requires_grad or values.requires_grad)
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[-2] * keys.shape[-2] <= SMALL
    )
