"""Generates images from contexts code by code, each drawn from the logits of a transformer.

The paper's autoregressive sibling (Blattmann et al. 2022, RARM) on the same retrieval and the same
conditioning as the diffusion models. The noise that every generator is given is the randomness of
its draws: one normal number for each code, so that an image is a function of context and noise.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrodiff.components import evaluating, where
from retrodiff.interfaces import Callback, Context, GuidedGenerator, TrainableGenerator
from retrodiff.numbers import is_real, real, whole
from retrodiff.precision import full_precision


@runtime_checkable
class Tokenizer(Protocol):
    """Maps images to codes, and back: `retrodiff.networks.VQAutoencoder`, `GrayLevels`.

    Examples:
        >>> from retrodiff.autoregressive import GrayLevels, Tokenizer
        >>> isinstance(GrayLevels(17), Tokenizer), GrayLevels(17).vocabulary
        (True, 17)
    """

    @property
    def vocabulary(self) -> int:
        """Number of codes."""
        ...

    def codes(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> codes (b, h', w'), whole numbers."""
        ...

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (b, h', w') -> images in about [-1, 1]."""
        ...


@dataclass(frozen=True, kw_only=True)
class AutoregressiveGenerator(TrainableGenerator, GuidedGenerator):
    """Draws the codes of an image one after the other, then decodes them.

    Its latents are the codes themselves, (b, 1, h, w). It has no sampler and no noise levels;
    ``steps`` has no effect, there is one for each code.

    The way in which the paper's autoregressive models, RARM, draw images (Blattmann et al. 2022).

    Args:
        network: a `retrodiff.networks.CausalTransformer`.
        autoencoder: images <-> codes; its weights are not trained here.
        guidance: scale in the logits, ``null + guidance (cond - null)``; 1 is the condition alone
            and costs half.
        temperature: divides the logits; below 1 prefers likely codes.
        top_k: only the likeliest codes are drawn; None: all.

    Raises:
        ValueError: network and autoencoder have different numbers of codes, or a number is out of
            range.

    Examples:
        >>> from retrodiff.autoregressive import AutoregressiveGenerator, GrayLevels
        >>> from retrodiff.networks import CausalTransformer
        >>> network = CausalTransformer(
        ...     codes=17, grid=(8, 8), width=32, depth=2, heads=2, context_width=16
        ... )
        >>> generator = AutoregressiveGenerator(network=network, autoencoder=GrayLevels(17))
        >>> generator.shape
        (1, 8, 8)
    """

    network: nn.Module
    autoencoder: Tokenizer
    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        codes = self.network.codes
        if codes != self.autoencoder.vocabulary:
            raise ValueError(
                f"the network predicts {codes} codes, but {type(self.autoencoder).__name__} has "
                f"{self.autoencoder.vocabulary}: build the network with codes="
                f"{self.autoencoder.vocabulary}"
            )
        real("guidance", self.guidance, 0)
        real("temperature", self.temperature, above=0)
        if self.top_k is not None:
            whole("top_k", self.top_k)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(1, h, w): one code at each place."""
        height, width = self._net.grid
        return 1, height, width

    @property
    def widths(self) -> dict[str, int]:
        """The streams that the network takes."""
        return dict(self._net.widths)

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return self._net.device

    @property
    def untrained(self) -> bool:
        """Fresh weights that are meant to be replaced."""
        return bool(getattr(self.network, "untrained", False))

    @property
    def _net(self) -> Any:
        return self.network

    def guided(self, guidance: Any) -> AutoregressiveGenerator:
        """The same generator with another scale of guidance.

        Raises:
            ValueError: it is no number, or below 0.
        """
        if not is_real(guidance):
            raise ValueError(
                f"guidance={guidance!r}: {type(self).__name__} mixes logits by a number, "
                "guidance=2.0"
            )
        return dataclasses.replace(self, guidance=float(guidance))

    @torch.no_grad()
    def generate(
        self,
        context: Context,
        null: Context,
        noise: Tensor,
        *,
        steps: int,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Normal numbers (b, 1, h, w) -> codes (b, 1, h, w) as floating-point numbers.

        Each number is turned into one between 0 and 1 by the normal distribution function, and
        picks the code at that height of the distribution of codes. ``steps`` and ``generator`` have
        no effect. A code is NaN where logits are not finite.
        """
        del steps, generator
        height, width = self._net.grid
        if tuple(noise.shape[1:]) != self.shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, but this generator draws {height}x{width} "
                f"codes: expected (b, {', '.join(map(str, self.shape))})"
            )
        exact = torch.float32 if noise.device.type == "mps" else torch.float64
        heights = torch.special.ndtr(noise.to(exact)).flatten(1)
        guided = self.guidance != 1 and bool(context.streams)
        codes = torch.zeros(heights.shape, device=noise.device)
        with evaluating(self.network):
            both = Context.cat([context, null]) if guided else context
            rows = len(noise) * (2 if guided else 1)
            run, chosen = self._net.decoding(both, rows), None
            for i in range(height * width):
                logits = run.next(chosen).to(exact)
                if guided:
                    cond, other = logits.chunk(2)
                    logits = other + self.guidance * (cond - other)
                drawn = draw(logits, heights[:, i], self.temperature, self.top_k)
                finite = logits.isfinite().all(-1)
                codes[:, i] = torch.where(finite, drawn.to(codes), torch.nan)
                chosen = torch.cat([drawn, drawn]) if guided else drawn
                if callback is not None:
                    callback(i, codes.view(-1, *self.shape))
        return codes.view(-1, *self.shape)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Codes (b, 1, h, w) -> images (b, c, h, w), float32 in [-1, 1]; NaN where a code is."""
        broken = latents.isnan().flatten(1).any(1)
        codes = latents[:, 0].nan_to_num().round().long().clamp(0, self.autoencoder.vocabulary - 1)
        at = where(self.autoencoder)
        with evaluating(self.autoencoder):
            codes = codes if at is None else codes.to(at[0])
            images = self.autoencoder.decode_codes(codes).float().clamp(-1, 1)
        images[broken.to(images.device)] = torch.nan
        return images

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] -> codes (b, h, w) on the network's device.

        Raises:
            ValueError: there are more or fewer codes than the network has places.
        """
        at = where(self.autoencoder)
        with torch.no_grad(), full_precision(), evaluating(self.autoencoder):
            codes = self.autoencoder.codes(images if at is None else images.to(*at))
        if tuple(codes.shape[1:]) != tuple(self._net.grid):
            raise ValueError(
                f"images {tuple(images.shape[1:])} have codes {tuple(codes.shape[1:])}, which do "
                f"not match the network's grid={tuple(self._net.grid)}: resize the images, or "
                "build the network for them"
            )
        return codes.to(self.device)

    def loss(
        self, images: Tensor, context: Context, generator: torch.Generator | None = None
    ) -> Tensor:
        """Cross-entropy (b,) of the codes of images, each given those before it; nats per code."""
        del generator
        codes = self.encode(images).flatten(1)
        logits = self.network(codes[:, :-1], context)
        return F.cross_entropy(logits.transpose(1, 2).float(), codes, reduction="none").mean(1)


def draw(logits: Tensor, heights: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Draws codes: those at given heights of the distribution, likeliest codes first.

    Args:
        logits: (b, vocabulary).
        heights: (b,) numbers between 0 and 1; uniform ones give codes their probabilities.
        temperature: divides the logits.
        top_k: how many of the likeliest codes take part; None: all.

    Returns:
        (b,) whole numbers.
    """
    k = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    kept, order = logits.topk(k)
    above = (kept / temperature).softmax(-1).cumsum(-1)
    place = (above < heights[:, None]).sum(-1, keepdim=True).clamp(max=k - 1)
    return order.gather(-1, place)[:, 0]
