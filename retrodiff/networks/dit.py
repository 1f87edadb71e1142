"""A small diffusion transformer that attends to neighbor embeddings.

The blocks of Peebles & Xie 2023 (adaptive LayerNorm, started as the identity) with the neighbor
cross-attention of Blattmann et al. 2022 between self-attention and feed-forward. Called like every
network here: ``(x, timesteps, context) -> output``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from retrodiff.attention import NeighborAttention
from retrodiff.attention.dot_product import dot_product_attention
from retrodiff.interfaces import Context, Tokens
from retrodiff.networks.blocks import timestep_embedding, zeroed
from retrodiff.networks.placed import Placed, check_floating, check_rows
from retrodiff.networks.streams import join_streams
from retrodiff.networks.transformer import repeated


@dataclass(frozen=True)
class PreparedTokens:
    """A context as every block needs it: what `DiT.prepare` returns, for one sampling run.

    Args:
        layers: one entry per block.
        rows: b of the context.
    """

    layers: tuple[Any, ...]
    rows: int


class DiT(Placed):
    """A transformer over patches of the latent.

    After Peebles & Xie 2023; the context enters by cross-attention.

    Args:
        shape: (c, h, w) of a latent.
        patch: side of a patch; divides h and w.
        width: of the tokens.
        depth: blocks.
        heads: of both attentions.
        widths: width of each context stream; streams are projected to the token width and joined.

    Raises:
        ValueError: ``patch`` does not divide height or width, or ``heads`` not the width.

    Examples:
        >>> import torch
        >>> from retrodiff.networks import DiT
        >>> network = DiT(
        ...     shape=(3, 16, 16), patch=4, width=32, depth=1, heads=2, widths={"neighbors": 8}
        ... )
        >>> x, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([10.0, 500.0])
        >>> network(x, timesteps, torch.randn(2, 4, 8)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        patch: int,
        width: int,
        depth: int,
        heads: int,
        widths: dict[str, int],
    ) -> None:
        super().__init__()
        channels, height, breadth = shape
        if height % patch or breadth % patch:
            raise ValueError(f"patch={patch} does not divide a latent of {height}x{breadth}")
        if width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        self._config = {
            "shape": list(shape),
            "patch": patch,
            "width": width,
            "depth": depth,
            "heads": heads,
            "widths": dict(widths),
        }
        self.shape, self.widths = tuple(shape), dict(widths)
        self.patch, self.width = patch, width
        self.grid = (height // patch, breadth // patch)
        self.embed = nn.Linear(channels * patch**2, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1], width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.project = nn.ModuleDict(
            {name: nn.Linear(d, width, bias=False) for name, d in widths.items()}
        )
        self.blocks = nn.ModuleList([DiTBlock(width, heads, bool(widths)) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = zeroed(nn.Linear(width, 2 * width))
        self.out = zeroed(nn.Linear(width, channels * patch**2))

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return dict(self._config)

    def prepare(self, context: Context | Tensor) -> PreparedTokens:
        """Everything about the context that all steps share.

        Raises:
            ValueError: the context has other streams or widths than the network.
        """
        if isinstance(context, Tensor):
            context = Context.of(context, next(iter(self.widths), "neighbors"))
        if context.vector is not None:
            raise ValueError(
                f"context.vector has width {context.vector.shape[-1]}, but a DiT takes none: use a "
                "UNet with vector_width, or a conditioner that makes tokens"
            )
        tokens = join_streams(context, self.widths, dict(self.project.items()), self.dtype)
        if tokens is None:
            return PreparedTokens((None,) * len(self.blocks), 0)
        positions = self.grid[0] * self.grid[1]
        blocks = cast("list[DiTBlock]", list(self.blocks))
        layers = tuple(block.prepare(tokens, positions) for block in blocks)
        return PreparedTokens(layers, tokens.values.shape[0])

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Context | Tensor | PreparedTokens
    ) -> Tensor:
        """Latents (b, c, h, w), timesteps (b,), context -> output (rows of the context, c, h, w).

        A context may have a whole multiple of x's rows: the branches of guidance. x may have any
        floating dtype, which the output has, too.

        Raises:
            ValueError: x or the context does not fit.
        """
        prepared = context if isinstance(context, PreparedTokens) else self.prepare(context)
        self._check(x, prepared)
        rows = prepared.rows or len(x)
        time = timestep_embedding(timesteps.expand(len(x)), self.width).to(self.dtype)
        time = F.silu(self.time(time))
        wide = x.to(self.dtype)
        tokens = rearrange(wide, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        h = repeated(self.embed(tokens) + self.position, rows)
        time = repeated(time, rows)
        for block, layer in zip(self.blocks, prepared.layers, strict=True):
            h = block(h, time, layer, self.grid)
        shift, scale = self.modulate(time).unsqueeze(1).chunk(2, -1)
        h = self.out(self.norm(h) * (1 + scale) + shift)
        height, width = self.grid
        out = rearrange(
            h,
            "b (h w) (c p q) -> b c (h p) (w q)",
            h=height,
            w=width,
            p=self.patch,
            q=self.patch,
        )
        return out.to(x.dtype)

    def _check(self, x: Tensor, prepared: PreparedTokens) -> None:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, the network takes (b, "
                f"{', '.join(map(str, self.shape))})"
            )
        check_floating(x, "latents", "noisy numbers")
        check_rows(x, prepared.rows)


class DiTBlock(nn.Module):
    """Self-attention, neighbor cross-attention, feed-forward; all start as the identity.

    Args:
        width: c.
        heads: must divide the width.
        attends: whether there are neighbors to attend to.
    """

    def __init__(self, width: int, heads: int, attends: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.cross_attention = NeighborAttention(width, width, heads) if attends else None
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.modulate = zeroed(nn.Linear(width, 6 * width))

    def prepare(self, tokens: Tokens, positions: int) -> Any:
        """What the block's cross-attention needs of the tokens; None where it has none."""
        if self.cross_attention is None:
            return None
        return self.cross_attention.prepare(tokens, positions)

    def forward(self, x: Tensor, time: Tensor, prepared: Any, grid: tuple[int, int]) -> Tensor:
        """(b, n, c) and the activated time embedding (b, c) -> (b, n, c), n = h*w of the grid."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulate(time).unsqueeze(1).chunk(6, dim=-1)
        )
        y = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = rearrange(y, "b n (t h e) -> t b h n e", t=3, h=self.heads).unbind(0)
        y = rearrange(dot_product_attention(q, k, v), "b h n e -> b n (h e)")
        x = x + gate1 * self.merge(y)
        if self.cross_attention is not None:
            x = self.cross_attention(x, prepared, grid)
        y = self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x + gate2 * y
