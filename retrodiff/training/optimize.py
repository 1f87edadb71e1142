"""The training loop that all share: AdamW, an average, checkpoints that resume exactly.

Step s of seed a always sees the same randomness, whatever happened before it, so a run that was
killed and resumed ends with the same weights as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from retrodiff.files import write_safetensors
from retrodiff.progress import progress_bar
from retrodiff.training.ema import NamedEMA

Rate = Callable[[int], float]
"""Step number -> learning rate."""

FORMAT = 1


def constant(rate: float, warmup: int = 0) -> Rate:
    """Linear warm-up, then the same rate (the paper: 1e-4 after 100 steps)."""
    return lambda step: rate * min(1.0, (step + 1) / max(1, warmup))


def cosine(rate: float, steps: int, warmup: int = 0) -> Rate:
    """Linear warm-up, then half a cosine down to zero (Loshchilov & Hutter 2017)."""

    def at(step: int) -> float:
        done = max(0, step - warmup) / max(1, steps - warmup)
        return rate * min(1.0, (step + 1) / max(1, warmup)) * (1 + math.cos(math.pi * done)) / 2

    return at


def at_step(seed: int, step: int) -> torch.Generator:
    """The randomness of one training step, a function of seed and step alone."""
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + step * 0x85EBCA77) % 2**63)


def optimize(
    module: nn.Module,
    loss: Callable[[int, torch.Generator], Tensor],
    *,
    steps: int,
    rate: Rate,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
    ema: NamedEMA | None = None,
    checkpoint: Path | None = None,
    every: int = 500,
    resume: bool = False,
    after: Callable[[int], None] | None = None,
    progress: bool = True,
    what: str = "training",
) -> Tensor:
    """Minimizes ``loss`` over the module's parameters, in place.

    Args:
        module: whose parameters are trained.
        loss: step number and its randomness -> scalar.
        steps: how many.
        rate: learning rate of a step.
        weight_decay: of AdamW.
        clip: largest gradient norm.
        seed: of the steps' randomness.
        ema: updated after every step.
        checkpoint: file that receives the state every ``every`` steps, at the end, and when the
            loop is interrupted; written whole or not at all.
        every: steps between checkpoints.
        resume: continue from the checkpoint if it exists.
        after: told the number of steps done.
        progress: show a bar with the loss.
        what: name of the bar.

    Returns:
        The loss of every step (steps,).
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in named], lr=rate(0), weight_decay=weight_decay)
    losses = torch.full((steps,), math.nan)
    start = 0
    if checkpoint is not None and resume and checkpoint.exists():
        start = _restore(checkpoint, named, optimizer, ema, losses, (steps, seed))
    done = start

    def save() -> None:
        if checkpoint is not None:
            _keep(checkpoint, named, optimizer, ema, losses, done, (steps, seed))

    module.train()
    try:
        with progress_bar(steps, what, progress, initial=start) as bar:
            for step in range(start, steps):
                for group in optimizer.param_groups:
                    group["lr"] = rate(step)
                optimizer.zero_grad(set_to_none=True)
                value = loss(step, at_step(seed, step))
                if not torch.isfinite(value):
                    raise FloatingPointError(
                        f"the loss is {value.item()} at step {step}: lower the learning rate, or "
                        "look for NaN in images and embeddings"
                    )
                value.backward()
                torch.nn.utils.clip_grad_norm_([p for _, p in named], clip)
                optimizer.step()
                if ema is not None:
                    ema.update()
                losses[step] = float(value.detach())
                done = step + 1
                if after is not None:
                    after(done)
                if done % every == 0 and done < steps:
                    save()
                bar.update()
                bar.set_postfix(
                    loss=f"{losses[max(0, step - 49) : done].mean():.4f}", refresh=False
                )
    except KeyboardInterrupt:
        save()
        raise
    finally:
        module.eval()
    save()
    return losses


Named = list[tuple[str, nn.Parameter]]


def _keep(
    path: Path,
    named: Named,
    optimizer: torch.optim.Optimizer,
    ema: NamedEMA | None,
    losses: Tensor,
    done: int,
    run: tuple[int, int],
) -> None:
    tensors: dict[str, Tensor] = {"losses": losses}
    for name, parameter in named:
        tensors[f"parameter.{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    if ema is not None:
        tensors |= {f"ema.{key}": value for key, value in ema.state().items()}
    header = {"format": str(FORMAT), "done": str(done), "steps": str(run[0]), "seed": str(run[1])}
    write_safetensors(path, tensors, header)


def _restore(
    path: Path,
    named: Named,
    optimizer: torch.optim.Optimizer,
    ema: NamedEMA | None,
    losses: Tensor,
    run: tuple[int, int],
) -> int:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        header = file.metadata() or {}
        if header.get("format") != str(FORMAT):
            raise ValueError(f"{path} is no training checkpoint of format {FORMAT}")
        saved = (int(header["steps"]), int(header["seed"]))
        if saved != run:
            raise ValueError(
                f"{path} belongs to a run of steps={saved[0]}, seed={saved[1]}, but this one has "
                f"steps={run[0]}, seed={run[1]}: use the same numbers, or start without resume"
            )
        keys = set(file.keys())
        lost = [n for n, _ in named if f"parameter.{n}" not in keys]
        if lost:
            raise ValueError(
                f"{path} was written for another network: no {', '.join(lost[:10])} in it"
            )
        losses.copy_(file.get_tensor("losses"))
        with torch.no_grad():
            for name, parameter in named:
                parameter.copy_(file.get_tensor(f"parameter.{name}"))
                state = {
                    kind: file.get_tensor(f"optimizer.{kind}.{name}")
                    for kind in ("step", "exp_avg", "exp_avg_sq")
                    if f"optimizer.{kind}.{name}" in keys
                }
                if state:
                    optimizer.state[parameter] = {
                        kind: value if kind == "step" else value.to(parameter.device)
                        for kind, value in state.items()
                    }
        if ema is not None:
            ema.load({k[4:]: file.get_tensor(k) for k in keys if k.startswith("ema.")})
        return int(header["done"])
