"""Says at the start of a training what its budget has sufficed for before.

Nobody should wait for noise: how many images a training will see is known after a few steps, and
what so many images gave in earlier trainings is in a table. The table, ``budgets.json``, holds
measured rows only; ``benchmarks/training_budget.py`` makes more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from torch import Tensor

from retrodiff.numbers import whole
from retrodiff.progress import say
from retrodiff.training.log import duration
from retrodiff.training.watching import Moment

MEASURED_STEPS = 20
"""Steps whose speed is measured."""
FIRST = 2
"""Steps before that, which are slower than all others."""


@dataclass(frozen=True)
class Budget:
    """What a training of so many images looked like.

    Args:
        kind: of pictures, in a word.
        size: their side in pixels.
        space: what the network drew: pixels or latents.
        network: its kind and size.
        images: seen in training.
        recognizable: whether a person recognizes samples as relatives of their neighbors.
        seen: what samples of held-out queries looked like.
        source: command or run that the row is from.
    """

    kind: str
    size: int
    space: str
    network: str
    images: int
    recognizable: bool
    seen: str
    source: str


@cache
def measured_budgets() -> tuple[Budget, ...]:
    """The rows of the table, by size and images."""
    text = files("retrodiff.training").joinpath("budgets.json").read_text("utf-8")
    rows = (Budget(**row) for row in json.loads(text)["rows"])
    return tuple(sorted(rows, key=lambda row: (row.size, row.images)))


def outlook(
    images: int,
    of: int,
    size: int,
    *,
    speed: float | None = None,
    table: Sequence[Budget] | None = None,
) -> str:
    """One line: how many images a budget sees, and what that gave in measured trainings.

    Args:
        images: that the training will see in all.
        of: training images.
        size: their side in pixels.
        speed: images per second; None: unknown, and no times are said.
        table: measured trainings; None: those of `measured_budgets`.

    Examples:
        >>> row = Budget("faces", 64, "pixels", "UNet", 500_000, True, "faces", "a run")
        >>> print(outlook(1_000_000, 500, 64, table=[row]))
        this budget will see about 1,000,000 images (2,000 passes over your 500); at 64x64 \
recognizable samples took about 500,000 (faces): this is enough
    """
    passes = images / of
    shown = f"{passes:,.0f}" if passes >= 10 else f"{passes:.1f}"
    time = "" if speed is None else f" in {duration(images / speed)}, at {speed:,.0f} a second"
    line = f"this budget will see about {rounded(images):,} images{time} "
    line += f"({shown} passes over your {of:,})"
    rows = _like(size, measured_budgets() if table is None else table)
    if not rows:
        return f"{line}; no training of such images was measured"
    at = f"{rows[0].size}x{rows[0].size}"
    near = at if rows[0].size == size else f"{at}, the nearest size that was measured,"
    good = [row for row in rows if row.recognizable]
    below = [row for row in rows if row.images <= images and not row.recognizable]
    expect = f": {below[-1].images:,} images gave {below[-1].seen}" if below else ""
    if not good:
        longest = rows[-1]
        return (
            f"{line}; at {near} no measured training gave recognizable samples: the longest, "
            f"{longest.images:,} images ({longest.kind}), gave {longest.seen}"
        )
    enough = good[0]
    said = f"{line}; at {near} recognizable samples took about {enough.images:,} ({enough.kind})"
    if images >= enough.images:
        return f"{said}: this is enough"
    longer = f", {duration(enough.images / speed)} here" if speed else ""
    return f"{said}{longer}; this is less{expect}"


class Outlook:
    """Prints `outlook` after the first steps of a training, when its speed is known.

    Args:
        of: training images.
        size: their side in pixels.
        tell: takes the line; by default it is printed to standard error.

    Examples:
        >>> from retrodiff import presets
        >>> from retrodiff.training import Moment, Outlook
        >>> told = []
        >>> watcher = Outlook(of=500, size=32, tell=told.append)
        >>> watcher.begin(0)
        >>> for done in range(1, 41):
        ...     watcher.look(
        ...         Moment(done, 1000, 0.4, 1e-3, 32 * done, 0.5 * done, averaged=presets.ldm)
        ...     )
        >>> told[0].split(":")[0][:40]
        'this budget will see about 32,000 images'
    """

    def __init__(self, of: int, size: int, tell: Callable[[str], None] = say) -> None:
        self.of, self.size, self.tell = whole("of", of), whole("size", size), tell
        self._first = 0
        self._since: tuple[int, float] | None = None
        self._said = False

    def begin(self, done: int) -> None:
        """A training that is continued has said it before."""
        self._said = done > 0

    def look(self, moment: Moment) -> None:
        """Measures the first steps, then says the line."""
        if self._said:
            return
        if moment.done == FIRST:
            self._since = (moment.done, moment.seconds)
        if moment.done >= FIRST + MEASURED_STEPS or moment.last:
            batch, speed = moment.images / moment.done, None
            if self._since is not None and moment.done > self._since[0]:
                steps, seconds = moment.done - self._since[0], moment.seconds - self._since[1]
                speed = batch * steps / max(seconds, 1e-9)
            self.tell(outlook(round(batch * moment.steps), self.of, self.size, speed=speed))
            self._said = True

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` returned."""


def rounded(number: int) -> int:
    """A number to two digits."""
    digits = max(0, math.floor(math.log10(max(1, number))) - 1)
    return round(number / 10**digits) * 10**digits


def _like(size: int, table: Sequence[Budget]) -> list[Budget]:
    """The rows of the nearest size, by images."""
    if not table:
        return []
    nearest = min((row.size for row in table), key=lambda s: abs(math.log(s / size)))
    return sorted((row for row in table if row.size == nearest), key=lambda row: row.images)
