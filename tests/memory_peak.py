"""The most memory that a block takes beyond what was in use before it. Linux only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def at_most(megabytes: float) -> Iterator[None]:
    """Fails where the block takes more; skips the test where that cannot be measured."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        pytest.skip("the peak of memory cannot be measured here")
    before = _status("VmRSS")
    yield
    taken = (_status("VmHWM") - before) / 1024
    assert taken <= megabytes, f"{taken:.0f} MB were taken"


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
