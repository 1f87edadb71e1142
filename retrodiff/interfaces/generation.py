"""Roles of generation: conditioners, generators, and the parts of a diffusion model."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from retrodiff.interfaces.values import Context, Neighbors, Query, Scale

Denoise = Callable[[Tensor, Tensor], Tensor]
"""``(x (b, c, h, w), sigma (b,)) -> denoised (b, c, h, w)``: all that a sampler sees of a model."""

Callback = Callable[[int, Tensor], None]
"""Told ``(step, denoised)`` after each step."""


@runtime_checkable
class Conditioner(Protocol):
    """Turns a query and its neighbors into what a network attends to.

    One that has weights is a torch module, and is trained with the denoiser.

    Examples:
        >>> import torch
        >>> from retrodiff import Conditioner, Context, Query, Tokens
        >>> from retrodiff.retrieval import NearestNeighbors
        >>> from retrodiff.testing import small_database
        >>> class Nearest(Conditioner):
        ...     def widths(self, dim):
        ...         return {"nearest": dim}
        ...     def condition(self, query, neighbors):
        ...         return Context({"nearest": Tokens(neighbors.embeddings[:, :1])})
        >>> query, database = Query(torch.randn(2, 8)), small_database()
        >>> Nearest().condition(query, NearestNeighbors().retrieve(query, database, 4)).widths
        {'nearest': 8}
    """

    @property
    def uses_neighbors(self) -> bool:
        """Whether a database is needed at all."""
        return True

    @property
    def latents_shape(self) -> tuple[int, int, int] | None:
        """(c, h, w) of the ``Neighbors.latents`` that it sees; None: it sees embeddings alone."""
        return None

    def refuses(self, stored: Scale) -> str | None:
        """Why embeddings stored at this scale do not fit, in a line; None: they do.

        A wrapper that does not define it is asked for what the conditioners inside it say.
        """
        del stored
        return None

    def vector_width(self, dim: int) -> int | None:
        """Width of ``Context.vector`` for embeddings of width ``dim``; None: there is no vector."""
        del dim
        return None

    @abstractmethod
    def widths(self, dim: int) -> dict[str, int]:
        """Width of each stream for embeddings of width ``dim``."""
        ...

    @abstractmethod
    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        """Query and neighbors -> what the network attends to. Deterministic."""
        ...

    def null(self, context: Context) -> Context:
        """The condition of the unconditional branch; by default all zero."""
        return context.zeros()

    def drop(self, context: Context, generator: torch.Generator | None = None) -> Context:
        """Applies conditioning dropout; identity by default."""
        del generator
        return context


@runtime_checkable
class Generator(Protocol):
    """Turns contexts into images: by diffusion, token by token, or with another library's pipeline.

    `retrodiff.diffusion.DiffusionGenerator` is the one that a model is made of unless it is given
    another.

    Examples:
        >>> import torch
        >>> from retrodiff import Context, Generator
        >>> class Gray(Generator):
        ...     # Draws one gray for each image; it takes no condition.
        ...     shape, widths = (1, 4, 4), {}
        ...
        ...     def generate(
        ...         self, context, null, noise, *, steps, generator=None, callback=None
        ...     ):
        ...         return noise.mean((1, 2, 3), keepdim=True).expand_as(noise)
        ...
        ...     def decode(self, latents):
        ...         return latents.clamp(-1, 1)
        >>> empty = Context({})
        >>> Gray().generate(empty, empty, torch.randn(2, 1, 4, 4), steps=1).shape
        torch.Size([2, 1, 4, 4])
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of its latents, and of the noise that it is given."""
        ...

    @property
    def widths(self) -> dict[str, int]:
        """Width of each context stream that it takes; empty: takes no condition."""
        ...

    @property
    def vector_width(self) -> int | None:
        """Width of the ``Context.vector`` that it takes; None: it takes none."""
        return None

    @property
    def untrained(self) -> bool:
        """Fresh weights that are meant to be replaced; sampling from them warns."""
        return False

    @property
    def device(self) -> torch.device:
        """Where noise and contexts are to be."""
        return torch.device("cpu")

    @abstractmethod
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
        """Latents (b, c, h, w).

        Args:
            context: the condition, b rows.
            null: the condition of the unconditional branch, b rows of the same token counts.
            noise: standard normal (b, c, h, w), a function of seed and image number.
            steps: as many as the model was asked for; one that has no steps may ignore it.
            generator: further randomness, best a `Randomness` of b rows.
            callback: told ``(step, current estimate)`` after each step.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images (b, c, h, w) in [-1, 1]; by default the latents are the images."""
        return latents


@runtime_checkable
class TrainableGenerator(Generator, Protocol):
    """A generator that knows its own training objective.

    Examples:
        >>> from retrodiff import presets
        >>> from retrodiff.interfaces import TrainableGenerator
        >>> isinstance(presets.ldm().diffusion(), TrainableGenerator)
        True
    """

    @abstractmethod
    def loss(
        self, images: Tensor, context: Context, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss (b,) of images (b, c, h, w) in [-1, 1] under their contexts."""
        ...


@runtime_checkable
class GuidedGenerator(Generator, Protocol):
    """A generator that can be asked for another guidance.

    Examples:
        >>> from retrodiff.autoregressive import AutoregressiveGenerator, GrayLevels
        >>> from retrodiff.interfaces import GuidedGenerator
        >>> from retrodiff.networks import CausalTransformer
        >>> network = CausalTransformer(
        ...     codes=17, grid=(4, 4), width=32, depth=1, heads=2, context_width=16
        ... )
        >>> generator = AutoregressiveGenerator(network=network, autoencoder=GrayLevels(17))
        >>> isinstance(generator, GuidedGenerator), generator.guided(2.0).guidance
        (True, 2.0)
    """

    @abstractmethod
    def guided(self, guidance: Any) -> Generator:
        """The same generator with another guidance, usually a scale.

        Raises:
            ValueError: it takes no such guidance.
        """
        ...


@runtime_checkable
class Denoiser(Protocol):
    """Estimates the clean latent from a noisy one: ``(x, sigma, context) -> denoised`` (ε_θ).

    Attributes:
        untrained: fresh weights that are meant to be replaced; sampling from them warns.
        takes_float64: x and sigma may be float64, whatever the type of the weights.

    Examples:
        >>> import torch
        >>> from retrodiff import Context, Denoiser
        >>> from retrodiff.diffusion import Karras
        >>> class Gaussian(Denoiser):
        ...     # The exact denoiser of standard normal data.
        ...     shape, widths, schedule = (1, 2, 2), {}, Karras()
        ...
        ...     def denoise(self, x, sigma, context):
        ...         return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)
        >>> x, sigma = torch.ones(1, 1, 2, 2), torch.tensor([1.0])
        >>> Gaussian().denoise(x, sigma, Context({})).flatten().tolist()
        [0.5, 0.5, 0.5, 0.5]
    """

    untrained: bool = False
    takes_float64: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of a latent."""
        ...

    @property
    def widths(self) -> dict[str, int]:
        """Width of each context stream that the network accepts; empty: takes no condition."""
        ...

    @property
    def schedule(self) -> Schedule:
        """The noise levels it is sampled at unless another schedule is chosen."""
        ...

    @property
    def vector_width(self) -> int | None:
        """Width of the ``Context.vector`` that the network takes; None: it takes none."""
        return None

    @property
    def device(self) -> torch.device:
        """Where x, sigma and context are to be."""
        return torch.device("cpu")

    @abstractmethod
    def denoise(self, x: Tensor, sigma: Tensor, context: Any) -> Tensor:
        """E[x0 | x] for x = x0 + sigma * noise.

        Args:
            x: (b, c, h, w).
            sigma: (b,).
            context: what `prepare` returned, or a Context. It may have a whole multiple of b rows:
                the branches of guidance, one after the other, all on the same x.

        Returns:
            (rows of the context, c, h, w); b rows for a denoiser that takes no condition.
        """
        ...

    def prepare(self, context: Context) -> Any:
        """Everything about the context that all steps share, computed once; immutable."""
        return context


@runtime_checkable
class TrainableDenoiser(Denoiser, Protocol):
    """A denoiser that knows its own training objective.

    Examples:
        >>> from retrodiff import presets
        >>> from retrodiff.interfaces import TrainableDenoiser
        >>> isinstance(presets.ldm().denoiser, TrainableDenoiser)
        True
    """

    @abstractmethod
    def draw_sigmas(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise levels (n,) of the training distribution."""
        ...

    @abstractmethod
    def loss(self, x0: Tensor, sigma: Tensor, noise: Tensor, context: Context) -> Tensor:
        """Weighted squared error (b,) of each sample."""
        ...


@runtime_checkable
class Guidance(Protocol):
    """Combines a condition and its null into one denoiser.

    Examples:
        >>> from retrodiff import Guidance
        >>> class Half(Guidance):
        ...     # The mean of both branches.
        ...     def guide(self, denoiser, branches):
        ...         cond, null = (denoiser.prepare(branches[name]) for name in ("cond", "null"))
        ...
        ...         def denoise(x, sigma):
        ...             both = denoiser.denoise(x, sigma, cond) + denoiser.denoise(
        ...                 x, sigma, null
        ...             )
        ...             return both / 2
        ...
        ...         return denoise
        >>> from retrodiff.testing import check_guidance
        >>> check_guidance(Half())
    """

    @abstractmethod
    def guide(self, denoiser: Denoiser, branches: Mapping[str, Context]) -> Denoise:
        """Branches (``cond``, ``null``, ...) -> one guided ``(x, sigma) -> denoised``."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Takes noise to data along decreasing noise levels.

    Examples:
        >>> import torch
        >>> from retrodiff import Sampler
        >>> class OneStep(Sampler):
        ...     # The denoiser's first estimate.
        ...     def sample(self, denoise, x, sigmas, generator=None, callback=None):
        ...         return denoise(x, sigmas[0].expand(len(x)))
        >>> x = OneStep().sample(
        ...     lambda x, sigma: 0 * x, torch.randn(2, 1, 4, 4), torch.tensor([80.0, 0.0])
        ... )
        >>> x.abs().max().item()
        0.0
    """

    @abstractmethod
    def sample(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """From x at sigmas[0] to x at sigmas[-1].

        Args:
            denoise: ``(x, sigma) -> denoised``.
            x: (b, c, h, w) in σ-space.
            sigmas: (steps + 1,), strictly decreasing; the last may be 0.
            generator: randomness of stochastic samplers, best a `Randomness` of b rows; draw with
                ``retrodiff.randomness.normal_like(x, generator)``.
            callback: told ``(step, denoised)`` after each step.
        """
        ...


@runtime_checkable
class Autoencoder(Protocol):
    """Maps images to the latents that are generated, and back.

    Both methods take tensors of any floating dtype, and return float32 (or float64) ones.

    Images (b, c, h, w) in [-1, 1] <-> latents (b, c, h, w) with channels and size of their own.

    Examples:
        >>> import torch
        >>> from retrodiff import Autoencoder
        >>> class Halved(Autoencoder):
        ...     def encode(self, images):
        ...         return images.float() / 2
        ...     def decode(self, latents):
        ...         return latents.float() * 2
        >>> images = torch.rand(2, 3, 8, 8)
        >>> torch.equal(Halved().decode(Halved().encode(images)), images)
        True
    """

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; float32 where there are none."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU where there are none."""
        return torch.device("cpu")

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] -> latents."""
        ...

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images in about [-1, 1]."""
        ...


@runtime_checkable
class Schedule(Protocol):
    """Noise levels to sample at, and the way into σ-space and out of it.

    Examples:
        >>> import torch
        >>> from retrodiff import Schedule
        >>> class Linear(Schedule):
        ...     # From 10 down to 0 in even steps.
        ...     def sigmas(self, steps):
        ...         return torch.linspace(10, 0, steps + 1)
        >>> Linear().sigmas(4).tolist()
        [10.0, 7.5, 5.0, 2.5, 0.0]
    """

    @abstractmethod
    def sigmas(self, steps: int) -> Tensor:
        """Decreasing noise levels (steps + 1,), float64."""
        ...

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Unit noise -> x at sigmas[0]."""
        return noise * sigmas[0].to(noise)

    def finish(self, x: Tensor, sigmas: Tensor) -> Tensor:
        """From x at sigmas[-1] to the latent."""
        del sigmas
        return x
