"""Attention to neighbors beside an attention layer that others have made and trained.

Decoupled cross-attention (Ye et al. 2023, IP-Adapter, arXiv 2308.06721, eq. 5): the layer's own
queries attend a second time, to keys and values of their own, and the result is added. Here it
passes through an output projection that starts at zero, so that at first nothing is added.

Two kinds of layers of diffusers' networks are known: cross-attentions, named ``attn2``, with or
without a LayerNorm ``norm2`` before them (UNets), and joint attentions that project a second
sequence with ``add_k_proj`` (SD3, Flux).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from retrodiff.attention import KeysValues, NeighborAttention, Prepared
from retrodiff.attention.dot_product import dot_product_attention
from retrodiff.attention.reference import Neighborhood
from retrodiff.interfaces import Tokens


@dataclass(frozen=True)
class Place:
    """A layer that neighbors are attended to beside.

    Args:
        name: of the attention, such as ``mid_block.attentions.0.transformer_blocks.0.attn2``.
        attention: the layer.
        norm: the LayerNorm before it; None: the layer gets what its queries are made of.
    """

    name: str
    attention: nn.Module
    norm: nn.Module | None = None


def places(network: nn.Module) -> list[Place]:
    """The layers of a network that take a condition, in its own order."""
    found: list[Place] = []
    for name, module in network.named_modules():
        cross = getattr(module, "attn2", None)
        if cross is not None and getattr(cross, "is_cross_attention", False):
            norm = getattr(module, "norm2", None)
            usual = getattr(module, "norm_type", "layer_norm") == "layer_norm"
            fits = usual and _fits(cross, norm)
            found.append(Place(f"{name}.attn2", cross, norm if fits else None))
        elif (
            getattr(module, "add_k_proj", None) is not None
            and hasattr(module, "to_q")
            and not getattr(module, "residual_connection", False)
        ):
            found.append(Place(name, module))
    return found


def branch(place: Place, dim: int) -> NeighborAttention | OwnQueries:
    """The layer's attention to neighbors: `NeighborAttention` where it has the layer's form.

    Its own weights are on the layer's device and in its type.

    Args:
        place: the layer.
        dim: d, width of a neighbor's embedding.
    """
    like = next((p for p in place.attention.parameters() if p.is_floating_point()), None)
    if place.norm is None:
        alone = OwnQueries(place.attention, dim)
        return alone if like is None else alone.to(like.device, like.dtype)
    layer: Any = place.attention
    norm: Any = place.norm
    made = NeighborAttention(layer.to_q.in_features, dim, layer.heads, eps=norm.eps)
    made = made if like is None else made.to(like.device, like.dtype)
    made.norm, made.to_q = norm, layer.to_q  # the layer's own, which stay as they are
    nn.init.zeros_(made.to_out.weight)
    nn.init.zeros_(made.to_out.bias)
    made.to_out.bias.requires_grad_(False)  # no neighbors, no change: nothing may be added to all
    return made


class OwnQueries(nn.Module):
    """What a layer's queries find among neighbors: to_out(attention(q, neighbors)), no more.

    For layers whose queries are made in another way than `NeighborAttention` makes them: with a
    bias, of a normalization that depends on the time, or normalized themselves.

    Args:
        attention: the layer, with ``to_q``, ``heads`` and, if it has one, ``norm_q``.
        dim: d, width of a neighbor's embedding.
    """

    def __init__(self, attention: nn.Module, dim: int) -> None:
        super().__init__()
        self._layer: Any = (attention,)  # no submodule: it belongs to the network
        layer: Any = attention
        inner, width = layer.to_q.out_features, layer.to_out[0].out_features
        self.dim, self.heads = dim, int(layer.heads)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def prepare(
        self, tokens: Tokens | Tensor, positions: int | None = None, steps: int | None = None
    ) -> KeysValues:
        """Keys and values of neighbors (b, k, d), once for all evaluations."""
        del positions, steps
        near = Neighborhood.of(tokens, self.dim)
        keys, values = self.to_k(near.values), self.to_v(near.values)
        return KeysValues(
            keys=keys, values=values, mask=near.mask, hidden=near.hidden, null_rows=near.null_rows
        )

    def forward(self, y: Tensor, prepared: KeysValues) -> Tensor:
        """What the layer gets (b, n, c) -> what is to be added to its output (b, n, c)."""
        layer = self._layer[0]
        live = prepared.keys.shape[0]
        q = rearrange(layer.to_q(y[:live]), "b n (h e) -> b h n e", h=self.heads)
        if getattr(layer, "norm_q", None) is not None:
            q = layer.norm_q(q)
        keys, values = (
            rearrange(part, "b 1 k (h e) -> b h k e", h=self.heads).to(q.dtype)
            for part in (prepared.keys, prepared.values)
        )
        mask = None if prepared.mask is None else rearrange(prepared.mask, "b 1 k -> b 1 1 k")
        found = dot_product_attention(q, keys, values, mask)
        found = self.to_out(rearrange(found, "b h n e -> b n (h e)"))
        return F.pad(found, (0, 0, 0, 0, 0, prepared.null_rows))


def added(layer: nn.Module, x: Tensor, prepared: Prepared) -> Tensor:
    """What a branch adds to its layer's output (b, n, c).

    Args:
        layer: a branch.
        x: what came into the LayerNorm, for a `NeighborAttention`; else what the layer got.
        prepared: of the neighbors.
    """
    if isinstance(layer, NeighborAttention):
        # It adds to x itself, on every path; the layer's residual connection does so, too.
        return layer(x, prepared) - x
    return layer(x, prepared)


def _fits(attention: Any, norm: Any) -> bool:
    """Whether a cross-attention is x -> to_q(LayerNorm(x)) with heads of the usual scale."""
    plain = isinstance(norm, nn.LayerNorm) and norm.elementwise_affine and norm.bias is not None
    to_q, heads = attention.to_q, attention.heads
    e = max(to_q.out_features // heads, 1)
    return (
        plain
        and isinstance(to_q, nn.Linear)
        and to_q.bias is None
        and type(to_q).__module__.startswith("torch.nn")
        and to_q.in_features == to_q.out_features == attention.to_out[0].out_features
        and to_q.out_features == heads * e
        and getattr(attention, "norm_q", None) is None
        and getattr(attention, "group_norm", None) is None
        and getattr(attention, "spatial_norm", None) is None
        and not getattr(attention, "residual_connection", False)
        and getattr(attention, "rescale_output_factor", 1.0) == 1.0
        and math.isclose(getattr(attention, "scale", 0.0), e**-0.5, rel_tol=1e-6)
    )
