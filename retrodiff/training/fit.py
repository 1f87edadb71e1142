"""Trains a model's denoiser on images and their neighbors (Blattmann et al. 2022, section 3.2)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from retrodiff.model import Model
from retrodiff.training.data import TrainingSet
from retrodiff.training.ema import NamedEMA
from retrodiff.training.objective import Objective
from retrodiff.training.optimize import Rate, optimize


@dataclass(frozen=True)
class Fitted:
    """A trained model.

    Args:
        model: with the averaged weights.
        losses: of every step (steps,).
        snapshots: the model with the averaged weights of earlier steps, by step.
    """

    model: Model
    losses: Tensor
    snapshots: dict[int, Model]


def fit(
    model: Model,
    data: TrainingSet,
    *,
    steps: int,
    batch_size: int,
    rate: Rate,
    ema: float = 0.9999,
    weight_decay: float = 0.0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    every: int = 500,
    resume: bool = False,
    snapshots: Sequence[int] = (),
    progress: bool = True,
) -> Fitted:
    """Trains denoiser (and a conditioner with weights) in place; the returned model is averaged.

    Args:
        model: what is trained; the model passed in holds the raw weights afterwards.
        data: images and neighbors.
        steps: how many.
        batch_size: images per step.
        rate: learning rate by step, such as ``constant(1e-4, warmup=100)``, the paper's.
        ema: decay of the average; the paper's 0.9999 is for hundreds of thousands of steps.
        weight_decay: of AdamW.
        seed: of everything random. The same seed gives the same weights.
        checkpoint: file that keeps the state, to resume from after an interruption.
        every: steps between checkpoints.
        resume: continue from the checkpoint; the result is the same as without interruption.
        snapshots: steps at which the averaged model is kept as well.
        progress: show a bar.
    """
    objective = Objective(model)
    average = NamedEMA(objective, ema)
    kept: dict[int, Model] = {}

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = data.rows_at(step, batch_size, seed)
        images, query, neighbors = data.batch(rows, model.k)
        return objective(images, query, neighbors, generator).mean()

    def after(done: int) -> None:
        if done in snapshots:
            kept[done] = averaged()

    def averaged() -> Model:
        twin = Objective(model.replace(denoiser=copy.deepcopy(model.denoiser)))
        twin.denoiser.untrained = False  # type: ignore[assignment]
        return average.copy_to(twin.eval()).model

    losses = optimize(
        objective,
        loss,
        steps=steps,
        rate=rate,
        weight_decay=weight_decay,
        seed=seed,
        ema=average,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        every=every,
        resume=resume,
        after=after,
        progress=progress,
    )
    return Fitted(averaged(), losses, kept)


def parameters(model: Model) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in Objective(model).parameters() if p.requires_grad)
