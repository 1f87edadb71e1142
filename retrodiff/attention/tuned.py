"""Launch sizes that were measured on this machine, kept in the user's cache folder.

One JSON file for each kind of device and version of Triton, written whole. A file that cannot be
read is ignored with one line, and the sizes are those by rule.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from retrodiff.attention.launches import Launch, Tile, launch, power_of_two
from retrodiff.disk.caches import cache_folder
from retrodiff.kernel_trials import KernelWarning

FORMAT = 1
MOST_BYTES = 1 << 20
"""A larger file is none of ours."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was measured for one class of shapes.

    Args:
        kernel: ``forward`` or ``backward``.
        dtype: of the tables, such as ``bfloat16``.
        width: c.
        heads: h.
        k: neighbors.
        size: positions of a region, as the next power of two.
        tile: the fastest.
        seconds: of a launch with it.
        seconds_by_rule: of a launch with the sizes by rule, in the same run.

    Examples:
        >>> from retrodiff.attention import Tuned
        >>> from dataclasses import fields
        >>> [field.name for field in fields(Tuned)][:3]
        ['kernel', 'dtype', 'width']
    """

    kernel: str
    dtype: str
    width: int
    heads: int
    k: int
    size: int
    tile: Tile
    seconds: float
    seconds_by_rule: float

    @property
    def key(self) -> tuple[Any, ...]:
        """The class."""
        return self.kernel, self.dtype, self.width, self.heads, self.k, self.size


def tuned_launch(
    device: torch.device,
    *,
    size: int,
    width: int,
    heads: int,
    k: int,
    dtype: torch.dtype,
    backward: bool = False,
) -> Launch:
    """The sizes of a launch: as tuned on this kind of device, else by rule.

    Args:
        device: where.
        size: positions of a region.
        width: c.
        heads: h.
        k: neighbors.
        dtype: of the tables.
        backward: for the kernel that gives the gradient of x.
    """
    known, tile = tuned_on(device), None
    if known:
        kernel, name = "backward" if backward else "forward", str(dtype).removeprefix("torch.")
        entry = known.get((kernel, name, width, heads, k, power_of_two(size)))
        tile = None if entry is None else entry.tile
    return launch(size=size, heads=heads, k=k, dtype=dtype, backward=backward, tile=tile)


@functools.cache
def tuned_on(device: torch.device) -> dict[tuple[Any, ...], Tuned]:
    """Everything that was tuned on this kind of device; read once in a process."""
    path = launches_file(device)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("too large")
        return {entry.key: entry for entry in _read(json.loads(path.read_text("utf-8")), device)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        told = (str(error).splitlines() or [""])[0][:120]
        warnings.warn(
            f"{path} does not hold launch sizes ({type(error).__name__}: {told}): those by rule "
            "are taken; `retrodiff tune` writes it anew",
            KernelWarning,
            stacklevel=2,
        )
        return {}


def remember(device: torch.device, entries: Sequence[Tuned]) -> Path:
    """Adds to what is kept for this kind of device; returns the file.

    Raises:
        OSError: it cannot be written.
    """
    from retrodiff.disk.files import write_json

    tuned_on.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelWarning)  # a damaged file is replaced
        kept = tuned_on(device) | {entry.key: entry for entry in entries}
    path = launches_file(device)
    name, version = _names(device)
    launches = [asdict(kept[key]) for key in sorted(kept)]
    write_json(path, {"format": FORMAT, "device": name, "triton": version, "launches": launches})
    tuned_on.cache_clear()
    return path


def launches_file(device: torch.device) -> Path:
    """Where the sizes for a kind of device and this version of Triton are kept."""
    plain = (re.sub(r"[^A-Za-z0-9.]+", "-", part) for part in _names(device))
    return cache_folder() / "launches" / ("_triton-".join(plain) + ".json")


def _names(device: torch.device) -> tuple[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for package in ("triton", "pytorch-triton-rocm"):
        try:
            return name, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return name, "none"


def _read(found: Any, device: torch.device) -> list[Tuned]:
    name, version = _names(device)
    if (found["format"], found["device"], found["triton"]) != (FORMAT, name, version):
        raise ValueError(f"not of format {FORMAT} for {name} and triton {version}")
    entries = []
    for entry in found["launches"]:
        made = Tuned(**(entry | {"tile": Tile(**entry["tile"])}))
        if not all(isinstance(part, (int, str)) for part in made.key):
            raise ValueError("an entry of other types")
        entries.append(made)
    return entries
