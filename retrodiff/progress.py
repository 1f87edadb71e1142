"""Progress bars that stay hidden for work of less than a second, and lines above them."""

from __future__ import annotations

import sys
from typing import Any


def progress_bar(total: int | None, what: str, show: bool, **options: Any) -> Any:
    """A tqdm bar of ``total`` units, or of ``iterable=``; hidden for the first second.

    Args:
        total: units in all; None: those of the iterable.
        what: its name.
        show: False for silence.
        options: of tqdm.
    """
    from tqdm import tqdm

    return tqdm(total=total, desc=what, disable=not show, delay=1.0, dynamic_ncols=True, **options)


def say(line: str) -> None:
    """Prints a line to standard error, above the bar that is shown there, if one is."""
    from tqdm import tqdm

    bars: Any = getattr(tqdm, "_instances", ())
    if any(bar.last_print_t >= bar.start_t + bar.delay for bar in bars if not bar.disable):
        tqdm.write(line, file=sys.stderr)
    else:  # tqdm would draw the bars that still wait for their time
        print(line, file=sys.stderr)
