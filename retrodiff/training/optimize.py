"""The training loop that all share: AdamW, an average, checkpoints that resume exactly.

Step s of seed a always sees the same randomness, whatever happened before it, so a run that was
killed and resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from retrodiff.disk.files import plain_json
from retrodiff.interrupts import postponed
from retrodiff.numbers import real, whole
from retrodiff.progress import progress_bar
from retrodiff.training.checkpoint import ANEW, Checkpoint, State, disagreement
from retrodiff.training.ema import NamedEMA
from retrodiff.training.rates import (
    LARGEST,
    LearningRate,
    described,
    learning_rate,
    rate_disagreement,
)
from retrodiff.training.seeds import derived

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter."""


class Kept(Protocol):
    """Something that grows during a training and belongs into its checkpoints."""

    def state(self) -> dict[str, Tensor]:
        """Tensors by name."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` returned."""
        ...


def optimize(
    module: nn.Module,
    loss: Callable[[int, torch.Generator], Tensor],
    *,
    steps: int,
    lr: LearningRate | float,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
    ema: NamedEMA | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
    overwrite: bool = False,
    run: Mapping[str, Any] | None = None,
    kept: Mapping[str, Kept] | None = None,
    after: Callable[[int], None] | None = None,
    progress: bool = True,
    what: str = "training",
) -> Tensor:
    """Minimizes ``loss`` over the module's parameters, in place.

    Ctrl-C and SIGTERM end the step that is running, then the state is kept and `KeyboardInterrupt`
    raised. A second signal ends the step at once; the last checkpoint then stays as it is. A
    checkpoint that cannot be written is a warning, and the training goes on.

    Args:
        module: whose parameters are trained.
        loss: step number and its randomness -> scalar.
        steps: steps in all; a training that is continued may have more than before.
        lr: learning rate: a number, `constant`, `cosine`, or a function of the step.
        weight_decay: of AdamW.
        clip: largest gradient norm.
        seed: of the steps' randomness.
        ema: updated after every step.
        checkpoint: file that receives the state every ``checkpoint_every`` steps, at the end, and
            when the loop is interrupted; written whole or not at all.
        checkpoint_every: steps between checkpoints.
        resume: continue from the checkpoint if it exists.
        overwrite: replace the checkpoint of another training.
        run: what else must be the same when the training is continued, as JSON-able values.
        kept: what else belongs into a checkpoint, by name.
        after: told the number of steps done.
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
    checkpoint_every = whole("checkpoint_every", checkpoint_every)
    weight_decay, clip = real("weight_decay", weight_decay, 0), real("clip", clip, above=0)
    lr = learning_rate(lr)
    file = None
    if checkpoint is not None:
        file = Checkpoint(checkpoint, resume=resume, overwrite=overwrite)
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(f"{what}: no parameter requires a gradient, so there is nothing to train")
    optimizer = torch.optim.AdamW(named.values(), lr=0.0, weight_decay=weight_decay)
    kept = dict(kept or {}) | ({} if ema is None else {"ema": ema})
    settings = {"seed": seed, "weight_decay": weight_decay, "clip": clip}
    settings |= {"ema": None if ema is None else ema.decay, **(run or {})}
    about = json.loads(json.dumps(plain_json(settings)))
    losses = torch.full((steps,), math.nan)
    rates = torch.zeros(steps, dtype=torch.float64)
    done = 0
    if file is not None and (state := file.load()) is not None:
        _check_same(file.path, state, about, steps, lr)
        _restore(file.path, state, module, named, optimizer, kept)
        done = state.done
        losses[:done], rates[:done] = state.tensors["losses"], state.tensors["rates"]

    def save() -> None:
        """Keeps the state of the steps done, once; a failure is a warning."""
        if file is None or file.done == done:
            return
        _check_weights(named, done, file)
        tensors = {"losses": losses[:done].clone(), "rates": rates[:done].clone()}
        tensors |= _tensors(module, named, optimizer, kept)
        try:
            file.save(State(done, {**about, "steps": steps, "lr": described(lr)}, tensors))
        except OSError as error:
            warnings.warn(
                f"the state of step {done} could not be kept in {file.path} "
                f"({error.strerror or error}); what was there stays",
                stacklevel=3,
            )

    complete, buffers = True, _versions(module)  # weights, optimizer, average: all of one step?
    module.train()
    try:
        with (
            progress_bar(steps, what, progress, initial=done) as bar,
            postponed() as signals,
        ):
            try:
                for step in range(done, steps):
                    buffers = _versions(module)
                    signals.check()
                    rates[step] = rate = real(f"lr at step {step}", lr(step), 0, LARGEST)
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    optimizer.zero_grad(set_to_none=True)
                    value = loss(step, derived(seed, "step", step))
                    _check_finite("loss", value, step, file)
                    value.backward()
                    norm = torch.nn.utils.clip_grad_norm_(named.values(), clip)
                    _check_finite("gradient", norm, step, file)
                    complete = False
                    optimizer.step()
                    if ema is not None:
                        ema.update()
                    losses[step] = float(value.detach())
                    if after is not None:
                        after(step + 1)
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


def _versions(module: nn.Module) -> list[tuple[int, int]]:
    """Changes whenever a buffer does, such as the statistics of a BatchNorm in a forward pass."""
    return [(id(buffer), buffer._version) for buffer in module.buffers()]


def _check_finite(what: str, value: Tensor, step: int, file: Checkpoint | None) -> None:
    if value.ndim:
        raise ValueError(f"the {what} has shape {tuple(value.shape)}: give its mean, a scalar")
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


def _check_same(
    path: Path, state: State, about: Mapping[str, Any], steps: int, lr: LearningRate
) -> None:
    """Refuses to continue a training with other settings."""
    run = dict(state.run)
    before, description = run.pop("steps", None), run.pop("lr", None)
    differs = disagreement(run, about)
    if differs is None and steps < state.done:
        differs = f"{state.done} steps done already, but this one has steps={steps}"
    if differs is None:
        differs = rate_disagreement(lr, state.tensors["rates"], description, before == steps)
    if differs is not None:
        raise ValueError(f"{path} belongs to a training with {differs}: give the same, {ANEW}")


def _tensors(
    module: nn.Module,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    kept: Mapping[str, Kept],
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in named.items():
        tensors[f"parameter.{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors |= {f"buffer.{name}": buffer for name, buffer in module.named_buffers()}
    for part, keeper in kept.items():
        tensors |= {f"{part}.{key}": value for key, value in keeper.state().items()}
    return tensors


def _restore(
    path: Path,
    state: State,
    module: nn.Module,
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    kept: Mapping[str, Kept],
) -> None:
    """Copies a state into what is trained, after all of it has been compared."""
    weights, buffers = state.part("parameter"), state.part("buffer")
    for mine, theirs in ((named, weights), (dict(module.named_buffers()), buffers)):
        for name in {**mine, **theirs}:
            one, other = (_kind(side.get(name)) for side in (theirs, mine))
            if one != other:
                raise ValueError(
                    f"{path} was written for another network: {name} is {one} there, and {other} "
                    f"in this one: build the same network, {ANEW}"
                )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
            moments = {
                key: state.tensors[f"optimizer.{key}.{name}"]
                for key in MOMENTS
                if f"optimizer.{key}.{name}" in state.tensors
            }
            if moments:
                optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in moments.items()
                }
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    for part, keeper in kept.items():
        keeper.load(state.part(part))


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
