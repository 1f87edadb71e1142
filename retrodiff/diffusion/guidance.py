"""Guidance: combines the conditional and the null branch of a denoiser.

Branches are joined along the batch and prepared once, so a step is one network call, and what the
branches have in common (x itself) is handed over once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from retrodiff.interfaces import Context, Denoise, Denoiser, Guidance
from retrodiff.numbers import real

SAME = 1e-5
"""Relative difference below which two noise levels are the same one in another precision."""


@dataclass(frozen=True)
class Unguided(Guidance):
    """The conditional branch alone.

    Examples:
        >>> from retrodiff import presets
        >>> from retrodiff.diffusion import Unguided
        >>> presets.ldm().replace(guidance=Unguided()).sample(n=1, steps=2).images.shape
        torch.Size([1, 1, 8, 8])
    """

    def guide(self, denoiser: Denoiser, branches: Mapping[str, Context]) -> Denoise:
        """One network call per step at the batch's own size."""
        prepared = denoiser.prepare(branches["cond"])

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return denoiser.denoise(x, sigma, prepared)

        return denoise


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """denoised = null + scale (cond - null) (Ho & Salimans 2022).

    Args:
        scale: 1 is the conditional branch alone, 0 the null branch, above 1 extrapolates.

    Raises:
        ValueError: ``scale`` is negative.

    Examples:
        >>> from retrodiff import presets
        >>> from retrodiff.diffusion import ClassifierFree
        >>> model = presets.ldm().replace(guidance=ClassifierFree(2.0))
        >>> model.guidance
        ClassifierFree(scale=2.0)
    """

    scale: float

    def __post_init__(self) -> None:
        if real("scale", self.scale) < 0:
            raise ValueError(
                f"scale={self.scale!r} is negative: give 0 or more; Mixture({{'cond': "
                f"{self.scale!r}}}) leads away from a condition"
            )

    def guide(self, denoiser: Denoiser, branches: Mapping[str, Context]) -> Denoise:
        """One network call per step on both branches at once."""
        if self.scale == 1:
            return Unguided().guide(denoiser, branches)
        both = _together(denoiser, [branches["cond"], branches["null"]])

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            cond, null = both(x, sigma)
            return null + self.scale * (cond - null)

        return denoise


@dataclass(frozen=True)
class Mixture(Guidance):
    """denoised = null + sum of weight (branch - null) over several conditions (Liu et al. 2022).

    A branch is ``cond``, the whole condition; the name of a stream, which is shown alone while the
    others are the null; or a name in ``Model.sample(databases={...})``: the same query with the
    neighbors that another database has for it. A negative weight leads away from a branch.

    ``Mixture({"cond": s})`` is ``ClassifierFree(s)``; ``{"query": 2, "neighbors": 1}`` mixes text
    and database; ``{"cond": 2, "negative": -1}`` leads away from a database. `Interval` and
    `ByLevel` let a mixture act at some noise levels only.

    Args:
        weights: of each branch.

    Raises:
        ValueError: there are no weights; or, in sampling, one names no branch.

    Examples:
        >>> from retrodiff.diffusion import Mixture
        >>> text_and_database = Mixture({"query": 1.5, "neighbors": 0.5})
        >>> away = Mixture({"cond": 2.0, "negative": -1.0})
        >>> dict(away.weights)
        {'cond': 2.0, 'negative': -1.0}
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights is empty: name a branch, such as {'cond': 2.0}")
        for name, weight in self.weights.items():
            real(f"weights[{name!r}]", weight)

    def guide(self, denoiser: Denoiser, branches: Mapping[str, Context]) -> Denoise:
        """One network call per step on all branches at once."""
        # The whole condition comes first, where attribution looks for it.
        names = sorted(self.weights, key=lambda name: name != "cond")
        parts = [_branch(name, branches) for name in names]
        together = _together(denoiser, [*parts, branches["null"]])
        weights = [self.weights[name] for name in names]

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            *each, null = together(x, sigma)
            out = null
            for weight, one in zip(weights, each, strict=True):
                out = out + weight * (one - null)
            return out

        return denoise


def _together(
    denoiser: Denoiser, parts: Sequence[Context]
) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """The estimate of each branch, from one network call per step."""
    joined = Context.cat(parts)
    prepared, n = denoiser.prepare(joined), len(parts)

    def estimates(x: Tensor, sigma: Tensor) -> list[Tensor]:
        found = denoiser.denoise(x, sigma, prepared)
        # A model without conditions has one branch only, which is all of them.
        return list(found.chunk(n)) if len(joined) else [found] * n

    return estimates


def _branch(name: str, branches: Mapping[str, Context]) -> Context:
    """A condition by its name; a stream's, or ``vector``, with the null in place of the others."""
    if name in branches:
        return branches[name]
    cond, null = branches["cond"], branches["null"]
    parts = [*cond.streams, *([] if cond.vector is None else ["vector"])]
    if name not in parts:
        known = ", ".join(["cond", *parts, *(n for n in branches if n not in ("cond", "null"))])
        raise ValueError(
            f"Mixture weighs {name!r}, but the branches are {known}: name one of them, or give "
            f"databases={{{name!r}: ...}}"
        )
    if name == "vector":
        return replace(null, vector=cond.vector)
    return replace(null, streams={**null.streams, name: cond.streams[name]})


@dataclass(frozen=True)
class ByLevel(Guidance):
    """Another guidance for each range of noise levels: text first and the database then, say.

    Args:
        parts: (lowest sigma, guidance), from high levels to low ones; the last reaches to 0
            whatever it says.

    Raises:
        ValueError: there is no level, or they do not fall.

    Examples:
        >>> from retrodiff.diffusion import ByLevel, ClassifierFree, Mixture
        >>> text_first = ByLevel(((1.0, Mixture({"query": 2.0})), (0.0, ClassifierFree(1.5))))
        >>> [lowest for lowest, guidance in text_first.parts]
        [1.0, 0.0]
    """

    parts: tuple[tuple[float, Guidance], ...]

    def __post_init__(self) -> None:
        levels = [real("sigma", low, 0) for low, _ in self.parts]
        if not levels or levels != sorted(levels, reverse=True):
            raise ValueError(f"ByLevel has the levels {levels}: give at least one, falling")

    def guide(self, denoiser: Denoiser, branches: Mapping[str, Context]) -> Denoise:
        """As many calls as the guidance of the level makes."""
        guided = [(low, part.guide(denoiser, branches)) for low, part in self.parts]

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            level = float(sigma[0])
            mine = (part for low, part in guided if level >= low * (1 - SAME))
            return next(mine, guided[-1][1])(x, sigma)

        return denoise


@dataclass(frozen=True)
class Interval(Guidance):
    """Guidance at noise levels within [low, high] only (Kynkäänniemi et al. 2024).

    Args:
        guidance: what acts inside the interval; outside, the conditional branch alone.
        low: smallest sigma that is guided; a level of the schedule that equals it is guided, too.
        high: largest sigma that is guided, likewise; infinity for no limit.

    Examples:
        >>> from retrodiff.diffusion import ClassifierFree, Interval
        >>> Interval(ClassifierFree(4.0), low=0.3, high=5.0)
        Interval(guidance=ClassifierFree(scale=4.0), low=0.3, high=5.0)
    """

    guidance: Guidance
    low: float
    high: float

    def __post_init__(self) -> None:
        real("low", self.low, 0)
        real("high", self.high, self.low, infinite=True)

    def guide(self, denoiser: Denoiser, branches: Mapping[str, Context]) -> Denoise:
        """As many calls as the inner guidance makes."""
        inside = self.guidance.guide(denoiser, branches)
        outside = Unguided().guide(denoiser, branches)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            level = float(sigma[0])
            guided = self.low * (1 - SAME) <= level <= self.high * (1 + SAME)
            return (inside if guided else outside)(x, sigma)

        return denoise


@dataclass(frozen=True, eq=False)
class Renewed(Guidance):
    """Another guidance, whose conditions change at some noise levels: for `ReRetrieving`.

    Args:
        guidance: what guides.
        levels: noise levels, falling; conditions change before the first estimate at or below one.
        renew: (number of the level, last estimate) -> the branches that change.
    """

    guidance: Guidance
    levels: tuple[float, ...]
    renew: Callable[[int, Tensor], Mapping[str, Context]]

    def guide(self, denoiser: Denoiser, branches: Mapping[str, Context]) -> Denoise:
        """As many calls as the inner guidance makes; with no level, the same."""
        current = self.guidance.guide(denoiser, branches)
        done, last = 0, None

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal current, done, last
            level = float(sigma[0])
            while done < len(self.levels) and level <= self.levels[done] * (1 + SAME):
                if last is not None:
                    changed = self.renew(done, last)
                    current = self.guidance.guide(denoiser, {**branches, **changed})
                done += 1
            last = current(x, sigma)
            return last

        return denoise
