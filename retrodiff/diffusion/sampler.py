"""Ways from noise to data along decreasing noise levels, all on ``(x, sigma) -> denoised``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from retrodiff.interfaces import Denoise, Sampler

Callback = Callable[[int, Tensor], None]


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


def _at(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    return denoise(x, torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device))


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


@dataclass(frozen=True)
class DDIM(Sampler):
    """The paper's sampler (Song et al. 2021, eq. 12), in σ-space.

    Args:
        eta: 0 is deterministic; 1 adds the noise of DDPM's posterior.
    """

    eta: float = 0.0

    def sample(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """One network call per step."""
        for step, (sigma, following) in enumerate(_levels(x, sigmas)):
            denoised = _at(denoise, x, sigma)
            fresh = self.eta * following * math.sqrt(sigma**2 - following**2) / sigma
            kept = math.sqrt(max(following**2 - fresh**2, 0.0))
            x = denoised + (kept / sigma) * (x - denoised)
            if fresh > 0:
                x = x + fresh * _randn_like(x, generator)
            if callback is not None:
                callback(step, denoised)
        return x


@dataclass(frozen=True)
class DDPM(DDIM):
    """Ancestral sampling (Ho et al. 2020): DDIM with eta = 1, meant for all T steps."""

    eta: float = 1.0


@dataclass(frozen=True)
class PLMS(Sampler):
    """Pseudo linear multistep (Liu et al. 2022): Adams-Bashforth of order 4 on the noise.

    The first step is an improved Euler step, so a run of S steps makes S + 1 network calls.
    """

    def sample(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """One network call per step, two in the first."""
        del generator
        past: list[Tensor] = []
        for step, (sigma, following) in enumerate(_levels(x, sigmas)):
            denoised = _at(denoise, x, sigma)
            eps = (x - denoised) / sigma
            match past:
                case []:
                    mean = eps
                    if following > 0:
                        ahead = x + (following - sigma) * eps
                        mean = (eps + (ahead - _at(denoise, ahead, following)) / following) / 2
                case [a]:
                    mean = (3 * eps - a) / 2
                case [b, a]:
                    mean = (23 * eps - 16 * a + 5 * b) / 12
                case _:
                    *_, c, b, a = past
                    mean = (55 * eps - 59 * a + 37 * b - 9 * c) / 24
            past = [*past[-2:], eps]
            x = x + (following - sigma) * mean
            if callback is not None:
                callback(step, denoised)
        return x


@dataclass(frozen=True)
class Euler(Sampler):
    """First order along dx/dsigma = (x - denoised) / sigma (Karras et al. 2022)."""

    def sample(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """One network call per step."""
        del generator
        for step, (sigma, following) in enumerate(_levels(x, sigmas)):
            denoised = _at(denoise, x, sigma)
            x = x + (following - sigma) / sigma * (x - denoised)
            if callback is not None:
                callback(step, denoised)
        return x


@dataclass(frozen=True)
class Heun(Sampler):
    """Second order by a corrected Euler step (Karras et al. 2022, algorithm 1)."""

    def sample(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Two network calls per step, one where the step ends at zero."""
        del generator
        for step, (sigma, following) in enumerate(_levels(x, sigmas)):
            denoised = _at(denoise, x, sigma)
            slope = (x - denoised) / sigma
            ahead = x + (following - sigma) * slope
            if following > 0:
                slope = (slope + (ahead - _at(denoise, ahead, following)) / following) / 2
            x = x + (following - sigma) * slope
            if callback is not None:
                callback(step, denoised)
        return x


@dataclass(frozen=True)
class DPMpp2M(Sampler):
    """DPM-Solver++(2M): second-order multistep in log sigma (Lu et al. 2022, algorithm 2).

    Few steps suffice where they are of like length in log sigma: on the paper's models choose
    ``schedule=LogSpaced(...)`` with it. On their own even timesteps, 20 steps lose to DDIM.
    """

    def sample(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """One network call per step."""
        del generator
        previous: tuple[Tensor, float] | None = None
        for step, (sigma, following) in enumerate(_levels(x, sigmas)):
            denoised = _at(denoise, x, sigma)
            estimate = denoised
            h = math.log(sigma / following) if following > 0 else math.inf
            if previous is not None and following > 0:
                old, h_old = previous
                estimate = denoised + (denoised - old) * (h / (2 * h_old))
            x = (following / sigma) * x - math.expm1(-h) * estimate
            previous = (denoised, h)
            if callback is not None:
                callback(step, denoised)
        return x


SAMPLERS: dict[str, type[DDIM | PLMS | Euler | Heun | DPMpp2M]] = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "plms": PLMS,
    "euler": Euler,
    "heun": Heun,
    "dpmpp_2m": DPMpp2M,
}


def sampler_named(name: str) -> Sampler:
    """A sampler with its default settings by the field's name for it."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]()
