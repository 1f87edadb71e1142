"""The loss on images that are not trained on, measured the same way each time.

A training loss jumps with the noise levels that a step happens to draw. Here images, noise and
noise levels are fixed, so that two numbers differ by what was learned between them alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrodiff.interfaces import Generator, member
from retrodiff.model import Model
from retrodiff.numbers import whole
from retrodiff.randomness import normal
from retrodiff.training.data import TrainingSet
from retrodiff.training.seeds import derived
from retrodiff.training.stages.cached_latents import on_latents
from retrodiff.training.watching import Moment, is_due, undisturbed

DRAWN = 1 << 16
"""Noise levels that are drawn to find the quantiles of the training distribution."""


@dataclass(frozen=True)
class Held:
    """One measurement of the held-out loss.

    Args:
        done: steps done.
        loss: of held-out images, averaged over images and noise levels.
        by_level: at each noise level, least noise first; empty for models without noise levels.
        trained: of as many training images, measured in the same way; None: not measured.

    Examples:
        >>> from retrodiff.training import Held
        >>> Held(done=400, loss=0.42, by_level=(0.61, 0.23), trained=0.40).loss
        0.42
    """

    done: int
    loss: float
    by_level: tuple[float, ...]
    trained: float | None = None


class HeldOut:
    """Measures the loss of held-out images with the averaged weights, every some steps.

    Noise levels are the evenly spaced quantiles of those that training draws, so that the mean over
    them estimates the training loss of unseen images. Conditions are never dropped here, and
    weights are averaged: the number lies below the training loss at first. What to compare it with
    is the loss of training images that are measured alike (``trained``): a growing distance between
    the two means that images are learned by heart.

    Args:
        data: held-out images with their neighbors in D.
        every: steps between measurements; there is one after the last step, too.
        trained: training images, of which as many are measured beside; None: none are.
        levels: noise levels for each image.
        limit: most images that are measured, evenly spaced.
        batch_size: images per pass.
        seed: of the noise; the same in every training, so that two trainings compare.

    Examples:
        >>> import torch
        >>> from retrodiff import presets
        >>> from retrodiff.training import HeldOut, TrainingSet
        >>> unseen = TrainingSet.alone(torch.rand(8, 1, 8, 8) * 2 - 1)
        >>> held_out = HeldOut(unseen, every=500)  # give it to ``fit(..., watch=[held_out])``
        >>> len(held_out.measure(presets.ldm()).by_level)
        4
    """

    def __init__(
        self,
        data: TrainingSet,
        every: int,
        *,
        trained: TrainingSet | None = None,
        levels: int = 4,
        limit: int = 128,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        self.data, self.trained = data, trained
        self.every = whole("every", every)
        self.levels, self.limit = whole("levels", levels), whole("limit", limit)
        self.batch_size, self.seed = whole("batch_size", batch_size), whole("seed", seed, 0)
        self.sigmas: tuple[float, ...] = ()
        """Noise levels, ascending; known from the first measurement on."""
        self.history: list[Held] = []
        """All measurements, in their order."""

    @property
    def best(self) -> Held | None:
        """The measurement of the least held-out loss; None: there is none yet."""
        return min(self.history, key=lambda held: held.loss, default=None)

    def measure(self, model: Model, done: int = 0) -> Held:
        """Measures a model now; the result is not kept.

        Args:
            model: in evaluation mode.
            done: steps that it was trained for.
        """
        device = member(model.generating(), Generator, "device")
        with undisturbed(device):
            self.sigmas = noise_levels(model, self.levels)
            loss, by_level = self._losses(model, self.data)
            beside = None if self.trained is None else self._losses(model, self.trained)[0]
        return Held(done, loss, by_level, beside)

    def begin(self, done: int) -> None:
        """Does nothing: the first measurement comes after some steps."""

    def look(self, moment: Moment) -> None:
        """Measures, if it is time."""
        if is_due(moment.done, moment.steps, self.every):
            self.history.append(self.measure(moment.averaged(), moment.done))

    def summary(self) -> str:
        """One line for the end of a training: which step was the best, and what follows from it."""
        best = self.best
        if best is None:
            return "no held-out loss was measured"
        last = self.history[-1]
        line = f"least held-out loss {best.loss:.4f}, after step {best.done:,}"
        if best.done == last.done:
            return f"{line}, the last one: more steps may lower it further"
        return (
            f"{line}; {last.loss:.4f} at the end, after step {last.done:,}: fewer steps, or more "
            "images"
        )

    def state(self) -> dict[str, Tensor]:
        """History and noise levels."""
        rows = [
            [h.done, h.loss, float("nan") if h.trained is None else h.trained, *h.by_level]
            for h in self.history
        ]
        if not rows:
            return {}
        return {
            "history": torch.tensor(rows, dtype=torch.float64),
            "sigmas": torch.tensor(self.sigmas, dtype=torch.float64),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` returned."""
        self.sigmas = tuple(state["sigmas"].tolist()) if "sigmas" in state else ()
        rows: list[list[float]] = state["history"].tolist() if "history" in state else []
        self.history = [
            Held(int(done), loss, tuple(by_level), None if trained != trained else trained)
            for done, loss, trained, *by_level in rows
        ]

    def _losses(self, model: Model, data: TrainingSet) -> tuple[float, tuple[float, ...]]:
        """Mean loss of a set, and that of each noise level."""
        model = on_latents(model, data.images)
        count = min(self.limit, len(self.data), len(data))
        chosen = torch.linspace(0, len(data) - 1, count).round().long()
        totals = torch.zeros(max(1, len(self.sigmas)), dtype=torch.float64)
        for start in range(0, len(chosen), self.batch_size):
            rows = chosen[start : start + self.batch_size]
            images, query, neighbors = data.batch(rows, model.k)
            if not self.sigmas:
                generator = derived(self.seed, "held-out", start)
                totals += model.loss(images, query, neighbors, generator, drop=False).sum().cpu()
                continue
            noise = self._noise(model, range(start, start + len(rows)))
            for i, sigma in enumerate(self.sigmas):
                chosen_noise: dict[str, Any] = {
                    "sigma": torch.full((len(rows),), sigma),
                    "noise": noise[:, i],
                }
                loss = model.loss(images, query, neighbors, drop=False, **chosen_noise)
                totals[i] += loss.double().sum().cpu()
        by_level = totals / len(chosen)
        return float(by_level.mean()), tuple(by_level.tolist()) if self.sigmas else ()

    def _noise(self, model: Model, images: range) -> Tensor:
        """Noise (b, levels, c, h, w) of some images, whatever batch they are in."""
        shape = (len(self.sigmas), *model.generating().shape)
        return torch.stack([normal(derived(self.seed, "held-out", i), shape) for i in images])


def noise_levels(model: Model, levels: int) -> tuple[float, ...]:
    """Evenly spaced quantiles of the noise levels that training draws, ascending.

    Args:
        model: of any kind; one without noise levels has none.
        levels: number of noise levels.
    """
    draw = getattr(model.denoiser, "draw_sigmas", None)
    if model.generator is not None or draw is None:
        return ()
    drawn: Tensor = draw(DRAWN, derived(0, "noise levels", 0))
    at = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    return tuple(drawn.double().quantile(at, interpolation="nearest").tolist())
