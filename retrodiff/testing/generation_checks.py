"""Contract checks of conditioners, denoisers, samplers and what generates images."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from retrodiff.components import modules
from retrodiff.interfaces import (
    Autoencoder,
    Conditioner,
    Context,
    Denoiser,
    Generator,
    Guidance,
    Neighbors,
    Query,
    Randomness,
    Sampler,
    Schedule,
    Tokens,
    TrainableDenoiser,
    TrainableGenerator,
    member,
)
from retrodiff.testing.promises import close, has_members, require


def check_conditioner(conditioner: Conditioner, dim: int = 8, k: int = 3) -> None:
    """Streams of the promised widths, determinism, a null of the same shape, drop in place.

    Where it has weights, gradients must reach all of them, and a copy must work on ``meta``.

    Args:
        conditioner: to be checked.
        dim: width of the embeddings it is given.
        k: neighbors it is given.
    """
    has_members("conditioner", conditioner)
    generator = torch.Generator().manual_seed(0)
    query = Query(torch.randn(5, dim, generator=generator))
    embeddings = torch.randn(5, k, dim, generator=generator)
    neighbors = Neighbors(torch.arange(5 * k).view(5, k), torch.ones(5, k), embeddings)
    shape = member(conditioner, Conditioner, "latents_shape")
    if shape is not None:
        neighbors = replace(neighbors, latents=torch.randn(5, k, *shape, generator=generator))
    with torch.no_grad():
        context = conditioner.condition(query, neighbors)
        again = conditioner.condition(query, neighbors)
        part = conditioner.condition(query.rows(slice(0, 2)), neighbors.rows(slice(0, 2)))
        null = conditioner.null(context)
        dropped = conditioner.drop(context, torch.Generator().manual_seed(0))
    widths = {name: tokens.values.shape[-1] for name, tokens in context.streams.items()}
    require(
        widths == conditioner.widths(dim),
        f"condition gives streams {widths}, but widths({dim}) says {conditioner.widths(dim)}",
    )
    require(len(context) == 5, "the context has as many rows as the query")
    for name, tokens in context.streams.items():
        close(again.streams[name].values, tokens.values, "condition is deterministic", 0)
        close(
            part.streams[name].values,
            tokens.values[:2],
            "a row's tokens do not depend on the batch",
            1e-5,
        )
        for other, what in ((null, "null"), (dropped, "drop")):
            require(
                other.streams[name].values.shape == tokens.values.shape,
                f"{what} keeps the shape of every stream",
            )
    width = member(conditioner, Conditioner, "vector_width")(dim)
    given = None if context.vector is None else context.vector.shape[-1]
    require(given == width, f"condition gives a vector {given} wide, vector_width says {width}")
    _check_weights(conditioner, query, neighbors)
    for name, tokens in null.streams.items():
        if tokens.is_null:
            require(
                not bool(tokens.values.any()), f"stream {name} is marked null, so it is all zero"
            )


def check_denoiser(denoiser: Denoiser, k: int = 3) -> None:
    """Shapes, batch invariance, branches of guidance, prepare, and the identity at no noise.

    Args:
        denoiser: to be checked.
        k: tokens per stream.
    """
    has_members("denoiser", denoiser)
    generator = torch.Generator().manual_seed(0)
    shape = tuple(denoiser.shape)
    x = torch.randn(2, *shape, generator=generator)
    sigma = torch.tensor([0.5, 2.0])
    streams = {
        name: torch.randn(2, k, w, generator=generator) for name, w in denoiser.widths.items()
    }
    context = _context(streams)
    if isinstance(denoiser, nn.Module):
        denoiser.eval()
    with torch.no_grad():
        out = denoiser.denoise(x, sigma, context)
        require(out.shape == x.shape, f"denoise returns {tuple(x.shape)}, got {tuple(out.shape)}")
        require(bool(out.isfinite().all()), "denoise returns finite values")
        prepared = denoiser.prepare(context)
        close(denoiser.denoise(x, sigma, prepared), out, "prepare changes no result", 1e-5)
        again = denoiser.denoise(x, sigma, prepared)
        close(again, out, "a prepared context can be used again", 1e-5)
        one = _context({name: values[1:] for name, values in streams.items()})
        alone = denoiser.denoise(x[1:], sigma[1:], one)
        close(alone, out[1:], "a sample does not depend on its batch", 1e-4)
        if streams:
            both = Context.cat([context, context.zeros()])
            branches = denoiser.denoise(x, sigma, denoiser.prepare(both))
            null = denoiser.denoise(x, sigma, context.zeros())
            close(
                branches, torch.cat([out, null]), "branches of guidance equal separate calls", 1e-4
            )
        small = torch.full((2,), 1e-4)
        scalings: Any = getattr(denoiser, "scalings", None)
        predicts_x0 = scalings is not None and float(scalings(small).out.abs().max()) > 0.5
        if not predicts_x0:  # what the network says is all there is, at any noise level
            quiet = denoiser.denoise(x, small, context)
            close(quiet, x, "without noise there is nothing to remove", 5e-2)
    if hasattr(denoiser, "loss") and hasattr(denoiser, "draw_sigmas"):
        denoiser = cast("TrainableDenoiser", denoiser)
        sigmas = denoiser.draw_sigmas(64, torch.Generator().manual_seed(0))
        require(tuple(sigmas.shape) == (64,), "draw_sigmas returns (n,)")
        require(bool((sigmas > 0).all()), "training noise levels are positive")
        loss = denoiser.loss(x, sigma, torch.randn(x.shape, generator=generator), context)
        require(tuple(loss.shape) == (2,), "loss returns one value per sample")
        require(bool((loss >= 0).all()), "a squared error is not negative")
    check_schedule(denoiser.schedule)


def check_schedule(schedule: Schedule) -> None:
    """Decreasing levels for any step count, and noise of the right size at the start."""
    for steps in (1, 2, 7, 50):
        sigmas = schedule.sigmas(steps)
        require(tuple(sigmas.shape) == (steps + 1,), "sigmas(steps) is (steps + 1,)")
        require(bool((sigmas.diff() < 0).all()), "noise levels decrease strictly")
        require(float(sigmas[-1]) >= 0, "the last level is 0 or more")
        noise = torch.ones(1, 1, 2, 2)
        start = float(schedule.start(noise, sigmas)[0, 0, 0, 0])
        first = float(sigmas[0])
        require(
            abs(start - first) < 1e-3 * first or abs(start**2 - first**2 - 1) < 1e-3 * start**2,
            "start gives noise of sigmas[0], with or without unit data",
        )
        finished = schedule.finish(noise, sigmas)
        require(finished.shape == noise.shape, "finish keeps the shape")


def check_guidance(guidance: Guidance) -> None:
    """Equals the conditional branch where both branches agree; keeps shapes."""
    has_members("guidance", guidance)
    from retrodiff.diffusion.schedule import Karras

    class Shifted(Denoiser):
        @property
        def shape(self) -> tuple[int, int, int]:
            return (1, 2, 2)

        @property
        def widths(self) -> dict[str, int]:
            return {"neighbors": 1}

        @property
        def schedule(self) -> Schedule:
            return Karras()

        def denoise(self, x: Tensor, sigma: Tensor, context: Context) -> Tensor:
            shift = context.streams["neighbors"].values.mean((1, 2))
            x = x.repeat(len(shift) // len(x), 1, 1, 1)
            return x + shift.view(-1, 1, 1, 1)

    x, sigma = torch.zeros(2, 1, 2, 2), torch.ones(2)
    same = Context.of(torch.ones(2, 3, 1))
    out = guidance.guide(Shifted(), {"cond": same, "null": same})(x, sigma)
    close(out, x + 1, "equal branches guide to that branch")


def check_sampler(sampler: Sampler, steps: int = 200) -> None:
    """From noise to the right Gaussian, by the closed-form denoiser of one; reports every step.

    Args:
        sampler: to be checked.
        steps: enough for its order.
    """
    has_members("sampler", sampler)
    from retrodiff.diffusion.schedule import Karras

    mean, std = 0.7, 0.5

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        s2 = sigma.view(-1, 1, 1, 1) ** 2
        return (std**2 * x + s2 * mean) / (std**2 + s2)

    sigmas = Karras(0.01, 50.0).sigmas(steps)
    noise = torch.randn(4096, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    x = noise * float(sigmas[0])
    seen: list[int] = []
    kept = x.clone()
    seeded = torch.Generator().manual_seed(1)
    out = sampler.sample(denoise, x, sigmas, seeded, lambda step, denoised: seen.append(step))
    require(out.shape == x.shape, "sample keeps the shape")
    require(bool((x == kept).all()), "sample must not change its input")
    require(seen == list(range(steps)), "the callback is told every step in order")
    require(
        abs(float(out.mean()) - mean) < 0.03, f"the mean is {mean}, got {float(out.mean()):.3f}"
    )
    require(abs(float(out.std()) - std) < 0.03, f"the std is {std}, got {float(out.std()):.3f}")
    few = Karras(0.01, 50.0).sigmas(5)
    whole, alone = (
        sampler.sample(denoise, x[rows], few, Randomness.of(1, rows, "sampler"))
        for rows in ([0, 1, 2], [2])
    )
    close(
        alone,
        whole[2:],
        "an image does not depend on the others of its batch: draw with "
        "retrodiff.randomness.normal_like(x, generator)",
    )
    for bad in ([1.0, 2.0], [1.0, 1.0], [float("nan"), 0.0], [1.0, -1.0]):
        try:
            sampler.sample(denoise, x[:2], torch.tensor(bad))
        except ValueError:
            continue
        raise AssertionError(f"sigmas {bad} must be refused")


def check_generator(generator: Generator, k: int = 3, steps: int = 2) -> None:
    """Shapes, determinism, an image that depends on its own row only; a loss where it has one.

    Args:
        generator: to be checked.
        k: tokens per stream.
        steps: to generate with.
    """
    has_members("generator", generator)
    shape, seeded = tuple(generator.shape), torch.Generator().manual_seed(0)
    width = member(generator, Generator, "vector_width")
    context = Context(
        {
            name: Tokens(torch.randn(3, k, w, generator=seeded))
            for name, w in generator.widths.items()
        },
        None if width is None else torch.randn(3, width, generator=seeded),
    )
    noise = torch.randn(3, *shape, generator=seeded)

    def make(rows: list[int]) -> Tensor:
        part = Context(
            {name: Tokens(t.values[rows]) for name, t in context.streams.items()},
            None if context.vector is None else context.vector[rows],
        )
        randomness = Randomness.of(0, rows, "sampler")
        return generator.generate(
            part, part.zeros(), noise[rows], steps=steps, generator=randomness
        )

    with torch.no_grad():
        latents = make([0, 1, 2])
        require(tuple(latents.shape) == (3, *shape), f"generate returns (b, {shape})")
        require(bool(latents.isfinite().all()), "latents are finite")
        close(make([0, 1, 2]), latents, "generate is a function of its arguments", 0)
        close(make([2]), latents[2:], "an image does not depend on the others of its batch", 1e-3)
        images = generator.decode(latents)
        require(len(images) == 3 and images.ndim == 4, "decode returns (b, c, h, w)")
    if hasattr(generator, "loss"):
        loss = cast("TrainableGenerator", generator).loss(images, context)
        require(tuple(loss.shape) == (3,), "loss returns one value per image")


def check_autoencoder(autoencoder: Autoencoder, shape: tuple[int, int, int]) -> None:
    """Latents keep the batch, decode returns the image's shape, both deterministic; dtype, device.

    Args:
        autoencoder: to be checked.
        shape: (c, h, w) of an image.
    """
    require(
        isinstance(autoencoder.dtype, torch.dtype) and isinstance(autoencoder.device, torch.device),
        "an autoencoder has dtype and device; subclassing Autoencoder gives the defaults",
    )
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images.to(autoencoder.device)
    with torch.no_grad():
        latents = autoencoder.encode(images)
        decoded = autoencoder.decode(latents)
        require(len(latents) == 2 and latents.ndim == 4, "encode returns (b, c, h, w)")
        require(decoded.shape == images.shape, "decode returns the shape of the images")
        close(autoencoder.encode(images), latents, "encode is deterministic", 0)
        close(autoencoder.encode(images[1:]), latents[1:], "encode is per image", 1e-4)


def _check_weights(conditioner: Conditioner, query: Query, neighbors: Neighbors) -> None:
    """Gradients reach every weight through condition and null; all of them move."""
    found = modules(conditioner)
    weights = [p for module in found for p in module.parameters() if p.requires_grad]
    if not weights:
        return
    context = conditioner.condition(query, neighbors)
    null = conditioner.null(context)
    parts = [*context.streams.values(), *null.streams.values()]
    total = torch.stack([t.values.sum() for t in parts]).sum()
    for vector in (context.vector, null.vector):
        total = total if vector is None else total + vector.sum()
    gradients = torch.autograd.grad(total, weights, allow_unused=True)
    require(all(g is not None for g in gradients), "every weight takes part in condition or null")
    moved = copy.deepcopy(conditioner)
    for module in modules(moved):
        module.to("meta")
    there = moved.condition(Query(query.embedding.to("meta")), neighbors.to("meta"))
    require(
        all(t.values.device.type == "meta" for t in there.streams.values()),
        "a conditioner that was moved gives contexts on its new device",
    )


def _context(streams: dict[str, Tensor]) -> Context:
    return Context({name: Tokens(values) for name, values in streams.items()})
