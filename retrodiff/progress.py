"""Progress bars that stay hidden for work of less than a second."""

from __future__ import annotations

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
