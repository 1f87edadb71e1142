"""Progress bars that stay hidden for work of less than a second, and lines above them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any


def progress_bar(total: int | None, what: str, show: bool, **options: Any) -> Any:
    """A tqdm bar of ``total`` units, or of ``iterable=``; hidden for the first second.

    Args:
        total: units in all; None: those of the iterable.
        what: its name.
        show: False for silence.
        options: of tqdm.
    """
    try:
        from tqdm import tqdm
    except ImportError:  # a bar that nobody sees needs no package
        if show:
            raise
        return _Silent(options.get("iterable", ()))
    return tqdm(total=total, desc=what, disable=not show, delay=1.0, dynamic_ncols=True, **options)


class _Silent:
    """A bar that shows nothing."""

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *values, **options: None


def say(line: str) -> None:
    """Prints a line to standard error, above the bar that is shown there, if one is."""
    from tqdm import tqdm

    bars: Any = getattr(tqdm, "_instances", ())
    if any(bar.last_print_t >= bar.start_t + bar.delay for bar in bars if not bar.disable):
        tqdm.write(line, file=sys.stderr)
    else:  # tqdm would draw the bars that still wait for their time
        print(line, file=sys.stderr)
