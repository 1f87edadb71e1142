"""Draws a study from the rows of its csv: axes with units, N, and an error bar at every point."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studies import Line, Panel, Study

from retrodiff.disk.files import atomic_write

Rows = Sequence[Mapping[str, Any]]
COLORS = ("#0b6e99", "#d1495b", "#7a9e3f", "#8d6cab", "#e2a03f")


def draw(study: Study, rows: Rows, file: Path) -> bool:
    """A picture of all panels that have numbers; False: there are none yet."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    panels = [panel for panel in study.panels if _lines(study, panel, rows)]
    if not panels:
        return False
    across = 2 if len(panels) == 4 else min(3, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(4.3 * across, 3.6 * down + 1.0), squeeze=False, layout="constrained"
    )
    for spare in axes.flat[len(panels) :]:
        spare.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        _panel(axis, study, panel, rows)
    figure.suptitle(f"{study.title}\n{_numbers(rows)}", fontsize=10)
    with atomic_write(file) as partial:
        figure.savefig(partial, format="png", dpi=90)
    plt.close(figure)
    return True


def draw_text(title: str, rows: Rows, file: Path) -> bool:
    """The digits' bars: sets of classes by mode."""
    if not rows:
        return False
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    modes = list(dict.fromkeys(str(row["at"]) for row in rows))
    sets = list(dict.fromkeys(str(row["line"]) for row in rows))
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for i, mode in enumerate(modes):
        own_rows = [[r for r in rows if r["line"] == s and r["at"] == mode] for s in sets]
        values = [[r["share"] for r in own] for own in own_rows]
        means = [statistics.fmean(v) for v in values]
        spread = [error_of("share", own) for own in own_rows]
        places = [at + 0.26 * (i - 1) for at in range(len(sets))]
        axis.bar(places, means, 0.24, yerr=spread, capsize=3, color=COLORS[i], label=mode)
        for place, own in zip(places, values, strict=True):
            axis.plot([place] * len(own), own, ".", color="black", markersize=4)
    many = [sorted({int(r["n"]) for r in rows if r["line"] == s}) for s in sets]
    axis.set_xticks(
        range(len(sets)), [f"{s}\nn = {own[0]}" for s, own in zip(sets, many, strict=True)]
    )
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("samples judged the asked digit (share)")
    axis.legend(fontsize=8, frameon=False)
    seeds = len({row["seed"] for row in rows})
    n = sorted({int(row["n"]) for row in rows})
    figure.suptitle(
        f"{title}\n{' or '.join(map(str, n))} samples per bar and training; {seeds} training(s), "
        "each a dot\nlines: one standard error of sampling and the deviation between trainings",
        fontsize=10,
    )
    with atomic_write(file) as partial:
        figure.savefig(partial, format="png", dpi=90)
    plt.close(figure)
    return True


def _numbers(rows: Rows) -> str:
    n = sorted({int(row["n"]) for row in rows})
    against = sorted({int(row["reference_n"]) for row in rows})
    return (
        f"{' or '.join(f'{x:,}' for x in n)} samples against "
        f"{' or '.join(f'{x:,}' for x in against)} held-out photographs per point; bars: one "
        "standard error of sampling\nand, where there are several, the deviation between "
        "trainings (small dots: each training)"
    )


def _lines(study: Study, panel: Panel, rows: Rows) -> list[Line]:
    """Lines of a panel that have a number."""
    wanted = [line for line in study.lines if not panel.lines or line.label in panel.lines]
    return [
        line for line in wanted if any(r["line"] == line.label and panel.y[0] in r for r in rows)
    ]


def _panel(axis: Any, study: Study, panel: Panel, rows: Rows) -> None:
    lines = _lines(study, panel, rows)
    width = 0.8 / len(lines)
    ticks: dict[str, float] = {}
    for i, line in enumerate(lines):
        color, label = COLORS[i % len(COLORS)], line.label
        places: list[float] = []
        means: list[float] = []
        errors: list[float] = []
        names = list(dict.fromkeys(_place(panel, row) for row in rows if row["line"] == label))
        for name in names:
            own = [r for r in rows if r["line"] == label and _place(panel, r) == name]
            own = [r for r in own if panel.y[0] in r]
            if not own:
                continue
            values = [float(r[panel.y[0]]) for r in own]
            if panel.bars:
                ticks.setdefault(str(name), len(ticks))
                place = ticks[str(name)] + (i - (len(lines) - 1) / 2) * width
            elif panel.column:
                place = statistics.fmean(float(r[panel.column]) for r in own) / panel.divided
            else:
                place = float(name)
            places.append(place)
            means.append(statistics.fmean(values))
            errors.append(error_of(panel.y[0], own))
            if len(values) > 1:
                axis.plot([place] * len(values), values, ".", color="black", markersize=4, zorder=3)
        if _is_share(panel):
            axis.bar(places, means, width * 0.92, yerr=errors, capsize=3, color=color, label=label)
        elif panel.bars:
            axis.errorbar(places, means, errors, fmt="o", capsize=3, color=color, label=label)
        else:
            order = sorted(range(len(places)), key=places.__getitem__)
            places, means, errors = ([v[j] for j in order] for v in (places, means, errors))
            axis.errorbar(places, means, errors, marker="o", markersize=4, capsize=3,
                          color=color, label=label)  # fmt: skip
    if panel.bars:
        narrow = max(8, 44 // len(ticks))  # letters that fit side by side
        axis.set_xticks(list(ticks.values()), [textwrap.fill(name, narrow) for name in ticks])
    if panel.logarithmic:
        axis.set_xscale("log")
        shown = sorted({float(_place(panel, r)) for r in rows
                        if any(r["line"] == line.label for line in lines)})  # fmt: skip
        axis.set_xticks(shown, [f"{x:g}" for x in shown])
        axis.minorticks_off()
    if not panel.bars:
        axis.set_xlim(left=None if panel.logarithmic else min(0, axis.get_xlim()[0]))
    low, _ = axis.get_ylim()
    if panel.bars and not _is_share(panel):
        axis.set_xlim(-0.6, len(ticks) - 0.4)
    if _is_share(panel) and low >= 0:
        axis.set_ylim(bottom=0)
    _anchors(axis, panel, rows)
    axis.tick_params(labelsize=8)
    axis.set_xlabel(panel.x, fontsize=9)
    axis.set_ylabel(panel.y[1], fontsize=9)
    if len(lines) > 1:
        axis.legend(fontsize=7, frameon=False)


def _is_share(panel: Panel) -> bool:
    """Whether zero belongs to the picture, so that bars are honest."""
    return panel.bars and panel.y[0].startswith(("share", "near"))


def _anchors(axis: Any, panel: Panel, rows: Rows) -> None:
    """Real pictures: lines where they lie within the axis, words above it where they do not."""
    low, high = axis.get_ylim()
    outside: list[str] = []
    anchors = [r for r in rows if r["line"] == "anchor" and panel.y[0] in r]
    for side, row in zip((0.01, 0.99), anchors, strict=False):  # the two names lie apart
        value, name = float(row[panel.y[0]]), str(row["at"])
        if not low <= value <= high:
            outside.append(f"{name}: {value:,.0f}" if value >= 100 else f"{name}: {value:.2f}")
            continue
        axis.axhline(value, color="gray", linestyle=":", linewidth=1)
        axis.annotate(name, (side, value), fontsize=6, color="gray",
                      xycoords=("axes fraction", "data"), ha="left" if side < 0.5 else "right",
                      va="bottom")  # fmt: skip
    if outside:
        axis.set_title(f"outside: {'; '.join(outside)}", fontsize=7, color="gray")


def _place(panel: Panel, row: Mapping[str, Any]) -> Any:
    """What rows of one place share: the value on x, or width and steps of the training."""
    if panel.column:
        return row.get("parameters"), row.get("steps")
    return row.get("at", "")


def error_of(column: str, rows: Rows) -> float:
    """Standard error of sampling, together with the deviation between trainings (one row each)."""
    values = [float(row[column]) for row in rows]
    own = [float(row.get(f"{column}_error", _binomial(column, row))) for row in rows]
    between = statistics.variance(values) if len(values) > 1 else 0.0
    return (statistics.fmean(e**2 for e in own) + between) ** 0.5


def _binomial(column: str, row: Mapping[str, Any]) -> float:
    """Of a share of n samples; 0 for what is none."""
    share = float(row[column])
    if not (column.startswith(("share", "near")) and 0 <= share <= 1):
        return 0.0
    return (share * (1 - share) / float(row["n"])) ** 0.5
