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
    OneNeighbor,
    absorb,
    absorbed_attention,
    absorbed_weights,
    one_neighbor,
    one_neighbor_attention,
    one_neighbor_weights,
)
from retrodiff.attention.dispatch import STEPS, Choice, Path, Problem, choose
from retrodiff.attention.fused import fused_attention, refusal, refusal_of
from retrodiff.attention.proving import why_not
from retrodiff.attention.reference import (
    KeysValues,
    Weights,
    keys_values,
    standard_attention,
    standard_weights,
)
from retrodiff.interfaces import Tokens
from retrodiff.precision import autocast_dtype

Prepared = AttentionTables | KeysValues | OneNeighbor
"""What `NeighborAttention.prepare` returns."""


class NeighborAttention(nn.Module):
    """Attention from positions to neighbors: x + to_out(attention(norm(x), neighbors)).

    Holds weights and hyper-parameters, no cache: what a sampling run computes once is returned by
    `prepare`, and whoever runs the steps holds it.

    Args:
        width: c, channels of x.
        context_width: d, width of a neighbor's embedding.
        heads: h; must divide c.
        eps: of the LayerNorm.
        path: None lets each call take the path that counts least; a name forces it.

    Raises:
        ValueError: ``heads`` does not divide ``width``.

    Examples:
        >>> import torch
        >>> from retrodiff.attention import NeighborAttention
        >>> block = NeighborAttention(width=64, context_width=32, heads=2)
        >>> x, neighbors = torch.randn(2, 256, 64), torch.randn(2, 4, 32)
        >>> with torch.no_grad():
        ...     prepared = block.prepare(neighbors, positions=256)  # once for a sampling run
        ...     y = block(x, prepared)  # at every step
        >>> y.shape
        torch.Size([2, 256, 64])
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        *,
        eps: float = 1e-5,
        path: Path | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        self.width, self.context_width, self.heads = width, context_width, heads
        self.path: Path | None = path
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
        self, tokens: Tokens | Tensor, positions: int | None = None, steps: int | None = None
    ) -> Prepared:
        """Precomputes what all evaluations with these neighbors share; the result is immutable.

        It belongs to the weights as they are now: after they change, prepare anew.

        Args:
            tokens: (b, k, d), or (b, r, k, d) for r regions with neighbors of their own.
            positions: n of the x to come; None: taken as 1024.
            steps: evaluations that will share it; None: 1 where gradients are recorded (training
                prepares anew each time), else 50.
        """
        choice = self._choose(tokens, 1024 if positions is None else positions, steps)
        if choice.path == "one":
            return one_neighbor(tokens, self.weights)
        if choice.path == "standard":
            return keys_values(tokens, self.weights)
        return absorb(tokens, self.weights)

    def forward(
        self,
        x: Tensor,
        context: Tensor | Tokens | Prepared,
        shape: tuple[int, int] | None = None,
    ) -> Tensor:
        """(b, n, c) and its neighbors -> (b, n, c).

        Args:
            x: (b, n, c).
            context: neighbors (b, k, d) or (b, r, k, d), or what `prepare` made of them.
            shape: (h, w) of the latent that n was flattened from: r regions are then the blocks of
                a √r by √r grid, in reading order. None: r runs of n/r consecutive positions.
        """
        prepared = self._prepared(x, context, steps=1)
        bias, eps = self.to_out.bias, self.norm.eps
        if isinstance(prepared, OneNeighbor):
            return one_neighbor_attention(x, prepared, bias, shape)
        if isinstance(prepared, KeysValues):
            return standard_attention(x, prepared, self.weights, shape)
        if self.path != "absorbed" and refusal(x, prepared) is None:
            return fused_attention(x, prepared, bias, eps, shape)
        return absorbed_attention(x, prepared, bias, eps, shape)

    def attention_weights(
        self,
        x: Tensor,
        context: Tensor | Tokens | Prepared,
        shape: tuple[int, int] | None = None,
    ) -> Tensor:
        """Which neighbor painted which position: (b, h, n, k), each row sums to 1 (null: 0)."""
        if isinstance(context, Tensor | Tokens):
            context = absorb(context, self.weights)
        self._check(x, context)
        if isinstance(context, OneNeighbor):
            return one_neighbor_weights(x, context, self.heads, shape)
        if isinstance(context, KeysValues):
            return standard_weights(x, context, self.weights, shape)
        return absorbed_weights(x, context, self.norm.eps, shape)

    def explain(
        self, x: Tensor, context: Tensor | Tokens | Prepared, steps: int | None = None
    ) -> Choice:
        """Which path `forward` takes for this x and context, and why.

        Args:
            x: (b, n, c).
            context: neighbors, or what `prepare` made of them.
            steps: evaluations that share the preparation, as for `prepare`.
        """
        if isinstance(context, OneNeighbor):
            return Choice(path="one", reason="prepared for it")
        if isinstance(context, KeysValues):
            return Choice(path="standard", reason="prepared for it")
        if isinstance(context, AttentionTables):
            self._check(x, context)
            if self.path == "absorbed":
                return Choice(path="absorbed", reason="forced")
            refused = refusal(x, context) or why_not(x, context)
            if refused is None:
                return Choice(path="fused", reason="one kernel, x is read and written once")
            return Choice(path="absorbed", reason=f"not fused: {refused}")
        choice = self._choose(context, x.shape[1], steps)
        if choice.path in ("one", "standard"):
            return choice
        settled = self.explain(x, absorb(context, self.weights))
        return Choice(
            path=settled.path,
            reason=choice.reason if settled.path == choice.path else settled.reason,
            estimates=choice.estimates,
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.width}, context_width={self.context_width}, heads={self.heads}"

    def _choose(self, tokens: Tokens | Tensor, positions: int, steps: int | None) -> Choice:
        tokens = tokens if isinstance(tokens, Tokens) else Tokens(tokens)
        shape = tokens.values.shape
        gradients = torch.is_grad_enabled()
        device = tokens.values.device
        dtype = autocast_dtype(device) or self.to_q.weight.dtype
        refused = refusal_of(device, dtype, shape[-2])
        if self.path is not None:
            if self.path == "one" and shape[-2] != 1:
                raise ValueError(f"path='one' takes a single neighbor, not k={shape[-2]}")
            if self.path == "fused" and refused is not None:
                raise ValueError(f"path='fused' cannot be taken: {refused}")
            return Choice(path=self.path, reason="forced")
        if torch.compiler.is_compiling():
            return Choice(path="standard", reason="the compiler fuses what is around it")
        problem = Problem(
            batch=max(1, shape[0] - tokens.null_rows),
            positions=positions,
            width=self.width,
            context_width=self.context_width,
            heads=self.heads,
            k=max(1, shape[-2]),
            regions=shape[1] if len(shape) == 4 else 1,
            dtype=dtype,
            device=device.type,
            evaluations=steps or (1 if gradients else STEPS),
        )
        return choose(problem, refused, gradients)

    def _prepared(
        self, x: Tensor, context: Tensor | Tokens | Prepared, steps: int | None
    ) -> Prepared:
        if isinstance(context, Tensor | Tokens):
            context = self.prepare(context, x.shape[1] if x.ndim == 3 else None, steps)
        self._check(x, context)
        return context

    def _check(self, x: Tensor, prepared: Prepared) -> None:
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not match width={self.width}: expected "
                f"(b, n, {self.width})"
            )
        if x.shape[0] != prepared.batch:
            raise ValueError(
                f"x has {x.shape[0]} rows, the context {prepared.batch}: prepare the context of "
                "these rows (null rows last)"
            )


def use_path(network: nn.Module, path: Path | None) -> None:
    """Forces the path of every neighbor cross-attention in a network; None lets it choose again."""
    for module in network.modules():
        if isinstance(module, NeighborAttention):
            module.path = path
