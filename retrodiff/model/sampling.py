"""Generates the images of a request: ask, condition, generate, collect."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import dataclasses
import logging
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from retrodiff.attention.recording import Measure
from retrodiff.components import first_not_finite, summary
from retrodiff.diffusion.generator import DiffusionGenerator
from retrodiff.interfaces import Callback, Context, Generator, Randomness, member
from retrodiff.model.asking import Asker
from retrodiff.model.attribution import Attributing, read_measure
from retrodiff.model.generated import Generation
from retrodiff.model.request import Request
from retrodiff.progress import progress_bar
from retrodiff.randomness import normal

log = logging.getLogger(__name__)


def sample(
    request: Request,
    asker: Asker,
    generator: Generator,
    *,
    progress: bool = False,
    attribution: bool | Measure = False,
) -> Generation:
    """The images of a request, with what conditioned each and the settings that make them again.

    Args:
        request: what is asked.
        asker: finds queries and neighbors, and makes contexts of them.
        generator: makes latents and images of contexts.
        progress: show a bar.
        attribution: record which neighbor has which part in which region; True, or a measure.

    Raises:
        ValueError: the request does not fit the components.
        FloatingPointError: no image is finite.
    """
    measure = read_measure(attribution)
    attributing = None if measure is None else Attributing(generator, measure)
    asked = asker.ask(request)
    neighbors = asked.neighbors
    log.info("sampling %d images with %s", len(request), summary(generator))
    rows: list[int] = []
    images: list[Tensor] = []
    latents: list[Tensor] = []
    with progress_bar(len(request) * request.steps, "sampling", progress) as bar:
        for part in asker.condition(asked, generator, request):
            shape = (len(part.rows), *generator.shape)
            noise = normal(Randomness.of(request.seed, part.rows, "noise"), shape)
            watched = nullcontext()
            if attributing is not None:
                watched = attributing.part(part.rows, part.context, neighbors)
            with watched:
                made = generate(
                    generator,
                    part.context,
                    part.null,
                    noise,
                    steps=request.steps,
                    randomness=Randomness.of(request.seed, part.rows, "sampler"),
                    callback=lambda _, denoised: bar.update(len(denoised)),
                )
            rows += part.rows
            latents.append(made.cpu())
            images.append(generator.decode(made).float().cpu())
    back = torch.tensor(rows).argsort()
    whole = torch.cat(images)[back]
    size = (int(whole.shape[-2]), int(whole.shape[-1]))
    out = Generation(
        whole,
        torch.cat(latents)[back],
        dataclasses.replace(asked.query, generator=None),
        neighbors,
        _settings(request, asker, generator),
        pictures=tuple(request.value) if request.kind == "images" else (),
        database=asker.database,
        attribution=None if attributing is None else attributing.result(size, neighbors.k),
    )
    _check_finite(out, generator)
    return out


def generate(
    generator: Generator,
    context: Context,
    null: Context,
    noise: Tensor,
    *,
    steps: int,
    randomness: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Latents (b, c, h, w), with everything brought to the generator's device."""
    if member(generator, Generator, "untrained"):
        warnings.warn(
            "sampling from fresh weights gives noise: load a checkpoint, or train first",
            stacklevel=4,
        )
    device = member(generator, Generator, "device")
    if device.type == "meta":
        raise ValueError(
            "the weights are on 'meta', a device that holds shapes and no numbers: load the model "
            "again to sample from it"
        )
    return generator.generate(
        context.to(device),
        null.to(device),
        noise.to(device),
        steps=steps,
        generator=randomness,
        callback=callback,
    )


def _settings(request: Request, asker: Asker, generator: Generator) -> dict[str, Any]:
    """What makes the images again, beside the model itself."""
    if isinstance(generator, DiffusionGenerator):
        names = ("guidance", "sampler", "schedule")
        how = {name: repr(getattr(generator, name)) for name in names}
    else:
        how = {"generator": summary(generator)}
    modes = request.modes
    if "unconditional" in modes:
        how["proposal"] = summary(asker.proposal)
    return {
        "mode": list(modes) if len(set(modes)) > 1 else modes[0],
        "k": request.k,
        "steps": request.steps,
        "seed": request.seed,
        **how,
        "batch_size": request.batch_size,
        "database": None if asker.database is None else vars(asker.database.fingerprint),
    }


def _check_finite(out: Generation, generator: Generator) -> None:
    """Warns of images that are not finite; refuses where all are."""
    wrong = out.not_finite()
    if not wrong:
        return
    weight = first_not_finite(generator)
    reason = (
        "guidance too high, a type too narrow (float16: use bfloat16 or float32), or NaN in "
        "embeddings"
        if weight is None
        else f"the weight {weight} is not finite: load or train the network again"
    )
    if len(wrong) == len(out):
        raise FloatingPointError(f"no image is finite: {reason}")
    named = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
    warnings.warn(
        f"{len(wrong)} of {len(out)} images are not finite (numbers {named}): {reason}",
        stacklevel=4,
    )
