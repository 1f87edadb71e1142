"""Samplers: take noise to data along decreasing noise levels, by ``(x, sigma) -> denoised``.

A sampler says how one step is made; `Stepwise` makes them all.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from retrodiff.interfaces import Callback, Denoise, Sampler
from retrodiff.numbers import real
from retrodiff.randomness import normal_like


@dataclass(frozen=True, eq=False)
class Step:
    """What a sampler's step works with: x, the estimate and both noise levels.

    Args:
        x: (b, c, h, w) at ``sigma``.
        denoised: the denoiser's estimate there.
        sigma: the noise level.
        following: the level that the step leads to.
        look: the denoiser's estimate for another x and level: one more network call.
        generator: randomness of the run.

    Examples:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from retrodiff.diffusion import Step, Stepwise
        >>> @dataclass(frozen=True)
        ... class Plain(Stepwise):
        ...     def step(self, now: Step, past):
        ...         return now.x + (now.following - now.sigma) * now.slope
        >>> sigmas = torch.tensor([2.0, 1.0, 0.0])
        >>> Plain().sample(lambda x, sigma: 0 * x, torch.full((1, 1, 1, 1), 4.0), sigmas).item()
        0.0
    """

    x: Tensor
    denoised: Tensor
    sigma: float
    following: float
    look: Callable[[Tensor, float], Tensor]
    generator: torch.Generator | None

    @property
    def slope(self) -> Tensor:
        """dx/dsigma = (x - denoised) / sigma, the noise in x."""
        return (self.x - self.denoised) / self.sigma

    def slope_at(self, x: Tensor) -> Tensor:
        """The slope of another x at the level that the step leads to: one more network call."""
        return (x - self.look(x, self.following)) / self.following

    def renewed(self, eta: float) -> tuple[float, float]:
        """Level to step down to and fresh noise to add there; their squares add up to following's.

        Args:
            eta: 0 adds nothing; 1 adds the noise of DDPM's posterior; at most all of it is renewed.
        """
        sigma, following = self.sigma, self.following
        fresh = eta * following * math.sqrt(sigma**2 - following**2) / sigma
        fresh = min(fresh, following)
        return math.sqrt(max(following**2 - fresh**2, 0.0)), fresh


class Stepwise(Sampler):
    """A sampler that is given by its step; subclass it and write `step`.

    Examples:
        >>> from dataclasses import dataclass
        >>> from retrodiff.diffusion import Stepwise
        >>> from retrodiff.testing import check_sampler
        >>> @dataclass(frozen=True)
        ... class Plain(Stepwise):
        ...     # Euler's method.
        ...     def step(self, now, past):
        ...         return now.x + (now.following - now.sigma) * now.slope
        >>> check_sampler(Plain())
    """

    memory: int = 0
    """Earlier steps that `step` wants to see."""

    @abstractmethod
    def step(self, now: Step, past: Sequence[Step]) -> Tensor:
        """X (b, c, h, w) at ``now.following``.

        Args:
            now: where the run is.
            past: the last `memory` steps before it, oldest first; fewer at the beginning.
        """
        ...

    def sample(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """One step for each pair of levels; see `Sampler.sample`.

        x is kept in float64: slopes are differences divided by noise levels down to a thousandth.
        The denoiser sees it in the type that it came in.
        """
        kind = x.dtype
        x = x.to(torch.float64 if x.device.type != "mps" else torch.float32)

        def look(x: Tensor, sigma: float) -> Tensor:
            x, wide = x.to(kind), x.dtype
            levels = torch.full((len(x),), sigma, dtype=torch.promote_types(kind, torch.float32))
            return denoise(x, levels.to(x.device)).to(wide)

        past: list[Step] = []
        for number, (sigma, following) in enumerate(_levels(x, sigmas)):
            now = Step(x, look(x, sigma), sigma, following, look, generator)
            x = self.step(now, past)
            past = [*past, now][max(0, len(past) + 1 - self.memory) :]
            if callback is not None:
                callback(number, now.denoised.to(kind))
        return x.to(kind)


def _levels(x: Tensor, sigmas: Tensor) -> list[tuple[float, float]]:
    """Consecutive pairs of noise levels as numbers, checked."""
    values = [float(s) for s in sigmas.tolist()]
    if any(not math.isfinite(s) or s < 0 for s in values) or any(
        a <= b for a, b in pairwise(values)
    ):
        raise ValueError(f"sigmas must be finite and strictly decreasing to 0 or more: {values}")
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, but a sampler takes (b, c, h, w)")
    return list(pairwise(values))


@dataclass(frozen=True)
class DDIM(Stepwise):
    """The paper's sampler (Song et al. 2021, eq. 12), in σ-space: one network call per step.

    Args:
        eta: 0 is deterministic; 1 adds the noise of DDPM's posterior.

    Examples:
        >>> import torch
        >>> from retrodiff.diffusion import DDIM, ScaledLinear
        >>> schedule = ScaledLinear()
        >>> sigmas = schedule.sigmas(20)
        >>> noise = schedule.start(torch.randn(2, 4, 8, 8), sigmas)
        >>> x = DDIM(eta=0.0).sample(lambda x, sigma: 0 * x, noise, sigmas)
        >>> x.shape
        torch.Size([2, 4, 8, 8])
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        real("eta", self.eta, 0, 1)

    def step(self, now: Step, past: Sequence[Step]) -> Tensor:
        """Towards the estimate, with eta of the noise renewed."""
        del past
        kept, fresh = now.renewed(self.eta)
        x = now.denoised + (kept / now.sigma) * (now.x - now.denoised)
        return x + fresh * normal_like(x, now.generator) if fresh > 0 else x


@dataclass(frozen=True)
class DDPM(DDIM):
    """Ancestral sampling (Ho et al. 2020): DDIM with eta = 1, meant for all T steps.

    Examples:
        >>> from retrodiff.diffusion import DDIM, DDPM
        >>> isinstance(DDPM(), DDIM), DDPM().eta
        (True, 1.0)
    """

    eta: float = 1.0


@dataclass(frozen=True)
class PLMS(Stepwise):
    """Pseudo linear multistep (Liu et al. 2022, eq. 12): Adams-Bashforth coefficients on the noise.

    The coefficients are those of order 4 for even steps. The first step is an improved Euler step
    and the levels are uneven in sigma, so as a whole it converges with order 2. A run of S steps
    makes S + 1 network calls.

    Examples:
        >>> import torch
        >>> from retrodiff.diffusion import PLMS, ScaledLinear
        >>> schedule = ScaledLinear()
        >>> sigmas = schedule.sigmas(20)
        >>> x = PLMS().sample(
        ...     lambda x, sigma: 0 * x, schedule.start(torch.randn(1, 1, 4, 4), sigmas), sigmas
        ... )
        >>> x.shape
        torch.Size([1, 1, 4, 4])
    """

    memory = 3

    def step(self, now: Step, past: Sequence[Step]) -> Tensor:
        """One network call, two in the first step."""
        eps, before = now.slope, [step.slope for step in past]
        ahead = now.following - now.sigma
        match before:
            case []:
                mean = eps
                if now.following > 0:
                    mean = (eps + now.slope_at(now.x + ahead * eps)) / 2
            case [a]:
                mean = (3 * eps - a) / 2
            case [b, a]:
                mean = (23 * eps - 16 * a + 5 * b) / 12
            case _:
                c, b, a = before
                mean = (55 * eps - 59 * a + 37 * b - 9 * c) / 24
        return now.x + ahead * mean


@dataclass(frozen=True)
class Euler(Stepwise):
    """First order along dx/dsigma (Karras et al. 2022): one network call per step.

    Examples:
        >>> import torch
        >>> from retrodiff.diffusion import Euler
        >>> sigmas = torch.tensor([2.0, 1.0, 0.0])
        >>> Euler().sample(lambda x, sigma: 0 * x, torch.full((1, 1, 1, 1), 4.0), sigmas).item()
        0.0
    """

    def step(self, now: Step, past: Sequence[Step]) -> Tensor:
        """Straight along the slope."""
        del past
        return now.x + (now.following - now.sigma) * now.slope


@dataclass(frozen=True)
class EulerAncestral(Stepwise):
    """Euler's step to a lower level, then fresh noise (``euler_ancestral``, as in k-diffusion).

    One network call per step. For eta from 0 to 1 it is `DDIM` with that eta, which is written in
    terms of the estimate instead of the slope; ``EulerAncestral(0)`` is `Euler`.

    Args:
        eta: 0 or more: 0 is deterministic, 1 adds the noise of DDPM's posterior. Above 1 more is
            renewed, at most all of it.

    Examples:
        >>> import torch
        >>> from retrodiff.diffusion import EulerAncestral
        >>> sigmas = torch.tensor([2.0, 1.0, 0.0])
        >>> x = EulerAncestral(eta=0.5).sample(
        ...     lambda x, sigma: 0 * x, torch.randn(2, 1, 4, 4), sigmas
        ... )
        >>> x.shape
        torch.Size([2, 1, 4, 4])
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        real("eta", self.eta, 0)

    def step(self, now: Step, past: Sequence[Step]) -> Tensor:
        """Along the slope below the level that follows, and up to it by noise."""
        del past
        down, fresh = now.renewed(self.eta)
        x = now.x + (down - now.sigma) * now.slope
        return x + fresh * normal_like(x, now.generator) if fresh > 0 else x


@dataclass(frozen=True)
class Heun(Stepwise):
    """Second order by a corrected Euler step (Karras et al. 2022, algorithm 1).

    Two network calls per step, one where the step ends at zero.

    Examples:
        >>> import torch
        >>> from retrodiff.diffusion import Heun, Karras
        >>> sigmas = Karras().sigmas(10)
        >>> noise = torch.randn(2, 1, 4, 4) * sigmas[0]
        >>> Heun().sample(lambda x, sigma: 0 * x, noise, sigmas).abs().max().item() < 1e-6
        True
    """

    def step(self, now: Step, past: Sequence[Step]) -> Tensor:
        """Along the mean of the slopes at both ends."""
        del past
        slope = now.slope
        if now.following > 0:
            ahead = now.x + (now.following - now.sigma) * slope
            slope = (slope + now.slope_at(ahead)) / 2
        return now.x + (now.following - now.sigma) * slope


@dataclass(frozen=True)
class DPMpp2M(Stepwise):
    """DPM-Solver++(2M): second-order multistep in log sigma (Lu et al. 2022, algorithm 2).

    One network call per step. Few steps suffice where they are of like length in log sigma: on the
    paper's models choose ``schedule=LogSpaced(...)`` with it. On their own even timesteps, 20 steps
    lose to DDIM.

    Examples:
        >>> from retrodiff import presets
        >>> from retrodiff.diffusion import DPMpp2M
        >>> presets.ldm().sample(n=1, steps=4, sampler=DPMpp2M()).images.shape
        torch.Size([1, 1, 8, 8])
    """

    memory = 1

    def step(self, now: Step, past: Sequence[Step]) -> Tensor:
        """Towards an estimate that is extrapolated from the last two."""
        estimate = now.denoised
        h = math.log(now.sigma / now.following) if now.following > 0 else math.inf
        if past and now.following > 0:
            last = past[-1]
            h_last = math.log(last.sigma / last.following)
            estimate = now.denoised + (now.denoised - last.denoised) * (h / (2 * h_last))
        return (now.following / now.sigma) * now.x - math.expm1(-h) * estimate


SAMPLERS: dict[str, type[Stepwise]] = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "plms": PLMS,
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "heun": Heun,
    "dpmpp_2m": DPMpp2M,
}
"""The usual names, for `get_sampler` and the command line's ``--sampler``."""


def get_sampler(name: str) -> Sampler:
    """The sampler of a usual name, such as ``ddim`` or ``dpmpp_2m``, with its default settings.

    Raises:
        ValueError: there is no sampler of that name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]()
