"""The record of a training in a folder: a table, curves, TensorBoard events, and lines to read."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from retrodiff.disk.files import atomic_write, place
from retrodiff.numbers import whole
from retrodiff.progress import say
from retrodiff.training.curves import Curve, Panel, draw_curves
from retrodiff.training.grids import Grids
from retrodiff.training.held_out import Held, HeldOut
from retrodiff.training.run_folder import CURVES, EVENTS, METRICS, begin_run, mark_run
from retrodiff.training.watching import Moment, forgiving

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS = 1000
"""Rows of the table, about, where no distance is given."""
SMOOTH = 0.98
"""Of the smoothed training loss: an exponential average over about 50 steps."""
SILENCE = 30.0
"""Seconds after which a line is printed where no measurement gives a reason to."""

NUMBERS = ("step", "images", "seconds", "images_per_second", "lr", "loss", "loss_smoothed")
MEASURED = ("held_out", "trained")


class Log:
    """Keeps ``metrics.csv`` and ``curves.png``, TensorBoard events, and prints a line now and then.

    The table has a row for about every thousandth part of the training and for every held-out
    measurement. Every row is written when it is known; after an interruption the file is rewritten
    up to the checkpoint, so that no step is there twice and none is missing.

    Columns: ``step``; ``images`` seen; ``seconds`` of training over all sittings;
    ``images_per_second`` since the row before; ``lr``; ``loss`` of the step; ``loss_smoothed``;
    ``held_out`` and ``trained``, see `HeldOut`; ``held_out_1`` and so on, by noise level, least
    noise first. ``run.json`` has the noise levels.

    Args:
        folder: of the run; made when the training begins.
        held_out: whose measurements are recorded; list it before the log in ``watch=``.
        grids: whose pictures TensorBoard shows, too; list them before the log as well.
        every: steps between rows; None: a thousandth of all steps.
        tensorboard: write events into ``events``; None: where tensorboard is installed, which the
            extra ``retrodiff[train]`` brings.
        about: further entries of ``run.json``.
        lines: print lines to standard error.

    Raises:
        ModuleNotFoundError: TensorBoard was asked for and is not installed.

    Examples:
        >>> import torch
        >>> from retrodiff import presets
        >>> from retrodiff.training import Log, TrainingSet, fit
        >>> data = TrainingSet.alone(torch.rand(16, 1, 8, 8) * 2 - 1)
        >>> options = {"steps": 2, "batch_size": 8, "lr": 1e-3, "progress": False}
        >>> log = Log("run", tensorboard=False, lines=False)
        >>> result = fit(presets.ldm(), data, watch=[log], **options)
        >>> from pathlib import Path
        >>> Path("run/metrics.csv").read_text().splitlines()[0].split(",")[:3]
        ['step', 'images', 'seconds']
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        held_out: HeldOut | None = None,
        grids: Grids | None = None,
        every: int | None = None,
        tensorboard: bool | None = None,
        about: Mapping[str, Any] | None = None,
        lines: bool = True,
    ) -> None:
        self.folder = place(folder)
        self.held_out, self.grids = held_out, grids
        self.every = None if every is None else whole("every", every)
        there = importlib.util.find_spec("tensorboard") is not None
        if tensorboard and not there:
            raise ModuleNotFoundError(
                "tensorboard is not installed: pip install 'retrodiff[train]', or tensorboard=False"
            )
        self.tensorboard = there if tensorboard is None else tensorboard
        self.about, self.lines = dict(about or {}), lines
        self.rows: list[dict[str, float]] = []
        """All rows so far, by column; what a row lacks was not measured then."""
        self._before = 0.0  # seconds of earlier sittings
        self._smooth, self._weight = 0.0, 0.0
        self._writer: Any = None
        self._first = 0  # steps of earlier sittings
        self._row_at = self._line_at = (0, 0.0)  # step and seconds of the last row, the last line
        self._seen = 0  # measurements that have their row

    def begin(self, done: int) -> None:
        """Makes the folder, and the table up to the steps that are done."""
        begin_run(self.folder, self.about, done)
        self._before = self.rows[-1]["seconds"] if self.rows else 0.0
        self._first, self._row_at, self._line_at = done, (done, 0.0), (done, 0.0)
        self._seen = 0 if self.held_out is None else len(self.held_out.history)
        self._write_table()
        if self.tensorboard:
            self._writer = _writer(self.folder / EVENTS, done)

    def look(self, moment: Moment) -> None:
        """Takes a step down."""
        self._smooth = SMOOTH * self._smooth + (1 - SMOOTH) * moment.loss
        self._weight = SMOOTH * self._weight + (1 - SMOOTH)
        held = self._new_measurement()
        every = self.every or max(1, moment.steps // ROWS)
        if held is not None or moment.done % every == 0 or moment.last or moment.done == 1:
            self._add_row(moment, held)
        if held is not None or moment.last or moment.seconds - self._line_at[1] > SILENCE:
            self._tell(moment, held)
        if moment.last:
            self._end()

    def state(self) -> dict[str, Tensor]:
        """The table by columns, and the smoothed loss."""
        columns = {
            f"column.{name}": torch.tensor(
                [row.get(name, math.nan) for row in self.rows], dtype=torch.float64
            )
            for name in self._columns()
        }
        smooth = torch.tensor([self._smooth, self._weight], dtype=torch.float64)
        return {**columns, "smooth": smooth}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` returned."""
        columns = {
            name.removeprefix("column."): values.tolist()
            for name, values in state.items()
            if name.startswith("column.")
        }
        count = len(columns.get("step", []))
        self.rows = [
            {name: values[i] for name, values in columns.items() if not math.isnan(values[i])}
            for i in range(count)
        ]
        if "smooth" in state:
            self._smooth, self._weight = state["smooth"].tolist()

    @property
    def smoothed(self) -> float:
        """The training loss, averaged over the last steps."""
        return self._smooth / self._weight if self._weight else math.nan

    def _columns(self) -> list[str]:
        levels = 0 if self.held_out is None else self.held_out.levels
        return [*NUMBERS, *MEASURED, *(f"held_out_{i + 1}" for i in range(levels))]

    def _new_measurement(self) -> Held | None:
        if self.held_out is None or len(self.held_out.history) <= self._seen:
            return None
        self._seen = len(self.held_out.history)
        return self.held_out.history[-1]

    def _add_row(self, moment: Moment, held: Held | None) -> None:
        row = {
            "step": moment.done,
            "images": moment.images,
            "seconds": self._before + moment.seconds,
            "images_per_second": _speed(moment, self._row_at),
            "lr": moment.lr,
            "loss": moment.loss,
            "loss_smoothed": self.smoothed,
        }
        if held is not None:
            row["held_out"] = held.loss
            row |= {f"held_out_{i + 1}": loss for i, loss in enumerate(held.by_level)}
            if held.trained is not None:
                row["trained"] = held.trained
        self._row_at = (moment.done, moment.seconds)
        self.rows.append(row)
        file = self.folder / METRICS
        with forgiving(str(file)), file.open("a", encoding="utf-8", newline="") as out:
            out.write(self._line(row))
        if self._writer is not None:
            with forgiving(str(self.folder / EVENTS)):
                for name, value in row.items():
                    if name not in ("step", "images", "seconds"):
                        self._writer.add_scalar(_tag(name), value, moment.done)

    def _write_table(self) -> None:
        """The whole table; the file appears whole or not at all."""
        file = self.folder / METRICS
        with forgiving(str(file)), atomic_write(file) as partial:
            text = ",".join(self._columns()) + "\n" + "".join(map(self._line, self.rows))
            partial.write_text(text, encoding="utf-8", newline="")

    def _line(self, row: Mapping[str, float]) -> str:
        out = io.StringIO()
        cells = [_cell(name, row[name]) if name in row else "" for name in self._columns()]
        csv.writer(out, lineterminator="\n").writerow(cells)
        return out.getvalue()

    def _tell(self, moment: Moment, held: Held | None) -> None:
        """Prints a line, and draws the curves."""
        if self.lines:
            say(self._words(moment, held))
        self._line_at = (moment.done, moment.seconds)
        file = self.folder / CURVES
        with forgiving(str(file)), atomic_write(file) as partial:
            self.curves().save(partial, format="PNG")
        if self._writer is not None:
            with forgiving(str(self.folder / EVENTS)):
                if self.grids is not None and self.grids.latest is not None:
                    done, picture = self.grids.latest
                    pixels = np.asarray(picture.convert("RGB"))
                    self._writer.add_image("samples", pixels, done, dataformats="HWC")
                self._writer.flush()

    def _words(self, moment: Moment, held: Held | None) -> str:
        """What a line says."""
        said = [f"loss {self.smoothed:.4f}"]
        if held is not None and self.held_out is not None:
            least = " (the least so far)" if self.held_out.best is held else ""
            said.append(f"held-out {held.loss:.4f}{least}")
        if held is not None and held.trained is not None:
            said.append(f"training images measured alike {held.trained:.4f}")
        speed = _speed(moment, self._line_at)
        said.append(f"{speed:,.0f} images/s" if speed >= 10 else f"{speed:.1f} images/s")
        if not moment.last:
            each = moment.seconds / (moment.done - self._first)
            said.append(f"{duration((moment.steps - moment.done) * each)} left")
        return f"step {moment.done:,} of {moment.steps:,}: {', '.join(said)}"

    def curves(self) -> Image:
        """The losses so far: training and held-out, then the held-out loss by noise level."""
        best = None if self.held_out is None else self.held_out.best
        smoothed = Curve("training, smoothed", self._points("loss_smoothed"), "#9db4c8")
        trained = Curve("training, measured alike", self._points("trained"), "#1f77b4", True)
        held_out = Curve("held-out", self._points("held_out"), "#d62728", True)
        title = "Loss" if best is None else "Loss (dashed line: the least held-out loss)"
        mark = None if best is None else best.done
        ends = (self.rows[0]["step"], self.rows[-1]["step"]) if self.rows else None
        losses = Panel(title, [smoothed, trained, held_out], mark=mark, ends=ends)
        sigmas = () if self.held_out is None else self.held_out.sigmas
        by_level = [
            Curve(
                f"noise {sigma:.3g}",
                self._points(f"held_out_{i}"),
                _shade(i, len(sigmas)),
                marked=True,
            )
            for i, sigma in enumerate(sigmas, 1)
        ]
        return draw_curves([losses, Panel("Held-out loss by noise level", by_level, ends=ends)])

    def _points(self, name: str) -> list[tuple[float, float]]:
        return [(row["step"], row[name]) for row in self.rows if name in row]

    def _end(self) -> None:
        """Closes what is open, and marks the run as finished."""
        if self.held_out is not None:
            self.about["noise_levels"] = list(self.held_out.sigmas)
            if (best := self.held_out.best) is not None:
                self.about["least_held_out"] = {"step": best.done, "loss": best.loss}
        with forgiving(str(self.folder)):
            mark_run(self.folder, self.about, finished=True)
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def duration(seconds: float) -> str:
    """A time in words of two digits or so, such as ``4 min`` or ``1 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 1440 else f"{minutes / 60:.0f} h"


def _speed(moment: Moment, since: tuple[int, float]) -> float:
    """Images per second since a step and its time."""
    steps, seconds = moment.done - since[0], moment.seconds - since[1]
    return moment.images / moment.done * steps / max(seconds, 1e-9)


def _cell(name: str, value: float) -> str:
    whole_number = name in ("step", "images")
    return str(int(value)) if whole_number else f"{value:.6g}"


def _tag(name: str) -> str:
    """Where TensorBoard shows a column."""
    if name.startswith("held_out_"):
        return f"held_out_by_noise/{name.removeprefix('held_out_')}"
    loss = name.startswith("loss") or name in MEASURED
    return f"loss/{name.removeprefix('loss_')}" if loss else name


def _shade(i: int, n: int) -> str:
    """Color i of n, from yellow, least noise, to violet."""
    share = (i - 1) / max(1, n - 1)
    ends = ((0xE8, 0xB8, 0x2A), (0xC4, 0x4E, 0x52), (0x3B, 0x1F, 0x7A))
    at = min(int(share * 2), 1)
    mixed = (
        round(a + (b - a) * (share * 2 - at)) for a, b in zip(ends[at], ends[at + 1], strict=True)
    )
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _writer(folder: Path, done: int) -> Any:
    """A TensorBoard writer; events of later steps, left by an interrupted sitting, are hidden."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=done + 1 if done else None)
