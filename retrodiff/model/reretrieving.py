"""Retrieval that goes on while an image forms: neighbors of the estimate, not of the query."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from retrodiff.diffusion.generator import DiffusionGenerator
from retrodiff.diffusion.guidance import Renewed
from retrodiff.interfaces import Context, Generator, Neighbors, Query
from retrodiff.model.asking import Asked, Asker
from retrodiff.numbers import whole


@dataclass(frozen=True)
class ReRetrieving:
    """At which steps of sampling neighbors are looked for again.

    The clean estimate of the step before is decoded and encoded, and its neighbors take the place
    of those before. A prompt stays the query, and stays the token that it is. Usable with every
    diffusion model and sampler.

    Args:
        steps: numbers of steps, 1 to the last one; step 0 has no estimate before it. None of them:
            sampling as without.

    Examples:
        >>> from retrodiff.model import ReRetrieving
        >>> ReRetrieving(steps=(10, 20)).steps
        (10, 20)
    """

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        steps = tuple(sorted({whole("reretrieve", step) for step in self.steps}))
        object.__setattr__(self, "steps", steps)


class Renewing:
    """Looks for neighbors again for the images of a request, batch after batch.

    Args:
        at: when.
        asker: finds them.
        generator: makes the estimates.
        asked: what was found before sampling.
        steps: of the sampler.

    Raises:
        ValueError: the generator has no steps, a step comes after the last one, or a mode retrieves
            nothing.
    """

    def __init__(
        self, at: ReRetrieving, asker: Asker, generator: Generator, asked: Asked, steps: int
    ) -> None:
        if not isinstance(generator, DiffusionGenerator):
            raise ValueError(
                f"reretrieve has no effect: {type(generator).__name__} has no steps; leave it out"
            )
        if at.steps and at.steps[-1] >= steps:
            raise ValueError(
                f"reretrieve names step {at.steps[-1]}, but the last of steps={steps} is number "
                f"{steps - 1}"
            )
        for mode, (_, neighbors) in asked.found.items():
            if bool((neighbors.indices < 0).all()):
                raise ValueError(f"mode {mode!r} retrieves nothing, so reretrieve has no effect")
        self.at, self.asker, self.generator = at, asker, generator
        sigmas = generator.schedule.sigmas(steps)
        self.levels = tuple(float(sigmas[step]) for step in at.steps)
        self.found: dict[int, list[Neighbors]] = {step: [] for step in at.steps}

    def part(self, query: Query, neighbors: Neighbors) -> Generator:
        """The generator for some images, whose queries and neighbors these are."""

        def renew(number: int, denoised: Tensor) -> Mapping[str, Context]:
            near = self.asker.again(query, neighbors, self.generator.decode(denoised).cpu())
            self.found[self.at.steps[number]].append(near)
            context = self.asker.context(query, near)
            null = self.asker.conditioner.null(context)
            device = self.generator.device
            return {"cond": context.to(device), "null": null.to(device)}

        guidance = Renewed(self.generator.guidance, self.levels, renew)
        return dataclasses.replace(self.generator, guidance=guidance)

    def result(self, order: Tensor) -> dict[int, tuple[Neighbors, ...]]:
        """The neighbors of every image, by step; ``order`` brings the images into their own."""
        rows = {
            s: [part.rows([i]) for part in p for i in range(len(part))]
            for s, p in self.found.items()
        }
        return {s: tuple(each[i] for i in order.tolist()) for s, each in rows.items() if each}


def read_reretrieving(value: Any) -> ReRetrieving | None:
    """What the argument of `Model.sample` stands for: steps, or a `ReRetrieving`."""
    if value is None or isinstance(value, ReRetrieving):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ReRetrieving(tuple(value))
    raise ValueError(f"reretrieve={value!r}: give numbers of steps, such as [4, 8]")
