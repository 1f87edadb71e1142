"""The whole cross-attention block on retrieved neighbors, as one module for any network.

Published weights load by name: ``norm``, ``to_q``, ``to_k``, ``to_v``, ``to_out`` hold what
latent-diffusion checkpoints call ``norm2``, ``attn2.to_q``, ``attn2.to_k``, ``attn2.to_v`` and
``attn2.to_out.0``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retrodiff.attention.absorbed import (
    AttentionTables,
    absorb,
    absorbed_attention,
    absorbed_weights,
)
from retrodiff.attention.reference import KeysValues, Weights, keys_values, standard_attention
from retrodiff.interfaces import Tokens


class NeighborAttention(nn.Module):
    """x + to_out(attention(norm(x), neighbors)).

    Holds weights and nothing else; what a sampling run computes once is returned by `prepare`.

    Args:
        width: c, channels of x.
        context_width: d, width of a neighbor's embedding.
        heads: h; must divide c.
        eps: of the LayerNorm.
    """

    def __init__(self, width: int, context_width: int, heads: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=eps)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    @property
    def weights(self) -> Weights:
        """The weights, under the names of the formula."""
        return Weights(
            gain=self.norm.weight,
            shift=self.norm.bias,
            query=self.to_q.weight,
            key=self.to_k.weight,
            value=self.to_v.weight,
            out=self.to_out.weight,
            bias=self.to_out.bias,
            heads=self.heads,
            eps=self.norm.eps,
        )

    def prepare(
        self, tokens: Tokens | Tensor, positions: int | None = None
    ) -> AttentionTables | KeysValues:
        """Tokens -> tables for any number of evaluations; compute anew after the weights change."""
        return absorb(tokens, self.weights)

    def forward(
        self,
        x: Tensor,
        context: Tensor | Tokens | AttentionTables | KeysValues,
        shape: tuple[int, int] | None = None,
    ) -> Tensor:
        """(b, n, c) and its neighbors -> (b, n, c)."""
        if isinstance(context, Tensor | Tokens):
            context = self.prepare(context, x.shape[1])
        return absorbed_attention(x, context, self.to_out.bias, self.norm.eps, shape)
