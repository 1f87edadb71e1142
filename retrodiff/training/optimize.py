"""The training loop that all share: parts of a batch, autocast, an average, exact checkpoints.

Step s of seed a always sees the same randomness, whatever happened before it, so a run that was
killed and resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import json
import math
import signal
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from retrodiff.disk.files import plain_json
from retrodiff.interrupts import Interruption, Postponed, postponed
from retrodiff.numbers import real, whole
from retrodiff.precision import best_precision
from retrodiff.progress import progress_bar
from retrodiff.randomness import Randomness
from retrodiff.training.checkpoint import Checkpoint, State
from retrodiff.training.ema import NamedEMA
from retrodiff.training.optimizers import OptimizerName, Optimizers, get_optimizers
from retrodiff.training.processes import Processes
from retrodiff.training.rates import LARGEST, LearningRate, described, learning_rate
from retrodiff.training.resuming import Kept, check_same, restore, tensors_of
from retrodiff.training.seeds import derived

Precision = Literal["float32", "bfloat16", "auto"]


@dataclass(frozen=True)
class Part:
    """What one backward pass works on: all of a step's batch, or one of equal parts of it.

    Args:
        step: number of the step.
        seed: of the training.
        index: of ``count`` parts, which gradient accumulation and processes share out.
        count: 1 where a step is one backward pass in one process.
    """

    step: int
    seed: int
    index: int = 0
    count: int = 1

    @property
    def generator(self) -> torch.Generator:
        """The step's randomness; all parts of a step draw the same."""
        return derived(self.seed, "step", self.step)

    def rows(self, batch_size: int) -> slice:
        """Which rows of the step's batch belong to this part."""
        each = batch_size // self.count
        return slice(self.index * each, (self.index + 1) * each)

    def randomness(self, batch_size: int, device: torch.device | None = None) -> torch.Generator:
        """Randomness of this part's rows.

        On a CPU it belongs to the rows: however a batch is shared out, a row draws the same. On
        another device the part has one generator there.
        """
        if device is not None and device.type != "cpu":
            number = self.step * self.count + self.index
            generator = torch.Generator(device)
            return generator.manual_seed(derived(self.seed, "part", number).initial_seed())
        rows = self.rows(batch_size)
        first = self.step * batch_size
        return Randomness.of(self.seed, range(first + rows.start, first + rows.stop), "training")


Loss = Callable[[nn.Module, Part], Tensor]
"""The module (averaging gradients over processes when it is called) and a part -> its loss."""


def optimize(
    module: nn.Module,
    loss: Loss,
    *,
    steps: int,
    lr: LearningRate | float,
    optimizer: OptimizerName | Optimizers = "adamw",
    weight_decay: float = 0.0,
    clip: float = 1.0,
    precision: Precision = "float32",
    accumulate: int = 1,
    seed: int = 0,
    ema: NamedEMA | Iterable[NamedEMA] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    overwrite: bool = False,
    run: Mapping[str, Any] | None = None,
    kept: Mapping[str, Kept] | None = None,
    begin: Callable[[int], None] | None = None,
    after: Callable[[int, float, float], None] | None = None,
    processes: Processes | None = None,
    progress: bool = True,
    what: str = "training",
) -> Tensor:
    """Minimizes ``loss`` over the module's parameters, in place.

    Ctrl-C and SIGTERM end the step that is running, then the state is kept and `KeyboardInterrupt`
    raised. A second signal ends the step at once; the last checkpoint then stays as it is. A
    checkpoint that cannot be written is a warning, and the training goes on.

    Args:
        module: whose parameters are trained.
        loss: (module, `Part`) -> scalar, the mean over that part of the batch.
        steps: steps in all; a training that is continued may have more than before.
        lr: learning rate: a number, `constant`, `cosine`, or a function of the step.
        optimizer: ``"adamw"``, ``"muon"``, or parameters by name -> optimizers.
        weight_decay: of the optimizers by name.
        clip: largest gradient norm.
        precision: of products and convolutions: ``"float32"``, ``"bfloat16"`` (autocast; weights
            stay float32), or ``"auto"``: bfloat16 where the processor multiplies it faster.
        accumulate: backward passes of each process per step, each with a part of the batch.
        seed: of the steps' randomness.
        ema: averages, updated after every step.
        checkpoint: file that receives the state every ``checkpoint_every`` steps, at the end, and
            when the loop is interrupted; written whole or not at all.
        checkpoint_every: steps between checkpoints.
        resume: continue from the checkpoint if it exists.
        overwrite: replace the checkpoint of another training.
        run: what else must be the same when the training is continued, as JSON-able values.
        kept: what else belongs into a checkpoint, by name.
        begin: told the number of steps done before the first one.
        after: told the number of steps done, the loss of the last one, and its learning rate.
        processes: those that train together; None: what the launcher started.
        progress: show a bar with the loss.
        what: name of the bar.

    Returns:
        The loss of every step (steps,).

    Raises:
        FloatingPointError: loss or gradient is not finite; the last checkpoint stays as it is.
        ValueError: a number is out of range, or the checkpoint is damaged or of another training.
        KeyboardInterrupt: by a signal; the message says how to continue.
    """
    steps, seed = whole("steps", steps), whole("seed", seed, 0)
    checkpoint_every, accumulate = (
        whole("checkpoint_every", checkpoint_every),
        whole("accumulate", accumulate),
    )
    weight_decay, clip = real("weight_decay", weight_decay, 0), real("clip", clip, above=0)
    lr = learning_rate(lr)
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(f"{what}: no parameter requires a gradient, so there is nothing to train")
    device = next(iter(named.values())).device
    precision = get_precision(precision, device)
    processes = processes or Processes()
    file = None
    if checkpoint is not None:
        file = Checkpoint(checkpoint, resume=resume, overwrite=overwrite)
    optimizers = list(get_optimizers(optimizer, weight_decay)(named))
    averages = [ema] if isinstance(ema, NamedEMA) else list(ema)
    kept = dict(kept or {}) | {average.name: average for average in averages}
    settings = {"seed": seed, "weight_decay": weight_decay, "clip": clip, "precision": precision}
    settings |= {"optimizer": optimizer if isinstance(optimizer, str) else _name(optimizer)}
    decays = [average.decay for average in averages]
    settings |= {"ema": decays[0] if len(decays) == 1 else decays or None, **(run or {})}
    about = json.loads(json.dumps(plain_json(settings)))
    losses = torch.full((steps,), math.nan)
    rates = torch.zeros(steps, dtype=torch.float64)
    done = 0
    if file is not None and (state := file.load()) is not None:
        check_same(file.path, state, about, steps, lr)
        restore(file.path, state, module, named, optimizers, kept)
        done = state.done
        losses[:done], rates[:done] = state.tensors["losses"], state.tensors["rates"]
    processes.wait()  # all have read the checkpoint before one of them writes it
    wrapped = processes.wrap(module)

    def save() -> None:
        """Keeps the state of the steps done, once; a failure is a warning."""
        if file is None or file.done == done:
            return
        _check_weights(named, done, file)
        if not processes.main:
            return
        tensors = {"losses": losses[:done].clone(), "rates": rates[:done].clone()}
        tensors |= tensors_of(module, named, optimizers, kept)
        try:
            file.save(State(done, {**about, "steps": steps, "lr": described(lr)}, tensors))
        except OSError as error:
            warnings.warn(
                f"the state of step {done} could not be kept in {file.path} "
                f"({error.strerror or error}); what was there stays",
                stacklevel=3,
            )

    def backward(step: int) -> Tensor:
        """Gradients of all parts of this process; the mean of their losses."""
        total = torch.zeros((), device=device)
        for i in range(accumulate):
            index, count = processes.index * accumulate + i, processes.count * accumulate
            with nullcontext() if i == accumulate - 1 else processes.adding_up(wrapped):
                with torch.autocast(device.type, torch.bfloat16, precision == "bfloat16"):
                    value = loss(wrapped, Part(step, seed, index, count))
                if value.ndim:
                    raise ValueError(
                        f"the loss has shape {tuple(value.shape)}: give its mean, a scalar"
                    )
                (value / accumulate).backward()
            total += value.detach() / accumulate
        return total

    complete, buffers = True, _versions(module)  # weights, optimizer, average: all of one step?
    module.train()
    try:
        with (
            progress_bar(steps, what, progress and processes.main, initial=done) as bar,
            postponed() as signals,
        ):
            try:
                if begin is not None:
                    begin(done)
                for step in range(done, steps):
                    buffers = _versions(module)
                    _stop_together(signals, processes, device)
                    rates[step] = rate = real(f"lr at step {step}", lr(step), 0, LARGEST)
                    for one in optimizers:
                        for group in one.param_groups:
                            group["lr"] = rate
                        one.zero_grad(set_to_none=True)
                    value = processes.mean(backward(step))
                    _check_finite("loss", value, step, file)
                    norm = torch.nn.utils.clip_grad_norm_(named.values(), clip)
                    _check_finite("gradient", norm, step, file)
                    complete = False
                    for one in optimizers:
                        one.step()
                    for average in averages:
                        average.update()
                    losses[step] = float(value)
                    if after is not None:
                        after(step + 1, float(losses[step]), rate)
                    done, complete = step + 1, True
                    if done % checkpoint_every == 0 and done < steps:
                        save()
                    bar.update()
                    bar.set_postfix(
                        loss=f"{losses[max(0, step - 49) : done].mean():.4f}", refresh=False
                    )
                buffers, signals.shielded = _versions(module), True
                _check_weights(named, done, file)
                save()
                signals.check()
            except KeyboardInterrupt as interrupt:
                signals.shielded = True
                if complete and buffers == _versions(module):
                    save()
                interrupt.args = (_how_to_continue(what, done, steps, file),)
                raise
    finally:
        module.eval()
    return losses


def get_precision(name: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """The precision that a name stands for on a device."""
    if name == "auto":
        return best_precision(device)
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"precision={name!r} is unknown: give 'float32', 'bfloat16' or 'auto'")
    return name


def _stop_together(signals: Postponed, processes: Processes, device: torch.device) -> None:
    """Ends all processes after the same step if one of them has got a signal."""
    if processes.count == 1:
        signals.check()
        return
    number = torch.tensor(float(signals.number or 0), device=device)
    if float(processes.mean(number)) > 0:
        raise Interruption(signals.number or signal.SIGTERM)


def _name(optimizer: Any) -> str:
    return str(getattr(optimizer, "__qualname__", type(optimizer).__qualname__))


def _versions(module: nn.Module) -> list[tuple[int, int]]:
    """Changes whenever a buffer does, such as the statistics of a BatchNorm in a forward pass."""
    return [(id(buffer), buffer._version) for buffer in module.buffers()]


def _check_finite(what: str, value: Tensor, step: int, file: Checkpoint | None) -> None:
    if torch.isfinite(value):
        return
    kept = _kept(file)
    raise FloatingPointError(
        f"the {what} is {value.item()} at step {step}: lower the learning rate and start anew, or "
        f"look for NaN in images and embeddings{kept}"
    )


def _check_weights(named: Mapping[str, Tensor], done: int, file: Checkpoint | None) -> None:
    """Refuses weights that are infinite or NaN, before they replace a good checkpoint."""
    for name, parameter in named.items():
        if not bool(parameter.isfinite().all()):
            kept = _kept(file)
            raise FloatingPointError(
                f"{name} is not finite after step {done}: lower the learning rate and start "
                f"anew{kept}"
            )


def _kept(file: Checkpoint | None) -> str:
    if file is None or file.done is None:
        return ""
    return f"; {file.path} keeps the state after {file.done} steps"


def _how_to_continue(what: str, done: int, steps: int, file: Checkpoint | None) -> str:
    line = f"{what} was interrupted after {done} of {steps} steps"
    if file is None or file.done is None:
        return f"{line}; nothing is kept: give a checkpoint next time"
    return f"{line}; {file.path} keeps the first {file.done}: continue with resume=True"
