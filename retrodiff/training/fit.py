"""Trains a model on images and their neighbors (Blattmann et al. 2022, section 3.2)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrodiff.checkpoints.native import describe
from retrodiff.disk.files import plain_json
from retrodiff.encoders.fingerprint import weights_hash
from retrodiff.model import Model
from retrodiff.numbers import whole
from retrodiff.training.checkpoint import disagreement, read_state
from retrodiff.training.data import TrainingSet
from retrodiff.training.ema import NamedEMA
from retrodiff.training.objective import Objective
from retrodiff.training.optimize import optimize
from retrodiff.training.parts import TRAINED, copied, trainable_modules
from retrodiff.training.rates import LearningRate
from retrodiff.training.stages.cached_latents import on_latents


@dataclass(frozen=True)
class FitResult:
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
    lr: LearningRate | float,
    ema: float = 0.9999,
    weight_decay: float = 0.0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    overwrite: bool = False,
    snapshots: Sequence[int] = (),
    progress: bool = True,
) -> FitResult:
    """Trains denoiser and conditioner; the model that is given stays as it was.

    What is trained is copied first: every parameter that requires a gradient, in the denoiser and
    in a conditioner with weights, inside of wrappers, too. The result has the averaged weights.

    Ctrl-C and SIGTERM end the step that is running and keep the state in the checkpoint. Continued
    from there, a training on the same machine ends with the same bits as one that was never
    interrupted. It is refused where data, database, network, conditioner, first stage, batch size,
    learning rate or another setting is not what it was. Only ``steps`` may be another number, to
    train longer; a cosine's length may then change with it.

    Args:
        model: what is trained.
        data: images and neighbors.
        steps: steps in all.
        batch_size: images per step.
        lr: learning rate: a number, or by step such as ``constant(1e-4, warmup=100)``, the paper's.
        ema: decay of the average; the paper's 0.9999 is for hundreds of thousands of steps.
        weight_decay: of AdamW.
        seed: of everything random. The same seed gives the same weights.
        checkpoint: file that keeps the state, to resume from after an interruption.
        checkpoint_every: steps between checkpoints.
        resume: continue from the checkpoint; where there is none, start.
        overwrite: replace the checkpoint of another training.
        snapshots: steps at which the averaged model is kept as well.
        progress: show a bar.

    Raises:
        ValueError: a number is out of range, model and data do not fit together, or the checkpoint
            is damaged or of another training.
        FileExistsError: the checkpoint is there, and neither ``resume`` nor ``overwrite`` is given.
        FloatingPointError: loss or gradient is not finite; the last checkpoint stays.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says how to continue.
    """
    steps, batch_size = whole("steps", steps), whole("batch_size", batch_size)
    seed = whole("seed", seed, 0)
    wanted = {whole("snapshots", step) for step in snapshots}
    if wanted and max(wanted) > steps:
        raise ValueError(f"snapshots={max(wanted)} comes after the last step, steps={steps}")
    _check(model, data)
    objective = Objective(copied(on_latents(model, data.images)))
    average = NamedEMA(objective, ema)
    earlier = Snapshots(average, wanted)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = data.rows_at(step, batch_size, seed)
        images, query, neighbors = data.batch(rows, model.k)
        return objective(images, query, neighbors, generator).mean()

    losses = optimize(
        objective,
        loss,
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        ema=average,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        overwrite=overwrite,
        run={} if checkpoint is None else _run(model, data, batch_size, wanted),
        kept={"snapshots": earlier} if wanted else None,
        after=earlier.take,
        progress=progress,
    )
    trained = objective.model
    if trained.autoencoder is not model.autoencoder:  # it was trained on latents
        trained = trained.replace(autoencoder=model.autoencoder)
    return FitResult(
        _with(trained, average.state()),
        losses,
        {step: _with(trained, state) for step, state in sorted(earlier.taken.items())},
    )


def from_checkpoint(model: Model, checkpoint: str | Path) -> Model:
    """A model with the averaged weights of a training that is still going on, or was interrupted.

    Args:
        model: as it was given to `fit`, or one that is built in the same way; it stays as it is.
        checkpoint: the file that `fit` keeps.

    Raises:
        ValueError: the file is damaged, or is of another network.
    """
    path = Path(checkpoint).expanduser()
    state = read_state(path)
    now = json.loads(json.dumps(plain_json(_parts(model))))
    if (differs := disagreement(state.run.get("model", {}), now)) is not None:
        raise ValueError(
            f"{path} belongs to a training with {differs}: give the model of that training"
        )
    trained = _with(model, state.part("ema"), path)
    buffers = state.part("buffer")
    for name, buffer in Objective(trained).named_buffers():
        if name in buffers and buffers[name].shape == buffer.shape:
            buffer.copy_(buffers[name])
    return trained


class Snapshots:
    """Averaged weights of earlier steps, kept through interruptions.

    Args:
        average: what is kept of.
        steps: when.
    """

    def __init__(self, average: NamedEMA, steps: set[int]) -> None:
        self.average, self.steps = average, steps
        self.taken: dict[int, dict[str, Tensor]] = {}

    def take(self, done: int) -> None:
        """Keeps the average, if this is one of the steps."""
        if done in self.steps:
            state = self.average.state()
            self.taken[done] = {name: tensor.clone() for name, tensor in state.items()}

    def state(self) -> dict[str, Tensor]:
        """All that was kept, by step and name."""
        return {
            f"{step}.{name}": tensor
            for step, state in self.taken.items()
            for name, tensor in state.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` returned."""
        for name, tensor in state.items():
            step, _, rest = name.partition(".")
            self.taken.setdefault(int(step), {})[rest] = tensor


def _with(model: Model, average: dict[str, Tensor], path: Path | None = None) -> Model:
    """A copy of a model with averaged weights, in evaluation mode."""
    twin = copied(model)
    module = Objective(twin)
    mine = {n: tuple(p.shape) for n, p in module.named_parameters() if p.requires_grad}
    kept = {
        name.removeprefix("average."): tuple(tensor.shape)
        for name, tensor in average.items()
        if name.startswith("average.")
    }
    if mine != kept:
        odd = sorted(n for n in {**mine, **kept} if mine.get(n) != kept.get(n))
        raise ValueError(
            f"{path or 'the average'} was written for another network: {odd[0]} has shape "
            f"{kept.get(odd[0], 'of nothing')} there, {mine.get(odd[0], 'of nothing')} in this "
            "one: build the same network"
        )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in kept:
                parameter.copy_(average[f"average.{name}"])
    module.eval()
    if hasattr(twin.denoiser, "untrained"):
        twin.denoiser.untrained = False  # type: ignore[attr-defined]
    return twin


def _check(model: Model, data: TrainingSet) -> None:
    """Refuses data that were made for another model."""
    if not model.conditioner.uses_neighbors:
        return
    if data.k < model.k:
        raise ValueError(
            f"the model's k={model.k}, but the training set keeps {data.k} neighbors of each "
            f"image: make it with k={model.k}"
        )
    if model.database is not None and model.database is not data.database:
        mine, theirs = model.database.fingerprint, data.database.fingerprint
        differs = mine.disagreement(theirs)
        if differs is None and mine.scale != theirs.scale:
            differs = f"scale={mine.scale!r} against scale={theirs.scale!r}"
        if differs is not None:
            raise ValueError(
                f"the model's database and the training set's differ, {differs}: make the training "
                "set with a database of the same encoder"
            )


def _run(model: Model, data: TrainingSet, batch_size: int, snapshots: set[int]) -> dict[str, Any]:
    """What must be the same when the training of a model is continued."""
    return {
        "batch_size": batch_size,
        "k": model.k,
        "snapshots": sorted(snapshots),
        "data": data.describe(),
        "model": _parts(model),
    }


def _parts(model: Model) -> dict[str, Any]:
    """The parts of a model that its training depends on, without the weights that are trained."""
    first_stage: dict[str, Tensor] = {}
    frozen = {
        f"{name}.{n}": p
        for name, module in trainable_modules(model).items()
        for n, p in module.named_parameters()
        if not p.requires_grad
    }
    parts: dict[str, Any] = {slot: _described(getattr(model, slot), {}) for slot in TRAINED}
    parts["autoencoder"] = _described(model.autoencoder, first_stage)
    return parts | {"first_stage": weights_hash(first_stage), "frozen": weights_hash(frozen)}


def _described(component: Any, weights: dict[str, Tensor]) -> Any:
    """A component as JSON-able values; one of the user's own by its repr."""
    found = describe(component, weights, "part")
    custom = isinstance(found, dict) and "custom" in found
    if custom and (is_dataclass(component) or isinstance(component, nn.Module)):
        found = {**found, "repr": re.sub(r" at 0x[0-9a-f]+", "", repr(component))[:10_000]}
    return found
