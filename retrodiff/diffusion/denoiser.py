"""Five ways to turn a network into ``(x, sigma) -> denoised``, all in one form.

Every parametrization is ``denoised = c_skip x + c_out F(c_in x, c_noise)`` (Karras et al. 2022,
eq. 7) with its own four scalings; the training target follows from them: F should equal
``(x0 - c_skip x) / c_out``. The squared error is taken there, which gives each parametrization its
published loss: noise, velocity, the image itself, EDM's unit-weight target, flow velocity.
``min_snr`` weights it by noise level instead.

A network is called as ``network(x, timesteps, context)``, with timesteps on the scale of 0 to 1000
whatever the parametrization, and says its latent ``shape`` and the ``widths`` of its context
streams, and the ``vector_width`` of a vector that it takes beside them. One that can do work once
per run has ``prepare(context)``.

The four scalings, their sums and the target are computed in float32 at least, whatever the type of
the network's weights and under autocast, too: at EDM's smallest sigma a target made from bfloat16
numbers is wrong by half. Only the network itself sees its own type.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retrodiff.components import summary
from retrodiff.diffusion.schedule import Karras, LinearFlow, ScaledLinear
from retrodiff.interfaces import Context, Schedule
from retrodiff.numbers import real
from retrodiff.precision import full_precision
from retrodiff.randomness import normal, uniform


class Scalings(NamedTuple):
    """c_skip, c_out, c_in and c_noise, each (b,)."""

    skip: Tensor
    out: Tensor
    inp: Tensor
    noise: Tensor


class Preconditioned(nn.Module):
    """A denoiser made of a network and four scalings; subclasses say which.

    Args:
        network: ``network(x, timesteps, context)`` with ``shape`` and ``widths``.
        min_snr: the gamma of Min-SNR weighting (Hang et al. 2023, arXiv 2303.09556; 5 there): the
            error of the denoised image counts min(SNR, gamma), SNR = (data / sigma)². None: the
            parametrization's own weighting.

    Examples:
        >>> import torch
        >>> from retrodiff.diffusion import EpsDenoiser, FlowDenoiser, Preconditioned
        >>> issubclass(EpsDenoiser, Preconditioned), issubclass(FlowDenoiser, Preconditioned)
        (True, True)
        >>> from retrodiff import presets
        >>> x0, noise = torch.zeros(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
        >>> denoiser = presets.ldm().denoiser
        >>> from retrodiff import Context
        >>> denoiser.loss(x0, denoiser.draw_sigmas(2), noise, Context({})).shape
        torch.Size([2])
    """

    takes_float64 = True
    sigma_data: float = 1.0
    """Standard deviation of the data, as the parametrization takes it."""

    def __init__(self, network: nn.Module, *, min_snr: float | None = None) -> None:
        super().__init__()
        if min_snr is not None:
            min_snr = real("min_snr", min_snr, above=0)
        self.network, self.min_snr = network, min_snr
        self.untrained = False
        """Fresh weights that are meant to be replaced: sampling from them warns."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of a latent."""
        return tuple(self.network.shape)  # type: ignore[return-value]

    @property
    def widths(self) -> dict[str, int]:
        """Width of each context stream."""
        return dict(self.network.widths)  # type: ignore[arg-type]

    @property
    def vector_width(self) -> int | None:
        """Width of the vector that joins the timestep embedding; None: there is none."""
        return getattr(self.network, "vector_width", None)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        weight = self._weight()
        return torch.device("cpu") if weight is None else weight.device

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the weights; None: there are none."""
        weight = self._weight()
        return None if weight is None else weight.dtype

    def _weighting(self) -> dict[str, Any]:
        """What `min_snr` adds to the constructor arguments."""
        return {} if self.min_snr is None else {"min_snr": self.min_snr}

    def _weight(self) -> Tensor | None:
        tensors = chain(self.network.parameters(), self.network.buffers())
        return next((t for t in tensors if t.is_floating_point()), None)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({summary(self.network)})"

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """The natural schedule to sample at."""

    @abstractmethod
    def scalings(self, sigma: Tensor) -> Scalings:
        """The four scalings at sigma (b,)."""

    @abstractmethod
    def draw_sigmas(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise levels (n,) of the training distribution."""

    def prepare(self, context: Context) -> Any:
        """What all steps share, computed once by networks that can."""
        prepare = getattr(self.network, "prepare", None)
        context = context.to(dtype=self.dtype)
        return context if prepare is None else prepare(context)

    def _output(self, x: Tensor, sigma: Tensor, context: Any) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and the network's output, all in the type of x."""
        with full_precision():
            s = self.scalings(sigma)
            skip, out, inp = (v.to(x.dtype).view(-1, 1, 1, 1) for v in s[:3])
            scaled, noise = (inp * x).to(self.dtype or x.dtype), s.noise.to(x.dtype)
            if self.dtype is not None:
                noise = noise.to(torch.promote_types(self.dtype, torch.float32))
        if isinstance(context, Context):
            context = context.to(dtype=self.dtype)
            if not hasattr(self.network, "prepare"):
                # Networks that prepare also share what the branches of guidance have in common.
                branches = max(1, len(context) // len(x))
                scaled, noise = scaled.repeat(branches, 1, 1, 1), noise.repeat(branches)
        return skip, out, self.network(scaled, noise, context).to(x.dtype)

    def denoise(self, x: Tensor, sigma: Tensor, context: Any) -> Tensor:
        """E[x0 | x] for x = x0 + sigma * noise.

        Args:
            x: (b, c, h, w).
            sigma: (b,).
            context: of b rows, or of a whole multiple of b: the branches of guidance on the same x.

        Returns:
            (rows of the context, c, h, w), of x's type; computed in float32 at least.
        """
        kind = x.dtype
        x, sigma = _exact(x), _exact(sigma)
        skip, out, output = self._output(x, sigma, context)
        with full_precision():
            clean = skip * x
            branches = len(output) // len(x)
            if branches == 1:
                return (clean + out * output).to(kind)
            split = output.unflatten(0, (branches, len(x)))
            return (clean + out * split).flatten(0, 1).to(kind)

    def loss(self, x0: Tensor, sigma: Tensor, noise: Tensor, context: Context) -> Tensor:
        """Squared error (b,) of the network's output, averaged over c, h, w; float32 at least."""
        x0, sigma, noise = _exact(x0), _exact(sigma), _exact(noise)
        with full_precision():
            x = x0 + sigma.to(x0.dtype).view(-1, 1, 1, 1) * noise
        skip, out, output = self._output(x, sigma, context)
        with full_precision():
            target = (x0 - skip * x) / out
            error = (output - target).square().flatten(1).mean(1)
            if self.min_snr is None:
                return error
            snr = (self.sigma_data / sigma.to(error)).square()
            return snr.clamp(max=self.min_snr) * out.flatten().square() * error


def _exact(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class EpsDenoiser(Preconditioned):
    """The network predicts the noise of a variance-preserving process (Ho et al. 2020).

    Args:
        network: as for all denoisers.
        schedule: the discrete schedule that gives sigma its timestep; the paper's by default.
        min_snr: as for all denoisers.

    Examples:
        >>> import torch
        >>> from retrodiff import Context
        >>> from retrodiff.diffusion import EpsDenoiser
        >>> from retrodiff.networks import DiT
        >>> network = DiT(
        ...     shape=(1, 8, 8), patch=4, width=16, depth=1, heads=2, widths={"neighbors": 8}
        ... )
        >>> denoiser = EpsDenoiser(network)
        >>> x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 10.0])
        >>> denoiser.denoise(x, sigma, Context.of(torch.randn(2, 4, 8))).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: ScaledLinear | None = None,
        *,
        min_snr: float | None = None,
    ) -> None:
        super().__init__(network, min_snr=min_snr)
        self._schedule = schedule or ScaledLinear()

    @property
    def schedule(self) -> ScaledLinear:
        """The schedule that training used."""
        return self._schedule

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"network": self.network, "schedule": self._schedule, **self._weighting()}

    def scalings(self, sigma: Tensor) -> Scalings:
        """c_skip = 1, c_out = -sigma, c_in = 1 / sqrt(1 + sigma²)."""
        t = self._schedule.timestep(sigma)
        return Scalings(torch.ones_like(sigma), -sigma, (1 + sigma**2).rsqrt(), t)

    def draw_sigmas(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Uniform over the integer timesteps."""
        length = self._schedule.length
        t = (uniform(generator, (n,), torch.float64) * length).long().cpu()
        return self._schedule.table[t].float()


class VDenoiser(EpsDenoiser):
    """The network predicts v = alpha * noise - sigma_vp * x0 (Salimans & Ho 2022).

    Examples:
        >>> import torch
        >>> from retrodiff import Context
        >>> from retrodiff.diffusion import VDenoiser
        >>> from retrodiff.networks import DiT
        >>> network = DiT(
        ...     shape=(1, 8, 8), patch=4, width=16, depth=1, heads=2, widths={"neighbors": 8}
        ... )
        >>> x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 10.0])
        >>> VDenoiser(network).denoise(x, sigma, Context.of(torch.randn(2, 4, 8))).shape
        torch.Size([2, 1, 8, 8])
    """

    def scalings(self, sigma: Tensor) -> Scalings:
        """c_skip = alpha², c_out = -sigma * alpha, c_in = alpha, alpha = 1 / sqrt(1 + sigma²)."""
        alpha = (1 + sigma**2).rsqrt()
        return Scalings(alpha**2, -sigma * alpha, alpha, self._schedule.timestep(sigma))


class X0Denoiser(EpsDenoiser):
    """The network predicts x0 of a variance-preserving process (Salimans & Ho 2022).

    Examples:
        >>> import torch
        >>> from retrodiff import Context
        >>> from retrodiff.diffusion import X0Denoiser
        >>> from retrodiff.networks import DiT
        >>> network = DiT(
        ...     shape=(1, 8, 8), patch=4, width=16, depth=1, heads=2, widths={"neighbors": 8}
        ... )
        >>> x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 10.0])
        >>> X0Denoiser(network).denoise(x, sigma, Context.of(torch.randn(2, 4, 8))).shape
        torch.Size([2, 1, 8, 8])
    """

    def scalings(self, sigma: Tensor) -> Scalings:
        """c_skip = 0, c_out = 1, c_in = 1 / sqrt(1 + sigma²)."""
        t = self._schedule.timestep(sigma)
        zero = torch.zeros_like(sigma)
        return Scalings(zero, zero + 1, (1 + sigma**2).rsqrt(), t)


class EDMDenoiser(Preconditioned):
    """Unit-variance input and target at every noise level (Karras et al. 2022, table 1).

    Args:
        network: as for all denoisers.
        sigma_data: standard deviation of the data.
        mean: mean of ln sigma in training.
        std: standard deviation of ln sigma in training.
        sigma_min: last sampling level before zero.
        sigma_max: first sampling level.
        min_snr: as for all denoisers.

    Examples:
        >>> import torch
        >>> from retrodiff import Context
        >>> from retrodiff.diffusion import EDMDenoiser
        >>> from retrodiff.networks import DiT
        >>> network = DiT(
        ...     shape=(1, 8, 8), patch=4, width=16, depth=1, heads=2, widths={"neighbors": 8}
        ... )
        >>> denoiser = EDMDenoiser(network, sigma_data=0.5)
        >>> x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 10.0])
        >>> denoiser.denoise(x, sigma, Context.of(torch.randn(2, 4, 8))).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        sigma_data: float = 0.5,
        mean: float = -1.2,
        std: float = 1.2,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        min_snr: float | None = None,
    ) -> None:
        super().__init__(network, min_snr=min_snr)
        real("sigma_data", sigma_data, above=0, most=1e6)
        real("mean", mean)
        real("std", std, above=0)
        Karras(sigma_min, sigma_max)  # which says what is wrong with them
        self.sigma_data, self.mean, self.std = sigma_data, mean, std
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    @property
    def schedule(self) -> Karras:
        """EDM's own levels."""
        return Karras(self.sigma_min, self.sigma_max)

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        names = ("network", "sigma_data", "mean", "std", "sigma_min", "sigma_max")
        return {name: getattr(self, name) for name in names} | self._weighting()

    def scalings(self, sigma: Tensor) -> Scalings:
        """Karras et al. 2022, table 1; c_noise = ln(sigma) / 4, times 1000 for the embedding."""
        s2 = self.sigma_data**2
        total = sigma**2 + s2
        return Scalings(
            s2 / total,
            sigma * self.sigma_data * total.rsqrt(),
            total.rsqrt(),
            250 * sigma.clamp_min(1e-12).log(),
        )

    def draw_sigmas(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Log-normal."""
        return (self.mean + self.std * normal(generator, (n,))).exp()


class FlowDenoiser(Preconditioned):
    """The network predicts the velocity noise - x0 of a straight path (Lipman et al. 2023).

    x_t = (1 - t) x0 + t noise is x / (1 + sigma) with sigma = t / (1 - t).

    Args:
        network: as for all denoisers.
        mean: mean of logit(t) in training, 0 in Esser et al. 2024.
        std: its standard deviation, 1 there.
        t_max: the time sampling starts from.
        shift: of the sampling times, see `LinearFlow`.
        min_snr: as for all denoisers.

    Examples:
        >>> import torch
        >>> from retrodiff import Context
        >>> from retrodiff.diffusion import FlowDenoiser
        >>> from retrodiff.networks import DiT
        >>> network = DiT(
        ...     shape=(1, 8, 8), patch=4, width=16, depth=1, heads=2, widths={"neighbors": 8}
        ... )
        >>> denoiser = FlowDenoiser(network)
        >>> x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 10.0])
        >>> denoiser.denoise(x, sigma, Context.of(torch.randn(2, 4, 8))).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        t_max: float = 0.995,
        shift: float = 1.0,
        min_snr: float | None = None,
    ) -> None:
        super().__init__(network, min_snr=min_snr)
        real("mean", mean)
        real("std", std, above=0)
        LinearFlow(t_max, shift)  # which says what is wrong with them
        self.mean, self.std, self.t_max, self.shift = mean, std, t_max, shift

    @property
    def schedule(self) -> LinearFlow:
        """Even steps in t."""
        return LinearFlow(self.t_max, self.shift)

    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        names = ("network", "mean", "std", "t_max", "shift")
        return {name: getattr(self, name) for name in names} | self._weighting()

    def scalings(self, sigma: Tensor) -> Scalings:
        """c_skip = c_in = 1 - t, c_out = -t, c_noise = 1000 t."""
        t = sigma / (1 + sigma)
        return Scalings(1 - t, -t, 1 - t, 1000 * t)

    def draw_sigmas(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """logit(t) normal, so that sigma = t / (1 - t) is log-normal."""
        return (self.mean + self.std * normal(generator, (n,))).exp()
