"""The paper's denoising network: a convolutional UNet that attends to neighbor embeddings.

The UNet of Rombach et al. 2022 (arXiv 2112.10752), with the neighbors of Blattmann et al. 2022
(arXiv 2204.11824) as tokens of its cross-attention. It predicts the noise: ``(x, t, neighbors) ->
eps``; `retrodiff.diffusion` turns it into a denoiser.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrodiff.interfaces import Context, Tokens
from retrodiff.networks.blocks import (
    GROUPS,
    Downsample,
    ResBlock,
    Upsample,
    check_channels,
    timestep_embedding,
    zeroed,
)
from retrodiff.networks.normalization import GroupNorm
from retrodiff.networks.placed import Placed, check_floating, check_rows
from retrodiff.networks.streams import join_streams
from retrodiff.networks.transformer import SpatialTransformer, repeated
from retrodiff.precision import autocast_dtype

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class PreparedContext:
    """A context as every layer needs it: what `UNet.prepare` returns, for one sampling run.

    Args:
        layers: one entry for each cross-attention, in the order of the forward pass.
        rows: b of the context.
        vector: (b, v), joins the timestep embedding.
        kernels: of the steps up in resolution, where a context for many evaluations has them.
    """

    layers: tuple[Any, ...]
    rows: int
    vector: Tensor | None = None
    kernels: tuple[Tensor | None, ...] = ()


class UNet(Placed):
    """Noise prediction ``(x, timesteps, context) -> eps``.

    The network of latent diffusion (Rombach et al. 2022), with cross-attention to neighbors
    (Blattmann et al. 2022).

    Args:
        in_channels: channels of a latent.
        out_channels: channels of the prediction.
        size: height and width of the latents it is meant for; others work too, as long as they can
            be halved once per level.
        channels: channels of the first level.
        multipliers: channels of each level as a multiple of ``channels``.
        blocks_per_level: residual blocks of each level on the way down; one more on the way up.
        attention_factors: downsampling factors at which positions attend to each other and to the
            neighbors; the middle always does.
        context_width: d of the neighbors; None: a network without cross-attention.
        streams: names of the context streams it is meant for, all of width ``context_width``.
        channels_per_head: width of an attention head; not used where ``heads`` is given.
        heads: attention heads at every place that attends, as the text-to-image and the
            class-conditional models of the family have it; None: as many as ``channels_per_head``
            gives.
        vector_width: v of a vector that joins the timestep embedding; None: there is none.
        depth: transformer blocks at each place that attends.
        dropout: probability inside the residual blocks.
        gradient_checkpointing: recompute the blocks in the backward pass instead of keeping them.

    Examples:
        >>> import torch
        >>> from retrodiff.networks import UNet
        >>> network = UNet(
        ...     in_channels=4,
        ...     out_channels=4,
        ...     size=8,
        ...     channels=32,
        ...     multipliers=(1, 2),
        ...     blocks_per_level=1,
        ...     attention_factors=(1, 2),
        ...     context_width=16,
        ... )
        >>> x, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0])
        >>> network(x, timesteps, torch.randn(2, 4, 16)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        size: int,
        channels: int,
        multipliers: Sequence[int],
        blocks_per_level: int,
        attention_factors: Sequence[int],
        context_width: int | None,
        streams: Sequence[str] = ("neighbors",),
        channels_per_head: int = 32,
        heads: int | None = None,
        vector_width: int | None = None,
        depth: int = 1,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        check_channels(channels)
        self.in_channels, self.out_channels, self.size = in_channels, out_channels, size
        self.channels, self.multipliers = channels, tuple(multipliers)
        self.blocks_per_level, self.attention_factors = blocks_per_level, tuple(attention_factors)
        self.context_width, self.streams = context_width, tuple(streams)
        self.channels_per_head, self.heads = channels_per_head, heads
        self.vector_width, self.depth, self.dropout = vector_width, depth, dropout
        self.gradient_checkpointing = gradient_checkpointing

        time_width = 4 * channels

        def stage(width_in: int, width_out: int, attends: bool) -> Stage:
            res = ResBlock(width_in, width_out, time_width=time_width, dropout=dropout)
            transformer = None
            if attends:
                transformer = SpatialTransformer(
                    width_out,
                    context_width=context_width,
                    channels_per_head=channels_per_head,
                    heads=heads,
                    depth=depth,
                )
            zeroed(res.conv2)
            return Stage(res, transformer)

        self.time = nn.Sequential(
            nn.Linear(channels, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )
        self.vector = None if vector_width is None else nn.Linear(vector_width, time_width)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)

        width, skips = channels, [channels]
        last = len(self.multipliers) - 1
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(self.multipliers):
            stages: list[Stage] = []
            for _ in range(blocks_per_level):
                stages.append(
                    stage(width, multiplier * channels, 2**level in self.attention_factors)
                )
                width = multiplier * channels
                skips.append(width)
            self.down.append(Level(stages, None if level == last else Downsample(width)))
            if level != last:
                skips.append(width)

        self.middle = nn.ModuleList([stage(width, width, True), stage(width, width, False)])

        self.up = nn.ModuleList()
        for level in reversed(range(len(self.multipliers))):
            stages = []
            for _ in range(blocks_per_level + 1):
                new = self.multipliers[level] * channels
                stages.append(stage(width + skips.pop(), new, 2**level in self.attention_factors))
                width = new
            self.up.append(Level(stages, Upsample(width) if level else None))

        self.norm_out = GroupNorm(GROUPS, width)
        self.conv_out = zeroed(nn.Conv2d(width, out_channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments: ``UNet(**unet.config())`` is the same architecture."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "size": self.size,
            "channels": self.channels,
            "multipliers": list(self.multipliers),
            "blocks_per_level": self.blocks_per_level,
            "attention_factors": list(self.attention_factors),
            "context_width": self.context_width,
            "streams": list(self.streams),
            "channels_per_head": self.channels_per_head,
            "heads": self.heads,
            "vector_width": self.vector_width,
            "depth": self.depth,
            "dropout": self.dropout,
            "gradient_checkpointing": self.gradient_checkpointing,
        }

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents it is meant for."""
        return self.in_channels, self.size, self.size

    @property
    def widths(self) -> dict[str, int]:
        """Width of each context stream; empty: takes no tokens."""
        return {} if self.context_width is None else dict.fromkeys(self.streams, self.context_width)

    def prepare(
        self, context: Tensor | Context | None, steps: int | None = None
    ) -> PreparedContext:
        """All that the denoising steps share about a context: compute it once, hand it in often.

        Args:
            context: a `Context`, whose streams are joined along k; or all tokens (b, k, d), or
                (b, r, k, d) with r = g*g regions of the latent, row by row.
            steps: evaluations that will share it; None: many.

        Raises:
            ValueError: the context and the network do not fit.
        """
        vector = context.vector if isinstance(context, Context) else None
        if (None if vector is None else vector.shape[-1]) != self.vector_width:
            raise ValueError(
                f"context.vector has width {None if vector is None else vector.shape[-1]}, the "
                f"network was built with vector_width={self.vector_width}: make them agree"
            )
        if isinstance(context, Tensor):
            tokens = self._checked(Tokens(context))
        else:
            tokens = join_streams(Context({}) if context is None else context, self.widths)
        if tokens is None:
            rows = 0 if vector is None else len(vector)
            return PreparedContext((), rows, vector, self._kernels(steps))
        values = tokens.values
        if autocast_dtype(values.device) is None:
            tokens = replace(tokens, values=values.to(self.dtype))
        layers = tuple(
            block.prepare(tokens, (self.size // factor) ** 2, steps)
            for transformer, factor in self._transformers()
            for block in transformer.cross_attentions()
        )
        return PreparedContext(layers, len(values), vector, self._kernels(steps))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | Context | PreparedContext | None = None,
    ) -> Tensor:
        """The noise in x.

        A context may have m times as many rows as x: the m branches of guidance, one after the
        other. What they share, up to the first cross-attention, is then computed once; the result
        is that of x repeated m times.

        Args:
            x: noisy latents (b, c, h, w).
            timesteps: (b,) or (), integer or fractional.
            context: tokens (b, k, d) or (b, r, k, d), a `Context`, or what `prepare` returned.

        Returns:
            eps (rows of the context, out_channels, h, w), in x's dtype.

        Raises:
            ValueError: the latent cannot be halved often enough, or the context does not fit.
        """
        prepared = (
            context if isinstance(context, PreparedContext) else self.prepare(context, steps=1)
        )
        self._check(x, prepared)
        time = timestep_embedding(timesteps.expand(len(x)), self.channels).to(self.dtype)
        time = self.time(time)
        h = x.to(self.dtype)
        if self.vector is not None and prepared.vector is not None:
            time = repeated(time, prepared.rows) + self.vector(prepared.vector.to(self.dtype))
            h = repeated(h, prepared.rows)
        time = F.silu(time)
        # Convolutions are fastest in this layout, and the transformers' (b, n, c) is the same one.
        h = self.conv_in(h.contiguous(memory_format=torch.channels_last))

        layers, skips = iter(prepared.layers), [h]

        def run(stage: Stage, h: Tensor) -> Tensor:
            mine = [next(layers, None) for _ in range(self.depth if stage.transformer else 0)]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                from torch.utils.checkpoint import checkpoint  # two seconds with torch 2.6

                return checkpoint(stage, h, time, mine, prepared.rows, use_reentrant=False)
            return stage(h, time, mine, prepared.rows)

        for level in _all(self.down, Level):
            for stage in _all(level.stages, Stage):
                h = run(stage, h)
                skips.append(h)
            if level.resize is not None:
                h = level.resize(h)
                skips.append(h)
        for stage in _all(self.middle, Stage):
            h = run(stage, h)
        kernels = iter(prepared.kernels)
        for level in _all(self.up, Level):
            for stage in _all(level.stages, Stage):
                h = run(stage, torch.cat([h, repeated(skips.pop(), len(h))], 1))
            if level.resize is not None:
                h = level.resize(h, next(kernels, None))
        return self.conv_out(F.silu(self.norm_out(h))).to(x.dtype).contiguous()

    def _kernels(self, steps: int | None) -> tuple[Tensor | None, ...]:
        """What the steps up in resolution prepare, unless it would be used once or be trained."""
        if steps == 1 or torch.is_grad_enabled():
            return ()
        last = len(self.multipliers) - 1
        resizers = (level.resize for level in _all(self.up, Level))
        return tuple(
            resize.prepare((self.size >> (last - i)) ** 2)
            for i, resize in enumerate(resizers)
            if isinstance(resize, Upsample)
        )

    def _transformers(self) -> Iterator[tuple[SpatialTransformer, int]]:
        """Every transformer and its downsampling factor, in the order of the forward pass."""
        last = len(self.multipliers) - 1
        down, up = list(_all(self.down, Level)), list(_all(self.up, Level))
        places = [
            *((2**i, level.stages) for i, level in enumerate(down)),
            (2**last, self.middle),
            *((2 ** (last - i), level.stages) for i, level in enumerate(up)),
        ]
        for factor, stages in places:
            for stage in _all(stages, Stage):
                if stage.transformer is not None:
                    yield stage.transformer, factor

    def _checked(self, tokens: Tokens) -> Tokens:
        shape = tuple(tokens.values.shape)
        if len(shape) not in (3, 4) or shape[-1] != self.context_width:
            raise ValueError(
                f"a context of shape {shape} does not fit context_width={self.context_width}: hand "
                "in tokens (b, k, d) of the encoder that the network was trained with"
            )
        if shape[-2] == 0:
            raise ValueError(
                f"a context of shape {shape} has no tokens, but the network attends to them: hand "
                "in at least one, zeros for the null condition"
            )
        return tokens

    def _check(self, x: Tensor, prepared: PreparedContext) -> None:
        factor = 2 ** (len(self.multipliers) - 1)
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, the network takes (b, {self.in_channels}, h, w)"
            )
        height, width = x.shape[-2:]
        if height % factor or width % factor:
            raise ValueError(
                f"a latent of {height}x{width} cannot be halved {len(self.multipliers) - 1} times: "
                f"use multiples of {factor}"
            )
        check_floating(x, "latents", "noisy numbers")
        check_rows(x, prepared.rows)


class Stage(nn.Module):
    """A residual block and, where positions attend, a transformer.

    Args:
        res: the residual block.
        transformer: None where nothing attends.
    """

    def __init__(self, res: ResBlock, transformer: SpatialTransformer | None):
        super().__init__()
        self.res = res
        self.transformer = transformer

    def forward(self, h: Tensor, time: Tensor, prepared: Sequence[Any], rows: int) -> Tensor:
        """(b, c, h, w) -> (b, out, h, w), or (rows, out, h, w) from the first transformer on."""
        h = self.res(h, repeated(time, len(h)))
        return h if self.transformer is None else self.transformer(h, prepared, rows)


class Level(nn.Module):
    """The stages of one resolution, and the way to the next.

    Args:
        stages: in the order of the forward pass.
        resize: `Downsample` or `Upsample`; None at the end.
    """

    def __init__(self, stages: Sequence[Stage], resize: nn.Module | None):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.resize = resize


def _all(modules: nn.ModuleList, kind: type[M]) -> Iterator[M]:
    """The modules of a list, with the type that a `ModuleList` forgets."""
    return cast("Iterator[M]", iter(modules))
