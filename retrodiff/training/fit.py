"""Trains a model on images and their neighbors (Blattmann et al. 2022, section 3.2)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from retrodiff.checkpoints.native import describe
from retrodiff.disk.files import plain_json
from retrodiff.encoders.fingerprint import weights_hash
from retrodiff.model import Model
from retrodiff.numbers import is_real, whole
from retrodiff.training.batches import Batches
from retrodiff.training.checkpoint import disagreement, read_state
from retrodiff.training.data import TrainingSet
from retrodiff.training.ema import NamedEMA
from retrodiff.training.held_out import HeldOut
from retrodiff.training.objective import Objective
from retrodiff.training.optimize import Part, Precision, optimize
from retrodiff.training.optimizers import OptimizerName, Optimizers
from retrodiff.training.parts import TRAINED, copied, trainable_modules
from retrodiff.training.processes import Processes
from retrodiff.training.rates import LearningRate
from retrodiff.training.resuming import Kept
from retrodiff.training.snapshots import Snapshots
from retrodiff.training.stages.cached_latents import on_latents
from retrodiff.training.watching import Moment, Watcher

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class FitResult:
    """A trained model.

    Args:
        model: with the averaged weights; of several averages, with the one of least held-out loss
            where `HeldOut` was among the watchers, else with the first.
        losses: of every step (steps,).
        snapshots: the model with the averaged weights of earlier steps, by step.
        averages: the model with each of the averages, by decay.

    Examples:
        >>> import torch
        >>> from retrodiff import presets
        >>> from retrodiff.training import TrainingSet, fit
        >>> data = TrainingSet.alone(torch.rand(16, 1, 8, 8) * 2 - 1)
        >>> result = fit(presets.ldm(), data, steps=2, batch_size=8, lr=1e-3, progress=False)
        >>> result.losses.shape, result.model.sample(n=1, steps=2).images.shape
        (torch.Size([2]), torch.Size([1, 1, 8, 8]))
    """

    model: Model
    losses: Tensor
    snapshots: dict[int, Model]
    averages: dict[float, Model]


def fit(
    model: Model,
    data: TrainingSet,
    *,
    steps: int,
    batch_size: int,
    lr: LearningRate | float,
    optimizer: OptimizerName | Optimizers = "adamw",
    weight_decay: float = 0.0,
    clip: float = 1.0,
    precision: Precision = "float32",
    accumulate: int = 1,
    compile: bool = False,
    workers: int = 0,
    ema: float | Sequence[float] = 0.9999,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    overwrite: bool = False,
    snapshots: Sequence[int] = (),
    watch: Sequence[Watcher] = (),
    accelerator: Accelerator | None = None,
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
        batch_size: images per step, of all processes and backward passes together.
        lr: learning rate: a number, or by step such as ``constant(1e-4, warmup=100)``, the paper's.
        optimizer: ``"adamw"``, the paper's; ``"muon"``: Muon for matrices and kernels, AdamW for
            the rest; or a function, see `optimize`.
        weight_decay: of AdamW and Muon.
        clip: largest gradient norm.
        precision: of products and convolutions: ``"float32"``, ``"bfloat16"`` (autocast; weights
            stay float32), or ``"auto"``: bfloat16 where the processor multiplies it faster.
        accumulate: backward passes of each process per step, each with a part of the batch: less
            memory, the same result up to rounding.
        compile: run the network through ``torch.compile`` while it is trained.
        workers: processes that read images ahead; 0: they are read when they are needed.
        ema: decay of the average, or of several averages; the paper's 0.9999 is for hundreds of
            thousands of steps. Of several, `HeldOut` chooses; see `FitResult`.
        seed: of everything random. The same seed gives the same weights.
        checkpoint: file that keeps the state, to resume from after an interruption.
        checkpoint_every: steps between checkpoints.
        resume: continue from the checkpoint; where there is none, start.
        overwrite: replace the checkpoint of another training.
        snapshots: steps at which the (first) averaged model is kept as well.
        watch: told of every step, such as `HeldOut` and `Grids`; they change nothing.
        accelerator: of Hugging Face accelerate, where several processes train together; None: one
            is made where ``accelerate launch`` or ``torchrun`` started several. The model must be
            on this process's device.
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
    processes = Processes(accelerator)
    _check_parts(batch_size, processes.count, whole("accumulate", accumulate))
    objective = Objective(copied(on_latents(model, data.images)))
    device = _device(objective, processes)
    averages = _averages(objective, ema)
    earlier = Snapshots(averages[0], wanted)
    started = [time.monotonic()]

    def averaged(state: dict[str, Tensor]) -> Model:
        """The model with averaged weights, and its first stage, even if latents are trained on."""
        return _with(objective.model.replace(autoencoder=model.autoencoder), state)

    batches = Batches(data, model.k, steps, batch_size, seed, workers, processes)

    def loss(module: nn.Module, part: Part) -> Tensor:
        images, query, neighbors = batches.part(part)
        return module(images, query, neighbors, part.randomness(batch_size, device)).mean()

    def after(done: int, value: float, rate: float) -> None:
        earlier.take(done)
        if not processes.main:
            return
        for watcher in watch:
            watcher.look(
                Moment(
                    done=done,
                    steps=steps,
                    loss=value,
                    lr=rate,
                    images=done * batch_size,
                    seconds=time.monotonic() - started[0],
                    averaged=lambda: averaged(averages[0].state()),
                )
            )

    def begin(done: int) -> None:
        started[0] = time.monotonic()
        batches.begin(done)
        for watcher in watch if processes.main else ():
            watcher.begin(done)

    kept: dict[str, Kept] = {"snapshots": earlier} if wanted else {}
    for i, watcher in enumerate(watch):
        alike = sum(type(other) is type(watcher) for other in watch[:i])
        kept[f"watch_{type(watcher).__name__}{alike or ''}"] = watcher
    if compile:
        objective.model.compile()
    with closing(batches), _naming_images(batches, data, batch_size, seed):
        losses = optimize(
            objective,
            loss,
            steps=steps,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            clip=clip,
            precision=precision,
            accumulate=accumulate,
            seed=seed,
            ema=averages,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            resume=resume,
            overwrite=overwrite,
            run={} if checkpoint is None else _run(model, data, batch_size, wanted),
            kept=kept,
            begin=begin,
            after=after,
            processes=processes,
            progress=progress,
        )
    by_decay = {each.decay: averaged(each.state()) for each in averages}
    return FitResult(
        by_decay[_best(by_decay, watch)],
        losses,
        {step: averaged(state) for step, state in sorted(earlier.taken.items())},
        by_decay,
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
    for trained in trainable_modules(twin).values():
        if getattr(trained, "untrained", False):
            trained.untrained = False  # type: ignore[assignment]
    return twin


@contextmanager
def _naming_images(
    batches: Batches, data: TrainingSet, batch_size: int, seed: int
) -> Iterator[None]:
    """Adds to an error of numbers which training images the step had."""
    try:
        yield
    except FloatingPointError as error:
        if batches.step < 0:
            raise
        rows = data.rows_at(batches.step, batch_size, seed).tolist()
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise FloatingPointError(f"{error}; the step had the training images {shown}") from None


def _averages(objective: Objective, decays: float | Sequence[float]) -> list[NamedEMA]:
    """One average for each decay; the first is called ``ema`` in checkpoints."""
    given = [cast("float", decays)] if is_real(decays) else list(cast("Sequence[float]", decays))
    if not given or len(set(given)) < len(given):
        raise ValueError(f"ema={decays!r}: give one decay, or several that differ")
    return [NamedEMA(objective, d, f"ema{i}" if i else "ema") for i, d in enumerate(given)]


def _best(by_decay: dict[float, Model], watch: Sequence[Watcher]) -> float:
    """The average of least held-out loss; the first where nothing measures one."""
    held = next((watcher for watcher in watch if isinstance(watcher, HeldOut)), None)
    if held is None or len(by_decay) == 1:
        return next(iter(by_decay))
    return min(by_decay, key=lambda decay: held.measure(by_decay[decay]).loss)


def _check_parts(batch_size: int, processes: int, accumulate: int) -> None:
    """Refuses a batch that cannot be shared out equally."""
    if batch_size % (processes * accumulate):
        raise ValueError(
            f"batch_size={batch_size} cannot be shared out equally over {processes} processes with "
            f"accumulate={accumulate}: give a multiple of {processes * accumulate}"
        )


def _device(objective: Objective, processes: Processes) -> torch.device:
    """Where the weights are; refused where that is not this process's device."""
    device = next(objective.parameters()).device
    mine = processes.device
    if mine is not None and (mine.type, mine.index or 0) != (device.type, device.index or 0):
        raise ValueError(
            f"the model is on {device}, but process {processes.index} trains on {mine}: move it "
            "there first, model.to(accelerator.device)"
        )
    return device


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
