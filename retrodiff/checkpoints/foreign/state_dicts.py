"""The tensors of a checkpoint by name, out of what trainers wrap them in.

A trainer may nest its state dict (``state_dict``, ``model``, ``ema``), and wrappers of PyTorch
write themselves into the names: ``module.`` of data parallelism, ``_orig_mod.`` of compilation, and
others. Here the names come out as latent-diffusion gives them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

RAW, EMA, FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."
PARTS = (RAW, EMA, FIRST_STAGE)
"""Beginnings of the names of a checkpoint's networks."""

WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module"}
)
"""Parts of names that wrappers of PyTorch, DeepSpeed and FSDP add; no network here has them."""

AVERAGED = frozenset({"ema", "ema_model", "ema_state_dict", "model_ema", "state_dict_ema"})
"""Where trainers keep a second state dict, of averaged weights under the same names."""

DEPTH = 4
"""Levels of a file in which state dicts are looked for."""


def ema_name(name: str) -> str:
    """Name of the average of ``model.diffusion_model.{name}``: dots get lost."""
    return EMA + f"diffusion_model.{name}".replace(".", "")


def state_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors in what a file holds, by their published names.

    Args:
        content: what was unpickled, or tensors by name.
        path: of the file, for errors.

    Raises:
        ValueError: there are no tensors by name, or two that would get one name.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    found = [(place, _clean(path, state)) for place, state in _states(content, ())]
    if not found:
        raise ValueError(f"{path} holds no tensors by name: it is no checkpoint of a model")
    averaged = [state for place, state in found if AVERAGED & set(place)]
    plain = [(place, state) for place, state in found if not AVERAGED & set(place)]
    # The networks' own, else the largest: trainers keep counters and optimizers beside it.
    known = [item for item in plain if _networks(item[1])]
    known = known or sorted(plain, key=lambda item: -len(item[1]))[:1]
    if len(known) > 1:
        places = ", ".join(".".join(place) or "the top" for place, _ in known)
        raise ValueError(
            f"{path} holds {len(known)} state dicts ({places}): save the one that is meant as a "
            "file of its own"
        )
    state = dict(known[0][1] if known else averaged[0])
    if not any(name.startswith(EMA) for name in state):
        for extra in averaged:
            state |= _averages(extra)
    return state


def beginnings(names: Iterable[str]) -> str:
    """With what the names of a file begin, for an error: the most frequent first."""
    counts = Counter(name.split(".")[0] for name in names)
    shown = ", ".join(f"{start[:40]}.* ({n})" for start, n in counts.most_common(5))
    return shown + (", ..." if len(counts) > 5 else "")


def _states(content: Mapping[Any, Any], place: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    """Mappings that hold tensors, from the outside in, and where they are."""
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and len(place) < DEPTH:
            yield from _states(cast("Mapping[Any, Any]", value), (*place, key))


def _clean(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the names of wrappers, and without a prefix before the parts' names."""
    plain = {name: _unwrapped(name) for name in state}
    prefix = _prefix(plain.values())
    found: dict[str, Tensor] = {}
    for name, short in plain.items():
        short = short.removeprefix(prefix)
        if short in found:
            raise ValueError(
                f"{path} has two tensors for {short}, with and without a wrapper's name: take one "
                "of them out"
            )
        found[short] = state[name]
    return found


def _unwrapped(name: str) -> str:
    short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    before, ema, after = short.partition(EMA)
    if ema:  # their dots got lost, so that a wrapper's name is inside a longer word
        for wrapper in WRAPPERS:
            after = after.replace(wrapper, "")
    return before + ema + after


def _prefix(names: Any) -> str:
    """What stands before the parts' names in all of them; nothing where they differ."""
    found: set[str] = set()
    for name in names:
        places = [name.find(part) for part in PARTS]
        starts = [at for at in places if at == 0 or (at > 0 and name[at - 1] == ".")]
        if starts:
            found.add(name[: min(starts)])
    return found.pop() if len(found) == 1 else ""


def _networks(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(PARTS) for name in state)


def _averages(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A second state dict under the names that averaged weights have in the published files."""
    averaged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(RAW):
            averaged[ema_name(name.removeprefix(RAW))] = tensor
        elif name.startswith(EMA):
            averaged[name] = tensor
        elif name.startswith("diffusion_model"):
            averaged[EMA + name.replace(".", "")] = tensor
    return averaged
