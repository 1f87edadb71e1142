"""Any 2-D UNet or transformer of diffusers as a network of this library.

``EpsDenoiser(DiffusersNetwork(unet))`` is a denoiser like every other: what the model was trained
to predict says which denoiser, and its training schedule is the denoiser's. What a model takes is
read from its ``forward`` and its configuration; one that needs more than an image, a timestep,
tokens and a vector is refused by the names of what it needs. diffusers itself is not imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from retrodiff.interfaces import Context, Tokens
from retrodiff.networks.placed import Placed, check_floating, check_rows
from retrodiff.networks.streams import join_streams
from retrodiff.networks.transformer import repeated
from retrodiff.numbers import real

IMAGES = ("sample", "hidden_states")
TOKENS, MASK, LABELS, POOLED = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "class_labels",
    "pooled_projections",
)
WIDTHS = ("encoder_hid_dim", "caption_channels", "joint_attention_dim", "cross_attention_dim")
"""Where a configuration says the width of the tokens, the outermost projection first."""


@dataclass(frozen=True)
class PreparedArguments:
    """A context as a model of diffusers takes it: what `DiffusersNetwork.prepare` returns.

    Args:
        arguments: of its ``forward``.
        rows: b of the context; 0: it takes none.
    """

    arguments: Mapping[str, Any]
    rows: int


class DiffusersNetwork(Placed):
    """A model of diffusers, called as ``network(x, timesteps, context)``.

    Neighbors and prompts enter as its tokens (``encoder_hidden_states``), and `Context.vector` as
    ``pooled_projections`` or, for UNets with a projection of class embeddings (unCLIP), as
    ``class_labels``. A channel of learned variances is left out of the prediction. It is not built
    from files: save its weights with the model, and hand the denoiser in when you load it.

    Args:
        model: `UNet2DModel`, `UNet2DConditionModel`, `PixArtTransformer2DModel`,
            `SD3Transformer2DModel`, `DiTTransformer2DModel` or another that takes (b, c, h, w).
        size: height and width of the latents; None: its configuration's ``sample_size``.
        streams: names of the context streams, all of its tokens' width.
        time_scale: timesteps are multiplied by it; 0.001 for models that take times from 0 to 1.
        fixed: further arguments of every call, such as ``{"class_labels": torch.tensor([1000])}``;
            tensors of one row are repeated for each image.

    Raises:
        ValueError: it is no such model, or needs arguments that are not there; one line.

    Examples:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from retrodiff import Context
        >>> from retrodiff.networks import DiffusersNetwork
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        >>> unet = UNet2DModel(16, 3, 3, block_out_channels=(32,), layers_per_block=1, **blocks)
        >>> network = DiffusersNetwork(unet)
        >>> network(torch.randn(2, 3, 16, 16), torch.tensor([10.0, 500.0]), Context({})).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        size: int | None = None,
        streams: Sequence[str] = ("neighbors",),
        time_scale: float = 1.0,
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.streams = model, tuple(streams)
        self.time_scale, self.fixed = real("time_scale", time_scale, above=0), dict(fixed or {})
        self._kind = type(model).__name__
        parameters = inspect.signature(model.forward).parameters.values()
        self._takes = {p.name: p.default is p.empty for p in parameters}  # True: must be given
        first = next(iter(self._takes), "")
        if first not in IMAGES or "timestep" not in self._takes or not hasattr(model, "config"):
            raise ValueError(
                f"{self._kind} is no 2-D diffusion model of diffusers: its forward takes "
                f"{', '.join(self._takes) or 'nothing'}, expected an image and a timestep"
            )
        self._image = first
        self.context_width = self._tokens_width()
        self._vector, self.vector_width = self._vector_place()
        self._check_needs()
        channels, side = int(self._config("in_channels", 0)), size or self._config("sample_size")
        if side is None:
            raise ValueError(
                f"the configuration of this {self._kind} has no sample_size: hand in size=..., the "
                "height and width of its latents"
            )
        height, width = (side, side) if isinstance(side, int) else side
        self.shape = (channels, int(height), int(width))
        out = int(self._config("out_channels") or channels)
        if out < channels:
            raise ValueError(
                f"this {self._kind} takes {channels} channels and predicts {out}: it edits images, "
                "whose masks and originals a denoiser is not given"
            )

    @property
    def widths(self) -> dict[str, int]:
        """Width of each context stream; empty: takes no tokens."""
        return {} if self.context_width is None else dict.fromkeys(self.streams, self.context_width)

    def prepare(self, context: Context | Tensor) -> PreparedArguments:
        """The context as arguments of the model.

        Raises:
            ValueError: streams, widths or a mask do not fit the model.
        """
        if isinstance(context, Tensor):
            context = Context.of(context, self.streams[0])
        arguments: dict[str, Any] = {}
        vector = context.vector
        if (None if vector is None else vector.shape[-1]) != self.vector_width:
            raise ValueError(
                f"context.vector has width {None if vector is None else vector.shape[-1]}, this "
                f"{self._kind} takes {self.vector_width}: use a conditioner that fits"
            )
        rows = 0 if vector is None else len(vector)
        if vector is not None:
            arguments[self._vector] = vector.to(self.dtype)
        tokens = join_streams(context, self.widths, dtype=self.dtype)
        if tokens is not None:
            arguments |= self._token_arguments(tokens)
            rows = len(tokens.values)
        return PreparedArguments(arguments, rows)

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Context | Tensor | PreparedArguments
    ) -> Tensor:
        """The model's prediction (rows of the context, c, h, w), in x's dtype.

        Args:
            x: noisy latents (b, c, h, w).
            timesteps: (b,) or (), 0 to 1000.
            context: of b rows, or of a whole multiple of b: the branches of guidance.
        """
        prepared = context if isinstance(context, PreparedArguments) else self.prepare(context)
        check_floating(x, "latents", "noisy numbers")
        check_rows(x, prepared.rows)
        rows = prepared.rows or len(x)
        times = repeated(timesteps.expand(len(x)), rows) * self.time_scale
        arguments = {name: _expanded(value, rows, x.device) for name, value in self.fixed.items()}
        if "return_dict" in self._takes:
            arguments["return_dict"] = False
        out: Any = self.model(
            **{self._image: repeated(x, rows).to(self.dtype)},
            timestep=times,
            **prepared.arguments,
            **arguments,
        )
        out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
        return cast("Tensor", out)[:, : self.shape[0]].to(x.dtype)

    def _token_arguments(self, tokens: Tokens) -> dict[str, Tensor]:
        values, mask = tokens.values, tokens.mask
        if values.ndim != 3:
            raise ValueError(
                f"a context of shape {tuple(values.shape)} has neighbors for each region, but "
                f"{self._kind} takes one set for an image, (b, k, d): query with (b, d)"
            )
        if mask is None:
            return {TOKENS: values}
        if MASK not in self._takes:
            raise ValueError(
                f"the context masks some of its tokens, but {self._kind} takes no mask: give every "
                "image as many neighbors"
            )
        # Where all are hidden these models attend to all alike: to zeros, the null condition.
        return {TOKENS: values.masked_fill(~mask.unsqueeze(-1), 0), MASK: mask}

    def _config(self, name: str, default: Any = None) -> Any:
        return getattr(cast("Any", self.model).config, name, default)

    def _tokens_width(self) -> int | None:
        if TOKENS not in self._takes:
            return None
        found = next((w for name in WIDTHS if (w := self._config(name)) is not None), None)
        if found is None or isinstance(found, int):
            return found
        if len(set(found)) > 1:
            raise ValueError(
                f"this {self._kind} takes tokens of several widths, {list(found)}, but a context "
                "has one"
            )
        return int(found[0])

    def _vector_place(self) -> tuple[str, int | None]:
        """The argument that a vector is handed over as, and its width."""
        if POOLED in self._takes:
            return POOLED, self._config("pooled_projection_dim")
        kind = self._config("class_embed_type")
        if kind in ("projection", "simple_projection"):
            return LABELS, self._config("projection_class_embeddings_input_dim")
        return "", None

    def _check_needs(self) -> None:
        """Refuses a model that needs what nobody gives it."""
        given = {self._image, "timestep", TOKENS, self._vector, *self.fixed}
        needed = [name for name, must in self._takes.items() if must and name not in given]
        if self._config("addition_embed_type") or self._config("use_additional_conditions"):
            needed += ["added_cond_kwargs"]
        numbered = self._config("num_class_embeds") or (
            TOKENS not in self._takes and self._config("num_embeds_ada_norm")
        )
        if numbered and LABELS in self._takes and self._vector != LABELS:
            needed += [LABELS]
        missing = [name for name in needed if name not in given and name not in ("args", "kwargs")]
        if missing:
            raise ValueError(
                f"{self._kind} also needs {', '.join(missing)}, which no context has: hand in what "
                f"it is to be for all images, fixed={{{missing[0]!r}: ...}}"
            )
        unknown = [name for name in self.fixed if name not in self._takes]
        if unknown:
            raise ValueError(
                f"fixed has {', '.join(unknown)}, which {self._kind} does not take: it takes "
                f"{', '.join(self._takes)}"
            )


def _expanded(value: Any, rows: int, device: torch.device) -> Any:
    """A fixed argument for a batch: tensors of one row repeated, mappings looked into."""
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value)
        return {name: _expanded(inner, rows, device) for name, inner in entries.items()}
    if not isinstance(value, Tensor):
        return value
    value = value.to(device)
    return value.expand(rows, *value.shape[1:]) if value.ndim and len(value) == 1 else value
