"""Schedules: noise levels to sample at, and how unit noise enters σ-space and leaves it.

Inside a sampler x = x0 + sigma * noise. A variance-preserving model (the paper's) lives at
x / sqrt(1 + sigma²) instead; its schedule knows how to come and go, so that samplers need not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from retrodiff.interfaces import Schedule
from retrodiff.numbers import real, whole


def check_steps(steps: int, most: int | None = None) -> None:
    """Refuses a step count that no schedule can serve."""
    if steps < 1 or (most is not None and steps > most):
        upper = f" to {most}, the schedule's own length" if most is not None else " on"
        raise ValueError(f"steps={steps}, but a schedule takes 1{upper}")


@dataclass(frozen=True)
class ScaledLinear(Schedule):
    """The discrete schedule of latent diffusion: sqrt(beta) linear in t.

    Rombach et al. 2022; the paper's models use 0.0015 to 0.0195 (0.015 at 768 pixels). For S < T
    steps the timesteps are floor(i·T/S) + 1, which is the reference's choice wherever S divides T
    and exactly S distinct steps elsewhere. As in the reference, the last noise level is that of
    t = 0, not zero; only S = T, which visits t = 0 itself, ends at zero.

    Args:
        beta_start: beta of the first step.
        beta_end: beta of the last step.
        length: T.

    Examples:
        >>> from retrodiff.diffusion import ScaledLinear
        >>> schedule = ScaledLinear()  # the paper's
        >>> schedule.timesteps(4).tolist()
        [751, 501, 251, 1]
        >>> [round(sigma, 3) for sigma in schedule.sigmas(4).tolist()]
        [10.981, 2.788, 0.987, 0.055, 0.039]
    """

    beta_start: float = 0.0015
    beta_end: float = 0.0195
    length: int = 1000

    def __post_init__(self) -> None:
        real("beta_start", self.beta_start, above=0, below=1)
        real("beta_end", self.beta_end, self.beta_start, below=1)
        whole("length", self.length, 2)

    @property
    def betas(self) -> Tensor:
        """Variance of the noise that each step adds (T,), float64."""
        low, high = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
        return torch.linspace(low, high, self.length, dtype=torch.float64).square()

    @property
    def alphas_cumprod(self) -> Tensor:
        """Share of the signal's variance that is left after each step (T,), float64."""
        return (1 - self.betas).cumprod(0)

    @cached_property
    def table(self) -> Tensor:
        """Sigma of every integer timestep (T,), float64, increasing."""
        signal = self.alphas_cumprod
        return ((1 - signal) / signal).sqrt()

    def timesteps(self, steps: int) -> Tensor:
        """The integer timesteps visited (steps,), decreasing."""
        check_steps(steps, self.length)
        t = torch.arange(steps) * self.length // steps + (0 if steps == self.length else 1)
        return t.flip(0)

    def sigmas(self, steps: int) -> Tensor:
        """Decreasing noise levels (steps + 1,)."""
        table = self.table
        last = table.new_zeros(1) if steps == self.length else table[:1]
        return torch.cat([table[self.timesteps(steps)], last])

    def timestep(self, sigma: Tensor) -> Tensor:
        """Sigma (b,) -> t (b,) float: exact at the schedule's levels, else linear in log sigma."""
        log_table = self.table.log().to(sigma.device)
        log_sigma = sigma.double().clamp_min(1e-12).log()
        right = torch.searchsorted(log_table, log_sigma).clamp(1, self.length - 1)
        low, high = log_table[right - 1], log_table[right]
        t = (right - 1 + (log_sigma - low) / (high - low)).clamp(0, self.length - 1)
        nearest = t.round()
        return torch.where((t - nearest).abs() < 1e-3, nearest, t).to(sigma.dtype)

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Unit noise is the noisiest variance-preserving state; times sqrt(1 + sigma²) here."""
        return noise * math.sqrt(1 + float(sigmas[0]) ** 2)

    def finish(self, x: Tensor, sigmas: Tensor) -> Tensor:
        """Back to the variance-preserving state at the last level."""
        return x / math.sqrt(1 + float(sigmas[-1]) ** 2)


@dataclass(frozen=True)
class LogSpaced(Schedule):
    """The range of another schedule in even steps of log sigma (uniform log-SNR: Lu et al. 2022).

    Multistep solvers such as DPM++(2M) extrapolate from one step to the next and want steps of like
    length. Even timesteps make them unlike: near the data, one step of twenty divides sigma by 5.5.

    Args:
        schedule: whose first and last levels are kept; it also leads in and out of σ-space.

    Examples:
        >>> from retrodiff.diffusion import LogSpaced, ScaledLinear
        >>> sigmas = LogSpaced(ScaledLinear()).sigmas(4)
        >>> [round(ratio, 3) for ratio in (sigmas[:-1] / sigmas[1:]).tolist()]
        [6.819, 6.819, 6.819, 6.819]
    """

    schedule: ScaledLinear = ScaledLinear()

    def sigmas(self, steps: int) -> Tensor:
        """Decreasing noise levels (steps + 1,), the last one that of t = 0."""
        check_steps(steps)
        low, high = self.schedule.table[[0, -1]].log().tolist()
        return torch.linspace(high, low, steps + 1, dtype=torch.float64).exp()

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """As the other schedule."""
        return self.schedule.start(noise, sigmas)

    def finish(self, x: Tensor, sigmas: Tensor) -> Tensor:
        """As the other schedule."""
        return self.schedule.finish(x, sigmas)


@dataclass(frozen=True)
class Karras(Schedule):
    """Levels evenly spaced in sigma^(1/rho), then zero (Karras et al. 2022, eq. 5).

    Args:
        sigma_min: last level before zero.
        sigma_max: first level.
        rho: 7 in the paper: more steps near the data.

    Examples:
        >>> from retrodiff.diffusion import Karras
        >>> [round(sigma, 3) for sigma in Karras().sigmas(4).tolist()]
        [80.0, 9.723, 0.47, 0.002, 0.0]
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        real("sigma_min", self.sigma_min, above=0)
        real("sigma_max", self.sigma_max, above=self.sigma_min)
        real("rho", self.rho, above=0)

    def sigmas(self, steps: int) -> Tensor:
        """Decreasing noise levels (steps + 1,), the last zero."""
        check_steps(steps)
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        levels = (high + ramp * (low - high)) ** self.rho
        return torch.cat([levels, levels.new_zeros(1)])


@dataclass(frozen=True)
class LinearFlow(Schedule):
    """Levels evenly spaced in flow-matching time t, sigma = t / (1 - t) (Lipman et al. 2023).

    Args:
        t_max: first time; below 1, where sigma is infinite.
        shift: above 1 spends more steps at high noise (Esser et al. 2024, eq. 23); 1 leaves t
            as it is.

    Examples:
        >>> from retrodiff.diffusion import LinearFlow
        >>> [round(sigma, 3) for sigma in LinearFlow(t_max=0.8).sigmas(4).tolist()]
        [4.0, 1.5, 0.667, 0.25, 0.0]
    """

    t_max: float = 0.995
    shift: float = 1.0

    def __post_init__(self) -> None:
        real("t_max", self.t_max, above=0, below=1)
        real("shift", self.shift, above=0)

    def sigmas(self, steps: int) -> Tensor:
        """Decreasing noise levels (steps + 1,), the last zero."""
        check_steps(steps)
        t = torch.linspace(self.t_max, 0, steps + 1, dtype=torch.float64)
        return self.shift * t / (1 - t)
