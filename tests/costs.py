"""Counts what a piece of code costs, in numbers that do not depend on how busy a machine is.

python tests/costs.py           # counts of today beside the ceilings
python tests/costs.py --write   # makes the ceilings of costs.json anew: today's counts and a tenth
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TABLE = Path(__file__).with_name("costs.json")
ROOM = 1.10
"""Ceilings over the counts of the day on which they were made."""

Counts = dict[str, float]
"""``operators``: calls of PyTorch operators. ``bytes``: new memory that these filled. ``calls``: of
Python functions. ``opens``: of files. ``launches``: of a kernel."""


class Operators(TorchDispatchMode):
    """Counts operators and the bytes of the memory that they return anew."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += 1
        held = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _is(t)}
        for tensor in tree_leaves(out):
            if _is(tensor) and tensor.untyped_storage().data_ptr() not in held:
                self.bytes += tensor.untyped_storage().nbytes()
        return out


def _is(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def operators(run: Callable[[], object]) -> Counts:
    """Operators and new bytes of a call."""
    with Operators() as seen:
        run()
    return {"operators": seen.count, "bytes": seen.bytes}


def calls(run: Callable[[], object]) -> Counts:
    """Python functions that a call enters, in this thread."""
    count = 0

    def seen(frame, event, argument) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(before)
    return {"calls": count}


_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(arguments[0]))


_audited = False


def opens(run: Callable[[], object]) -> Counts:
    """Files that Python opens in a call (a hook of the interpreter: those of C libraries not)."""
    global _opened, _audited
    if not _audited:
        sys.addaudithook(_audit)  # for good: there is no way to take one off
        _audited = True
    _opened = []
    try:
        run()
        return {"opens": len(_opened)}
    finally:
        _opened = None


def per_step(measure: Callable[..., Counts], run: Callable[[int], object]) -> Counts:
    """What each further step costs: of five, less two, over three."""
    run(2)
    more, less = measure(lambda: run(5)), measure(lambda: run(2))
    return {name: (more[name] - less[name]) / 3 for name in more}


def older_torch() -> bool:
    """Whether this torch is older than the one of the table: it counts otherwise."""
    known = json.loads(TABLE.read_text())["torch"]
    here = torch.__version__.split("+")[0]
    return [int(i) for i in here.split(".")[:2]] < [int(i) for i in known.split(".")[:2]]


def ceilings(path: str) -> Counts:
    """Of one hot path, from the table."""
    return json.loads(TABLE.read_text())["ceilings"][path]


def over(counts: Counts, most: Counts) -> list[str]:
    """What is above its ceiling, a line each."""
    return [
        f"{name}: {counts[name]:,.1f}, the ceiling is {most[name]:,.0f}"
        for name in most
        if counts[name] > most[name]
    ]


def main() -> None:
    from test_costs import PATHS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make the ceilings anew")
    options = parser.parse_args()
    made = {}
    for name, path in PATHS.items():
        counts = path.measured()
        made[name] = {key: math.floor(ROOM * math.ceil(value)) for key, value in counts.items()}
        known = ceilings(name) if not options.write else made[name]
        for key, value in counts.items():
            print(f"{name:24} {key:10} {value:14,.1f}   ceiling {known.get(key, 0):14,.0f}")
    if options.write:
        table = {"torch": torch.__version__.split("+")[0], "ceilings": made}
        TABLE.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
