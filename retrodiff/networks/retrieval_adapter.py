"""Retrieval for a network that others have trained: small layers beside its own, base frozen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrodiff.disk.files import given
from retrodiff.disk.tensors import map_file, write_hashed_tensors
from retrodiff.interfaces import Encoder, Fingerprint, Neighbors, Scale, Tokens, unit
from retrodiff.networks.decoupled import Place, added, branch, places
from retrodiff.numbers import real, whole
from retrodiff.text import printable

FORMAT = 1
KEY = "retrieval_adapter"
"""Where a file's header says what it is."""

TRAINED = ("to_k.weight", "to_v.weight", "to_out.weight")
"""What a layer of the adapter has of its own."""


@dataclass(frozen=True)
class PreparedNeighbors:
    """Neighbors as every layer needs them: what `RetrievalAdapter.prepare` returns.

    Args:
        layers: one entry per layer.
        rows: b, rows of the network's batch.
    """

    layers: tuple[Any, ...]
    rows: int


class RetrievalAdapter(nn.Module):
    """Lets a trained network attend to neighbors: in every layer that takes a condition, once more.

    Decoupled cross-attention (Ye et al. 2023, arXiv 2308.06721): each such layer gets ``to_k`` and
    ``to_v`` for the neighbors, both without a bias, and its own queries attend to them beside what
    they attended to before. An output projection that starts at zero adds the result: untrained,
    the network computes what it did before, and without neighbors (all-zero tokens) it always does.
    The base is frozen (``requires_grad_(False)``), and outside of `attending` it is what it was.

    Works on diffusers' networks with cross-attentions (UNet2DConditionModel) or joint attentions
    (SD3Transformer2DModel, FluxTransformer2DModel), and needs none of diffusers itself.

    Args:
        base: the network; it is used, not copied.
        dim: width of a neighbor's embedding.
        scale: of the embeddings that it is trained with, ``unit`` or ``raw``; `Neighbors` are
            brought to it, tensors and tokens are taken as they are.
        fingerprint: of the encoder that makes the embeddings; kept in the file, so that another
            encoder is refused. None: unknown.

    Raises:
        ValueError: the network has no such layers.

    Examples:
        >>> import torch
        >>> from diffusers import UNet2DConditionModel
        >>> from retrodiff.networks import RetrievalAdapter
        >>> unet = UNet2DConditionModel(
        ...     sample_size=8,
        ...     block_out_channels=(32,),
        ...     layers_per_block=1,
        ...     down_block_types=("CrossAttnDownBlock2D",),
        ...     up_block_types=("CrossAttnUpBlock2D",),
        ...     cross_attention_dim=12,
        ... )
        >>> adapter = RetrievalAdapter(unet, dim=16)
        >>> x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 5, 12)
        >>> with torch.no_grad(), adapter.attending(torch.randn(2, 4, 16)):
        ...     out = unet(x, t, text).sample
        >>> out.shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        base: nn.Module,
        dim: int,
        *,
        scale: Scale = "unit",
        fingerprint: Fingerprint | None = None,
    ) -> None:
        super().__init__()
        if scale not in ("unit", "raw"):
            raise ValueError(f"scale={scale!r} is neither 'unit' nor 'raw'")
        self.dim, self.scale, self.fingerprint = whole("dim", dim), scale, fingerprint
        if fingerprint is not None and fingerprint.dim != self.dim:
            raise ValueError(
                f"dim={self.dim} does not match the embeddings of "
                f"{printable(fingerprint.encoder)}, which are {fingerprint.dim} wide: give "
                f"dim={fingerprint.dim}"
            )
        found = places(base)
        if not found:
            raise ValueError(
                f"{type(base).__name__} has no cross-attention or joint attention layers, beside "
                "which neighbors could be attended to: give a network that takes a condition, such "
                "as a UNet2DConditionModel or an SD3Transformer2DModel"
            )
        base.requires_grad_(False)
        self.base, self.names = base, tuple(place.name for place in found)
        self.layers = nn.ModuleList([branch(place, self.dim) for place in found])
        self._places, self._attending = found, False

    def __repr__(self) -> str:
        base, layers = type(self.base).__name__, len(self.layers)
        return f"RetrievalAdapter({base}, dim={self.dim}, {layers} layers)"

    # --- use -------------------------------------------------------------------------------------

    def prepare(
        self, neighbors: Neighbors | Tokens | Tensor, steps: int | None = None
    ) -> PreparedNeighbors:
        """What all evaluations with these neighbors share, computed once; immutable.

        Args:
            neighbors: of each row of the network's batch: (b, k, d), or what was retrieved.
            steps: evaluations that share it; None: 1 where gradients are recorded, else 50.

        Raises:
            ValueError: the embeddings are not ``dim`` wide, or there are none.
        """
        tokens = self._tokens(neighbors)
        layers: list[Any] = list(self.layers)
        prepared = tuple(layer.prepare(tokens, None, steps) for layer in layers)
        return PreparedNeighbors(prepared, tokens.values.shape[0])

    @contextmanager
    def attending(
        self,
        neighbors: Neighbors | Tokens | Tensor | PreparedNeighbors,
        *,
        guidance: bool = False,
        strength: float = 1.0,
    ) -> Iterator[nn.Module]:
        """Inside this block, the base attends to neighbors, whoever calls it; afterwards, no more.

        Args:
            neighbors: of each row that the base is called with: as they were retrieved, (b, k, d),
                or prepared.
            guidance: the base is called with twice as many rows, the first half without a
                condition, as diffusers' pipelines do under classifier-free guidance; that half gets
                no neighbors.
            strength: factor of what neighbors add; 0: nothing.

        Raises:
            ValueError: the base is called with another number of rows; it attends to others
                already; or it is trained with gradient checkpointing, which would compute its
                activations again without neighbors.
        """
        if self._attending:
            raise ValueError("the network attends to neighbors already: end that block first")
        strength = real("strength", strength, 0)
        if isinstance(neighbors, PreparedNeighbors):
            if guidance:
                raise ValueError("guidance=True takes neighbors that are not prepared yet")
            each, rows = neighbors.layers, neighbors.rows
        else:
            tokens = self._tokens(neighbors)
            tokens = _behind_nothing(tokens) if guidance else tokens
            each, rows = (tokens,) * len(self.layers), tokens.values.shape[0]
        self._attending = True
        try:
            with ExitStack() as stack:
                for place, layer, near in zip(self._places, self.layers, each, strict=True):
                    hook = _Beside(self.base, place, layer, near, rows, strength)
                    for handle in hook.registered():
                        stack.callback(handle.remove)
                yield self.base
        finally:
            self._attending = False

    def forward(
        self,
        *given: Any,
        neighbors: Neighbors | Tokens | Tensor | PreparedNeighbors | None = None,
        **named: Any,
    ) -> Any:
        """The base's own output, attending to neighbors; without them, the base's as it is.

        Args:
            *given: arguments of the base.
            neighbors: of each row of the batch.
            **named: arguments of the base.
        """
        if neighbors is None:
            return self.base(*given, **named)
        with self.attending(neighbors):
            return self.base(*given, **named)

    # --- keep ------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The adapter's own weights, by the base's names of its layers."""
        return {
            f"{name}.{part}": layer.get_parameter(part).detach()
            for name, layer in zip(self.names, self.layers, strict=True)
            for part in TRAINED
        }

    def save(self, path: str | Path) -> Path:
        """Writes the adapter alone, without its base, as one safetensors file."""
        path = given(path)
        mark = self.fingerprint
        about = {
            "format": FORMAT,
            "base": type(self.base).__name__,
            "dim": self.dim,
            "scale": self.scale,
            "encoder": None if mark is None else vars(mark),
        }
        write_hashed_tensors(path, self.weights(), {KEY: json.dumps(about)})
        return path

    @classmethod
    def load(
        cls, path: str | Path, base: nn.Module, *, encoder: Encoder | None = None
    ) -> RetrievalAdapter:
        """The adapter of a file on a base, in the type and on the device of the base's weights.

        Args:
            path: of `save`.
            base: a network like the one that it was trained on.
            encoder: whose embeddings will be given; compared with the one it was trained with.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, no adapter, or of another network or encoder.
        """
        file = given(path)
        kept, metadata = map_file(file, again="save it again", hashed=True)
        about = _about(metadata.get(KEY), file)
        mark = about["encoder"]
        adapter = cls(base, about["dim"], scale=about["scale"], fingerprint=mark)
        if encoder is not None and mark is not None:
            what = encoder.fingerprint.disagreement(mark)
            if what is not None:
                raise ValueError(f"the encoder is not that of {printable(file)}: {what}")
        mine = {name: tuple(tensor.shape) for name, tensor in adapter.weights().items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in kept.items()}
        if mine != theirs:
            odd = sorted(n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n))[0]
            raise ValueError(
                f"{printable(file)} was trained on another network ({about['base']}): "
                f"{printable(odd)} has shape {theirs.get(odd, 'of nothing')} there, "
                f"{mine.get(odd, 'of nothing')} on this {type(base).__name__}"
            )
        with torch.no_grad():
            for name, layer in zip(adapter.names, adapter.layers, strict=True):
                for part in TRAINED:
                    layer.get_parameter(part).copy_(kept[f"{name}.{part}"])
        return adapter

    # --- helpers ---------------------------------------------------------------------------------

    def _tokens(self, neighbors: Neighbors | Tokens | Tensor) -> Tokens:
        """Neighbors as tokens, where the base's weights are and in their type."""
        weight = self.layers[0].get_parameter("to_k.weight")
        if isinstance(neighbors, Neighbors):
            values = neighbors.embeddings
            tokens = Tokens(unit(values) if self.scale == "unit" else values, neighbors.mask)
        else:
            tokens = neighbors if isinstance(neighbors, Tokens) else Tokens(neighbors)
        if tokens.values.ndim != 3:
            raise ValueError(
                f"neighbors of shape {tuple(tokens.values.shape)} are given, but the adapter takes "
                "one set for each row of the batch, (b, k, d)"
            )
        if (width := tokens.values.shape[-1]) != self.dim:
            mark = self.fingerprint
            with_which = "that it was trained with" if mark is None else printable(mark.encoder)
            raise ValueError(
                f"the neighbors are {width} wide, but the adapter takes {self.dim}: use the "
                f"encoder {with_which}"
            )
        mask = None if tokens.mask is None else tokens.mask.to(weight.device)
        return replace(tokens, values=tokens.values.to(weight.device, weight.dtype), mask=mask)


class _Beside:
    """Adds a branch's output to that of its layer, while hooks of it are registered.

    Tokens are prepared at the first evaluation, for those that follow; where gradients are
    recorded, for each evaluation.
    """

    def __init__(
        self,
        base: nn.Module,
        place: Place,
        layer: nn.Module,
        near: Any,
        rows: int,
        strength: float,
    ):
        self.base, self.place, self.layer, self.near = base, place, layer, near
        self.rows, self.strength = rows, strength
        self.x: Tensor | None = None

    def registered(self) -> list[Any]:
        """Registers the hooks; returns their handles."""
        handles = [self.place.attention.register_forward_hook(self._add, with_kwargs=True)]
        if self.place.norm is not None:
            handles.append(self.place.norm.register_forward_pre_hook(self._look))
        return handles

    def _look(self, _: nn.Module, given: tuple[Any, ...]) -> None:
        self.x = given[0]

    def _add(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        if torch.is_grad_enabled() and getattr(self.base, "is_gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing computes the base again where it no longer attends to "
                "neighbors: turn it off, base.disable_gradient_checkpointing()"
            )
        if self.place.norm is None:
            x = given[0] if given else named["hidden_states"]
        else:
            x, self.x = self.x, None
        if x is None:
            raise ValueError(
                f"{self.place.name} is used without the LayerNorm before it: the adapter does not "
                "know such a network"
            )
        if x.shape[0] != self.rows:
            raise ValueError(
                f"the network is called with {x.shape[0]} rows, but neighbors are given for "
                f"{self.rows}: give those of every row, or guidance=True where a pipeline doubles "
                "its rows"
            )
        more = added(self.layer, x, self._prepared(x.shape[1]))
        if self.strength != 1:
            more = self.strength * more
        if isinstance(output, tuple):
            return (output[0] + more.to(output[0].dtype), *output[1:])
        return output + more.to(output.dtype)

    def _prepared(self, positions: int) -> Any:
        if not isinstance(self.near, Tokens):
            return self.near
        layer: Any = self.layer
        prepared = layer.prepare(self.near, positions)
        if not torch.is_grad_enabled():
            self.near = prepared
        return prepared


def _behind_nothing(tokens: Tokens) -> Tokens:
    """As many rows of zeros, and then the tokens: diffusers' order under guidance."""
    values, mask = tokens.values, tokens.mask
    if mask is not None:
        mask = torch.cat([torch.ones_like(mask), mask])
    return Tokens(torch.cat([torch.zeros_like(values), values]), mask, tokens.null_rows)


def _about(text: str | None, file: Path) -> dict[str, Any]:
    """What a file's header says, checked."""
    damaged = ValueError(f"{printable(file)} is no retrieval adapter that this version can read")
    try:
        about = json.loads(text or "")
        if about["format"] != FORMAT or about["scale"] not in ("unit", "raw"):
            raise damaged
        whole("dim", about["dim"], 1, 2**20)
        mark = about["encoder"]
        about["encoder"] = None if mark is None else Fingerprint.from_json(mark)
        about["base"] = printable(str(about["base"])[:80])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    return about
