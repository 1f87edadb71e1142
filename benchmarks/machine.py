"""What a timing was taken on: processor, its features, libraries, date, and what else ran."""

from __future__ import annotations

import datetime
import importlib.metadata
import time
from pathlib import Path
from typing import Any

FEATURES = (
    "avx2 f16c fma avx512f avx512vl avx512bw avx_vnni avx512_vnni avx512_bf16 avx512_fp16 "
    "amx_bf16 amx_int8 asimdhp asimddp bf16 i8mm sve"
).split()
"""Flags of /proc/cpuinfo that say which products a processor has instructions for."""


def described(*packages: str) -> dict[str, Any]:
    """Processor, features, versions and date. Linux only."""
    found: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    flags = found.get("flags", found.get("Features", "")).split()
    cores = Path("/proc/cpuinfo").read_text().count("processor\t:")
    return {
        "processor": found.get("model name", found.get("CPU part", "unknown")),
        "family_model": f"{found.get('cpu family', '?')}/{found.get('model', '?')}",
        "cores": cores,
        "features": [name for name in FEATURES if name in flags],
        "versions": {name: importlib.metadata.version(name) for name in ("torch", *packages)},
        "date": datetime.date.today().isoformat(),
    }


class Busy:
    """Share of all cores' time that other processes took while a block ran. Linux only.

    Example:
        ``with Busy() as busy: work()``, then ``busy.others``. Child processes count as others.
    """

    def __enter__(self) -> Busy:
        self._began = self._all(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        ticks, own = self._all(), time.process_time() - self._began[1]
        worked, idle = (now - then for now, then in zip(ticks, self._began[0], strict=True))
        self.others = max(worked / 100 - own, 0) / max((worked + idle) / 100, 1e-9)

    @staticmethod
    def _all() -> tuple[int, int]:
        ticks = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle = ticks[3] + ticks[4]
        return sum(ticks) - idle, idle
