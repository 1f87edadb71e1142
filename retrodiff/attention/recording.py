"""Records how much each token takes part at each position while a network runs.

Every `NeighborAttention` of the network is watched by a hook: its own computation, whatever path it
takes, is left as it is, and the attention is computed a second time beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from retrodiff.attention.absorbed import AttentionTables
from retrodiff.attention.module import NeighborAttention
from retrodiff.attention.reference import KeysValues, join_regions, split_regions

Measure = Literal["weights", "values", "removal"]
"""What counts as a token's part at a position of one layer: see `Recorder`."""

MEASURES: tuple[Measure, ...] = get_args(Measure)

LEAST = 1e-6
"""Least share of the other tokens: a token with all of the attention would be divided by zero."""


class Recorder:
    """Collects the tokens' shares (b, k, h, w) of every layer and evaluation of a network.

    In each layer the shares of a position sum to 1 over the tokens (0 where it attends to none).
    Layers and evaluations count alike; coarse layers are enlarged bilinearly, layers whose
    positions attend to regions of their own by repetition.

    Args:
        rows: images; the first rows of each evaluation, which are the condition's in every
            guidance. What follows them, the null branch, is left out.
        size: (h, w) of the maps.
        measure: ``weights``: the attention, averaged over heads. ``values``: the norm of what the
            token adds to the position, attention times projected value (Kobayashi et al. 2020).
            ``removal``: the norm of the change of the layer's output if the token were taken
            away, so that the softmax runs over the others.

    Raises:
        ValueError: there is no measure of that name; or, while recording, positions come without a
            shape (h, w).

    Examples:
        >>> import torch
        >>> from retrodiff.attention import NeighborAttention, recording
        >>> block = NeighborAttention(width=64, context_width=32, heads=2)
        >>> with torch.no_grad(), recording([block], rows=2, size=(8, 8)) as recorder:
        ...     y = block(torch.randn(2, 64, 64), torch.randn(2, 4, 32), (8, 8))
        >>> recorder.shares.shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(self, rows: int, size: tuple[int, int], measure: Measure = "removal") -> None:
        if measure not in MEASURES:
            raise ValueError(f"measure={measure!r} is none of {', '.join(MEASURES)}")
        self.rows, self.size = rows, size
        self.measure: Measure = measure
        self.evaluations = 0
        self._total: Tensor | None = None

    @property
    def shares(self) -> Tensor:
        """The mean (b, k, h, w) of what was recorded, float32 on the CPU.

        Raises:
            ValueError: nothing was recorded.
        """
        if self._total is None:
            raise ValueError("no attention was recorded: run the network inside of the block")
        return (self._total / self.evaluations).float().cpu()

    @torch.no_grad()
    def add(
        self, module: NeighborAttention, x: Tensor, context: Any, shape: tuple[int, int] | None
    ) -> None:
        """Records one layer's evaluation; arguments as for `NeighborAttention.forward`."""
        if shape is None:
            raise ValueError("positions without a shape (h, w) have no place in a picture")
        prepared = (
            context if not isinstance(context, Tensor) and hasattr(context, "regions") else None
        )
        prepared = module.prepare(context) if prepared is None else prepared
        weights = module.attention_weights(x, prepared, shape)[: self.rows].float()
        shares = weights.mean(1)
        if self.measure != "weights" and weights.shape[-1] > 1:
            shares = _effects(weights, _added(module, prepared), shape, self.measure)
        total = shares.sum(-1, keepdim=True)
        shares = torch.where(total > 0, shares / total.clamp(min=torch.finfo().tiny), 0)
        maps = rearrange(shares, "b (h w) k -> b k h w", h=shape[0])
        if maps.shape[-2:] != self.size:
            smooth = prepared.regions == 1
            maps = F.interpolate(maps, self.size, mode="bilinear" if smooth else "nearest")
        self._total = maps if self._total is None else self._total + maps
        self.evaluations += 1


@contextlib.contextmanager
def recording(
    networks: Sequence[nn.Module],
    rows: int,
    size: tuple[int, int],
    measure: Measure = "removal",
) -> Iterator[Recorder]:
    """Records the attention of all layers of some networks that run in this block.

    Outputs stay what they are, bit for bit. A network that ``torch.compile`` has wrapped runs
    uncompiled meanwhile, which rounds otherwise.

    Args:
        networks: whose `NeighborAttention` modules are watched.
        rows: see `Recorder`.
        size: of the maps.
        measure: see `Recorder`.

    Raises:
        ValueError: there is no such module.
    """
    found = layers(networks)
    if not found:
        raise ValueError("the network does not attend to neighbors: no layer can be recorded")
    recorder = Recorder(rows, size, measure)

    def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert isinstance(module, NeighborAttention)
        names = ("x", "context", "shape")
        arguments = {"shape": None, **dict(zip(names, given, strict=False)), **named}
        recorder.add(module, **arguments)

    with contextlib.ExitStack() as stack:
        if any(getattr(m, "_compiled_call_impl", None) for top in networks for m in top.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in found:
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield recorder


def layers(networks: Sequence[nn.Module]) -> list[NeighborAttention]:
    """The neighbor cross-attentions of some networks."""
    return [m for top in networks for m in top.modules() if isinstance(m, NeighborAttention)]


def _added(module: NeighborAttention, prepared: Any) -> Tensor:
    """What each head adds for each token at full attention: (b, r, h, k, c), live rows only."""
    if isinstance(prepared, AttentionTables):
        return rearrange(prepared.u, "b r (h k) c -> b r h k c", h=prepared.heads).float()
    assert isinstance(prepared, KeysValues)
    values = rearrange(prepared.values, "b r k (h e) -> b r h k e", h=module.heads)
    out = rearrange(module.to_out.weight, "c (h e) -> h e c", h=module.heads)
    return torch.einsum("brhke,hec->brhkc", values.float(), out.float())


def _effects(weights: Tensor, added: Tensor, shape: tuple[int, int], measure: Measure) -> Tensor:
    """Norms (b, n, k) of what each token, or its absence, changes at each position.

    With attention a and values u of a head, the layer adds Σ_j a_j u_j. Token j adds a_j u_j to it;
    without j the sum changes by a_j / (1 - a_j) · (Σ_i a_i u_i - u_j).
    """
    b, h, _, k = weights.shape
    live = min(b, len(added))
    regions = added.shape[1]
    flat = rearrange(weights[:live], "b h n k -> b n (h k)")
    a = rearrange(split_regions(flat, regions, shape), "b r n (h k) -> b r n h k", h=h)
    u = rearrange(added[:live], "b r h k c -> b r (h k) c")
    norms: list[Tensor] = []
    for j in range(k):
        own = a[..., j : j + 1]
        if measure == "values":
            factors = torch.zeros_like(a)
            factors[..., j : j + 1] = own
        else:
            gain = own / (1 - own).clamp(min=LEAST)
            factors = -gain * a
            factors[..., j : j + 1] += gain
        norms.append((rearrange(factors, "b r n h k -> b r n (h k)") @ u).norm(dim=-1))
    found = join_regions(torch.stack(norms, -1), shape)
    return F.pad(found, (0, 0, 0, 0, 0, b - live))
