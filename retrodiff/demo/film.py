"""A short film: samples form out of noise, then each neighbor lights up with what it painted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retrodiff.demo.poster import GRAY, INK, picture
from retrodiff.disk.files import atomic_write
from retrodiff.interfaces import Sampler
from retrodiff.model import Model
from retrodiff.model.attribution import Attribution

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE, SMALL, GAP, LABEL = 112, 44, 6, 18
FORMING, SHOWN, LIT = 120, 900, 700
"""Milliseconds that a step, the finished sample and a neighbor are seen."""


class Watched(Sampler):
    """Another sampler that keeps the clean estimate of every step.

    Args:
        sampler: does the work.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.seen: list[Tensor] = []

    def sample(
        self,
        denoise: Any,
        x: Tensor,
        sigmas: Tensor,
        generator: torch.Generator | None = None,
        callback: Any = None,
    ) -> Tensor:
        """What the other sampler makes; see `Sampler.sample`."""

        def keep(number: int, denoised: Tensor) -> None:
            self.seen.append(denoised.detach().clone())
            if callback is not None:
                callback(number, denoised)

        return self.sampler.sample(denoise, x, sigmas, generator, keep)


@dataclass(frozen=True)
class Scene:
    """One prompt: how its sample came about.

    Args:
        prompt: what was asked.
        database: where neighbors came from.
        neighbors: images (c, h, w).
        frames: the sample after each step, (c, h, w) each, the finished one last.
        shares: (k, h, w) of the neighbors in it.
    """

    prompt: str
    database: str
    neighbors: Sequence[Tensor] = field(repr=False)
    frames: Sequence[Tensor] = field(repr=False)
    shares: Tensor = field(repr=False)


def filmed(
    model: Model, database: str, prompts: Sequence[str], seed: int, steps: int | None = None
) -> list[Scene]:
    """Samples every prompt once, with what is needed to show how.

    Args:
        model: a diffusion model whose network attends to neighbors.
        database: the name of its database.
        prompts: one scene each.
        seed: of everything random.
        steps: of the sampler; None: the model's.
    """
    diffusion = model.diffusion()
    watched = Watched(diffusion.sampler)
    out = model.sample(
        prompts=list(prompts), sampler=watched, steps=steps, seed=seed, attribution=True
    )
    attribution = out.attribution
    assert isinstance(attribution, Attribution)
    with torch.no_grad():
        estimates = [diffusion.autoencoder.decode(latents) for latents in watched.seen]
    shared: Any = model.database
    return [
        Scene(
            prompt,
            database,
            [shared.image(row) for row in out.neighbors.indices[i].tolist() if row >= 0],
            [*(images[i] for images in estimates), out.images[i]],
            attribution.weights[i],
        )
        for i, prompt in enumerate(prompts)
    ]


def write_film(file: Path, acts: Sequence[Sequence[Scene]]) -> None:
    """Writes acts one after the other as a GIF that repeats.

    Args:
        file: to be written.
        acts: scenes that are seen side by side; as many of the same number of steps in each.
    """
    from PIL.Image import Dither

    frames: list[Image] = []
    times: list[int] = []
    for scenes in acts:
        for step in range(len(scenes[0].frames)):
            frames.append(_frame(scenes, step, None))
            times.append(FORMING)
        times[-1] = SHOWN
        for lit in range(max(len(scene.neighbors) for scene in scenes)):
            frames.append(_frame(scenes, len(scenes[0].frames) - 1, lit))
            times.append(LIT)
    # One palette for all frames: what does not change is then not stored again.
    palette = _palette(frames)
    reduced = [frame.quantize(palette=palette, dither=Dither.NONE) for frame in frames]
    with atomic_write(file) as partial:
        reduced[0].save(
            partial,
            "GIF",
            save_all=True,
            append_images=reduced[1:],
            duration=times,
            loop=0,
            optimize=True,
        )


def _palette(frames: Sequence[Image]) -> Image:
    from PIL import Image

    few = frames[:: max(1, len(frames) // 12)]
    wide = Image.new("RGB", (few[0].width, few[0].height * len(few)))
    for i, frame in enumerate(few):
        wide.paste(frame, (0, i * few[0].height))
    return wide.quantize(255, dither=Image.Dither.NONE)


def _frame(scenes: Sequence[Scene], step: int, lit: int | None) -> Image:
    """Scenes beside each other after a step; or one neighbor lit, with its part of the sample."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=12)
    width = max(SIDE, 4 * (SMALL + 2)) + 2 * GAP
    frame = Image.new("RGB", (len(scenes) * width, LABEL * 2 + SMALL + SIDE + 4 * GAP), "white")
    draw = ImageDraw.Draw(frame)
    for i, scene in enumerate(scenes):
        x = i * width + GAP
        draw.text((x, GAP), f"“{scene.prompt}”", INK, font)
        draw.text((x, GAP + LABEL - 3), f"database: {scene.database}", GRAY, font)
        y = GAP + 2 * LABEL
        for j, image in enumerate(scene.neighbors):
            small, at = picture(image, SMALL - 4), (x + j * (SMALL + 2), y)
            if lit is not None and j != lit:
                small = Image.blend(small, Image.new("RGB", small.size, "white"), 0.7)
            if j == lit:
                draw.rectangle((at[0], y, at[0] + SMALL - 1, y + SMALL - 1), "#ff9d00")
            frame.paste(small, (at[0] + 2, y + 2))
        sample = scene.frames[step].float()
        if lit is not None and lit < len(scene.neighbors):
            share = scene.shares[lit]
            part = (share / share.amax().clamp(min=1e-6)).clamp(0, 1) ** 1.5
            part = F.interpolate(part[None, None], sample.shape[-2:], mode="bilinear")[0]
            sample = 1 - (1 - sample) * (0.15 + 0.85 * part)
        frame.paste(picture(sample, SIDE), (x + (width - 2 * GAP - SIDE) // 2, y + SMALL + GAP))
    return frame
