"""Anonymous memory of this process, now and at its peak. Linux only."""

from __future__ import annotations

import threading
from pathlib import Path


def anonymous_mb() -> float:
    """RssAnon of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1e3
    return float("nan")


class Peak:
    """The most anonymous memory while a block runs, looked at fifty times a second.

    Example:
        ``with Peak() as peak: work()``, then ``peak.mb``.
    """

    def __init__(self) -> None:
        self.mb = 0.0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.mb = max(self.mb, anonymous_mb())

    def __enter__(self) -> Peak:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()
        self.mb = max(self.mb, anonymous_mb())
