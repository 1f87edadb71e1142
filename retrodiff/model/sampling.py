"""Generates the images of a request: ask, condition, generate, collect."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from retrodiff.attention.recording import Measure
from retrodiff.components import first_not_finite, inside, summary
from retrodiff.diffusion.generator import DiffusionGenerator, Start
from retrodiff.diffusion.guidance import Mixture
from retrodiff.interfaces import (
    Callback,
    Context,
    Database,
    Generator,
    Randomness,
    member,
)
from retrodiff.model.asking import Asker
from retrodiff.model.attribution import Attributing, read_measure
from retrodiff.model.estimates import Estimate, OnStep
from retrodiff.model.generated import Generation
from retrodiff.model.request import Request
from retrodiff.model.reretrieving import Renewing, ReRetrieving
from retrodiff.pictures.converting import to_float
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
    others: Mapping[str, Database] | None = None,
    reretrieve: ReRetrieving | None = None,
    on_step: OnStep | None = None,
) -> Generation:
    """The images of a request, with what conditioned each and the settings that make them again.

    Args:
        request: what is asked.
        asker: finds queries and neighbors, and makes contexts of them.
        generator: makes latents and images of contexts.
        progress: show a bar.
        attribution: record which neighbor has which part in which region; True, or a measure.
        others: further databases for the guidance, by name.
        reretrieve: at which steps neighbors are looked for again; None: at none.
        on_step: told the estimate after each step; None: nobody is.

    Raises:
        ValueError: the request does not fit the components.
        FloatingPointError: no image is finite.
    """
    measure = read_measure(attribution)
    attributing = None if measure is None else Attributing(generator, measure)
    if attributing is not None:
        _check_attributable(request, generator, reretrieve)
    started = _started(request, generator)
    asked = asker.ask(request, others)
    neighbors = asked.neighbors
    renewing = None
    if reretrieve is not None:
        renewing = Renewing(reretrieve, asker, generator, asked, request.steps)
    log.info("sampling %d images with %s", len(request), summary(generator))
    rows: list[int] = []
    images: list[Tensor] = []
    latents: list[Tensor] = []
    steps = request.steps if started is None else started.left(request.steps)
    with progress_bar(len(request) * steps, "sampling", progress) as bar:
        for part in asker.condition(asked, generator, request):
            shape = (len(part.rows), *generator.shape)
            noise = normal(Randomness.of(request.seed, part.rows, "noise"), shape)
            watched = nullcontext()
            if attributing is not None:
                watched = attributing.part(part.rows, part.context, neighbors)

            def stepped(step: int, denoised: Tensor, rows: list[int] = part.rows) -> None:
                bar.update(len(denoised))
                if on_step is not None:
                    held = denoised.detach().to(torch.float32, copy=True)
                    on_step(Estimate(rows, step + 1, steps, held, generator))

            with watched:
                made = generate(
                    generator if renewing is None else renewing.part(part.query, part.neighbors),
                    part.context,
                    part.null,
                    noise,
                    steps=request.steps,
                    randomness=Randomness.of(request.seed, part.rows, "sampler"),
                    callback=stepped,
                    start=None if started is None else started.rows(part.rows),
                    others=part.others,
                )
            rows += part.rows
            latents.append(made.cpu())
            images.append(generator.decode(made).float().cpu())
    back = torch.tensor(rows).argsort()
    whole = torch.cat(images)[back]
    size = (int(whole.shape[-2]), int(whole.shape[-1]))
    settings = _settings(request, asker, generator)
    if reretrieve is not None:
        settings["reretrieve"] = list(reretrieve.steps)
    if others:
        settings["databases"] = {name: vars(one.fingerprint) for name, one in others.items()}
    out = Generation(
        whole,
        torch.cat(latents)[back],
        dataclasses.replace(asked.query, generator=None),
        neighbors,
        settings,
        pictures=tuple(request.value) if request.kind == "images" else (),
        database=asker.database,
        attribution=None if attributing is None else attributing.result(size, neighbors.k),
        renewed={} if renewing is None else renewing.result(back),
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
    start: Start | None = None,
    others: Mapping[str, Context] | None = None,
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
    further: dict[str, Any] = {} if start is None else {"start": start}
    if others:
        further["others"] = {name: context.to(device) for name, context in others.items()}
    return generator.generate(
        context.to(device),
        null.to(device),
        noise.to(device),
        steps=steps,
        generator=randomness,
        callback=callback,
        **further,
    )


def _check_attributable(
    request: Request, generator: Generator, reretrieve: ReRetrieving | None
) -> None:
    """Refuses attribution where the same neighbors do not condition the whole run."""
    reason = None
    if reretrieve is not None and reretrieve.steps:
        reason = "reretrieve changes neighbors while sampling"
    elif request.start and request.strength == 0:
        reason = "strength=0 paints nothing"
    for part in inside(getattr(generator, "guidance", None)):
        if isinstance(part, Mixture) and "cond" not in part.weights:
            reason = f"{part!r} does not weigh the whole condition, 'cond'"
    if reason is not None:
        raise ValueError(f"attribution has no meaning here, since {reason}: leave it out")


def _started(request: Request, generator: Generator) -> Start | None:
    """The latents of the images that a request edits.

    Raises:
        ValueError: the generator begins with noise only, or makes images of another size.
    """
    if not request.start:
        return None
    if not isinstance(generator, DiffusionGenerator):
        raise ValueError(
            f"start has no effect: this model generates with {type(generator).__name__}, which "
            "begins with noise only; leave it out"
        )
    batch = max(1, min(request.batch_size, len(request)))
    parts = to_float(torch.stack(request.start)).split(batch)
    try:
        latents = torch.cat([generator.encode(part) for part in parts])
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"start has images of {tuple(request.start[0].shape)}, of which "
            f"{type(generator.autoencoder).__name__} makes no latents of {generator.shape}, as the "
            f"model generates: give images of the size that it makes ({error})"
        ) from error
    return Start(latents, request.strength)


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
        **({"strength": request.strength} if request.start else {}),
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
