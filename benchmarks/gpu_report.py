"""What `benchmarks/gpu.py` found: bounds beside what was measured, tables, csv, plots, the page."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from write_figures import replace

Results = dict[str, dict[str, dict[str, Any]]]
"""Stage -> unit -> what its file holds."""


def report(results: Results, folder: Path, docs: Path | None, about: dict[str, Any]) -> int:
    """Prints and writes everything there is; returns how many units failed."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = [
        (stage, name, str(unit["error"]).splitlines()[0][:160])
        for stage, units in results.items()
        for name, unit in units.items()
        if "error" in unit
    ]
    bounds = list(judged(results, about["small"]))
    parts = [f"Measured {about['date']} on {about['device']}, {versions(about)}."]
    parts += [table(("bound", "measured", "holds"), bounds)]
    parts += [f"### {title}\n\n{text}" for title, text in sections(results)]
    if failed:
        parts.append(table(("stage", "unit that failed", "why"), failed))
    text = "\n\n".join(parts)
    (folder / "report.md").write_text(text + "\n", "utf-8")
    whole = {"about": about, "bounds": bounds, "results": results}
    (folder / "gpu.json").write_text(json.dumps(whole, indent=1, default=str) + "\n", "utf-8")
    for stage, units in results.items():
        save_rows(folder / f"{stage}.csv", list(rows(units)))
    plots(results, folder)
    print(f"\n{table(('bound', 'measured', 'holds'), bounds)}\n")
    for stage, name, why in failed:
        print(f"failed: {stage}, {name}: {why}")
    print(f"report: {folder / 'report.md'}")
    if docs is not None:
        replace(docs, "gpu", text)
    return len(failed)


# --- bounds -------------------------------------------------------------------------------------


def judged(results: Results, small: bool) -> Iterator[tuple[str, str, str]]:
    """Each bound, what was measured (the worst), and whether it holds."""
    first = [r for r in rows(results.get("attention", {})) if r.get("path") == "fused"]
    forward = [r for r in first if r["direction"] == "forward"]
    both = [r for r in first if r["direction"] != "forward"]
    wide = [r for r in forward if r["shape"][1] >= 1024]

    def line(what: str, found: list[float], bound: float, most: bool, unit: str = "") -> Any:
        if not found:
            return what, "not measured", ""
        worst = max(found) if most else min(found)
        holds = worst <= bound if most else worst >= bound
        verdict = "toy sizes: says nothing" if small else "yes" if holds else "no"
        return what, f"{worst:.3g}{unit} (worst of {len(found)})", verdict

    def compiled(some: list[dict[str, Any]]) -> list[float]:
        found = []
        for row in some:
            times = [t for name, t in row["all_ms"].items() if name.startswith("compiled")]
            if times:
                found.append(min(times) / row["ms"])
        return found

    eager = "ratio_eager_default"
    yield line("attention forward ≥ 4 × eager default", [r[eager] for r in forward], 4, False)
    yield line("attention forward ≥ 2.5 × fastest compiled", compiled(forward), 2.5, False)
    yield line("attention forward + backward ≥ 2.5 × eager", [r[eager] for r in both], 2.5, False)
    yield line("the same ≥ 1.5 × fastest compiled", compiled(both), 1.5, False)
    share = [r["share_of_copy"] for r in wide]
    yield line("attention forward, N ≥ 1024: ≥ 0.70 of the copy bandwidth", share, 0.7, False)
    found = list(rows(results.get("search", {})))
    halves = [r["float16"] for r in found if "float16" in r]
    ms = [r["ms"] for r in halves]
    yield line("search: 20M rows of 512, 128 queries ≤ 8 ms (float16)", ms, 8, True, " ms")
    recall = [r[r["storage"]]["recall"] for r in found]
    yield line("search: recall 1.0", recall, 1.0, False)
    speed = images(results)
    for mode, bound in (("eager", 2.0), ("compile", 1.1), ("CUDA graphs", 1.1)):
        ratios = []
        for batch in sorted({batch for batch, _, _ in speed}):
            theirs = speed.get((batch, "diffusers", mode))
            mine = [s for (b, who, m), s in speed.items() if (b, who) == (batch, "retrodiff")
                    and (mode == "eager" or m == mode)]  # fmt: skip
            if theirs and mine:
                ratios.append(max(mine) / theirs)
        ours = "fastest of ours" if mode == "eager" else "ours"
        what = f"whole sampling ≥ {bound:g} × diffusers, {mode} ({ours})"
        yield line(what, ratios, bound, False)
    tested = [r for r in rows(results.get("tests", {})) if "passed" in r]
    broken = sum("error" in unit for unit in results.get("tests", {}).values())
    if tested or broken:
        passed = sum(r["passed"] for r in tested)
        yield "pytest -m gpu passes", f"{passed} passed, {broken} files failed", _yes(not broken)
    checks = [r["holds"] for r in rows(results.get("kernels", {})) if "holds" in r]
    told = f"{sum(checks)} of {len(checks)}" if checks else "not measured"
    yield "kernels against float64", told, _yes(all(checks)) if checks else ""


def images(results: Results) -> dict[tuple[int, str, str], float]:
    """Images per second by batch, library and mode."""
    return {
        (row["batch"], row["library"], row["mode"]): row["images_per_s"]
        for found in rows(results.get("throughput", {}))
        for row in found["rows"]
    }


# --- tables -------------------------------------------------------------------------------------


def sections(results: Results) -> Iterator[tuple[str, str]]:
    """A title and a table for each stage that has something to show."""
    attention = [r for s in ("attention", "attention-more") for r in rows(results.get(s, {}))]
    if attention:
        head = ("preset", "batch, N, C, head width", "k", "type", "direction", "path", "ours, ms",
                "over eager default", "fastest opponent, ms", "over it", "of the copy",
                "error (of the plain block)")  # fmt: skip
        lines = [
            (r["preset"], ", ".join(map(str, r["shape"])), r["k"], r["dtype"], r["direction"],
             r["path"], f"{r['ms']:.3f}", f"{r['ratio_eager_default']:.2f}",
             f"{r['opponent_ms']:.3f} ({r['opponent']})", f"{r['ratio']:.2f}",
             f"{r['share_of_copy']:.0%}", f"{r['error']:.1e} ({r['error_of_plain']:.1e})")
            for r in attention
        ]  # fmt: skip
        yield "Neighbor attention", table(head, lines)
    if network := list(rows(results.get("network", {}))):
        head = ("k", "standard, ms", "ours, ms", "without attention, ms", "speedup", "its limit")
        lines = [
            (r["k"], f"{r['standard ms']:.2f}", f"{r['ours ms']:.2f}", f"{r['without ms']:.2f}",
             f"{r['speedup']:.3f}", f"{r['amdahl_limit']:.3f}")
            for r in network
        ]  # fmt: skip
        yield "A guided step of the UNet of rdm_imagenet, by attention", table(head, lines)
    if search := list(rows(results.get("search", {}))):
        head = ("rows", "queries", "storage", "median ms", "worst ms", "recall", "of the read")
        lines = []
        for r in search:
            one = r[r["storage"]]
            share = f"{one['share_of_read']:.0%}" if "share_of_read" in one else ""
            lines.append((f"{r['rows']:,}", r["queries"], r["storage"], f"{one['ms']:.2f}",
                          f"{one['worst_ms']:.2f}", f"{one['recall']:.4f}", share))  # fmt: skip
        yield "Exact search", table(head, lines)
    if speed := images(results):
        head = ("batch", "library", "mode", "images / s")
        lines = [(*key, f"{value:.3f}") for key, value in sorted(speed.items())]
        yield "Whole images, 50 steps of DDIM under guidance", table(head, lines)
    if unet := list(rows(results.get("unet", {}))):
        head = ("batch", "variant", "ms")
        lines = [
            (r["batch"], name, f"{1e3 * s:.2f}") for r in unet for name, s in r["seconds"].items()
        ]
        yield "One guided step", table(head, lines)
    if rarm := [row for r in rows(results.get("rarm", {})) for row in r["rows"]]:
        head = ("batch", "with a cache, s", "without, s", "times faster")
        lines = [
            (r["batch"], f"{r['seconds_cached']:.2f}", f"{r['seconds_uncached']:.2f}",
             f"{r['times_faster']:.1f}")
            for r in rarm
        ]  # fmt: skip
        yield "Autoregressive transformer, 256 codes", table(head, lines)
    if tuned := list(rows(results.get("tune", {}))):
        head = ("kernel", "width", "heads", "k", "positions up to", "tuned, µs", "by rule, µs")
        lines = [
            (r["kernel"], r["width"], r["heads"], r["k"], r["size"], f"{1e6 * r['seconds']:.1f}",
             f"{1e6 * r['seconds_by_rule']:.1f}")
            for r in tuned
        ]  # fmt: skip
        yield "Launch sizes", table(head, lines)
    checks = [
        {"check": name, **unit["result"]}
        for name, unit in results.get("kernels", {}).items()
        if isinstance(unit.get("result"), dict)
    ]
    if checks:
        head = ("check", "error of what is allowed", "holds")
        lines = []
        for r in checks:
            share = r.get("of_allowed")
            if share is None and "allowed" in r:
                share = r["error"] / r["allowed"]
            told = f"{share:.2f}" if share is not None else r.get("left_out", "")
            if "first_ms" in r:
                told = f"{r['first_ms']:.2f} ms with the check, {r['next_ms']:.2f} ms after it"
            lines.append((r["check"], told, _yes(r["holds"]) if "holds" in r else ""))
        yield "Kernels against float64", table(head, lines)


def table(head: tuple[str, ...], lines: list[Any]) -> str:
    """A table of Markdown."""
    cells = [head, ("---",) * len(head), *lines]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells
    )


def versions(about: dict[str, Any]) -> str:
    known = about["versions"]
    told = [f"{name} {known[name]}" for name in known]
    return ", ".join([*told, f"CUDA {about['cuda']}"] if about["cuda"] else told)


def rows(units: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The results of a stage that did not fail, one after the other."""
    for unit in units.values():
        found = unit.get("result")
        yield from (found if isinstance(found, list) else [found] if found else [])


def save_rows(path: Path, found: list[dict[str, Any]]) -> None:
    """Rows as csv, nested values as JSON."""
    if not found:
        return
    names = list(dict.fromkeys(name for row in found for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in found:
            writer.writerow(
                {k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in row.items()}
            )


# --- plots --------------------------------------------------------------------------------------


def plots(results: Results, folder: Path) -> None:
    """The roofline of attention, and images per second; nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return
    machine = results.get("machine", {}).get("machine", {}).get("result")
    attention = list(rows(results.get("attention", {})))
    if attention and machine:
        from neighbor_attention import write

        about = {key: machine[key] for key in ("device", "date")}
        write(attention, folder, about, machine["copy"], machine["peaks"])
    if speed := images(results):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 0.5 + 0.35 * len(speed)))
        names = [f"{who}, {mode}, batch {batch}" for batch, who, mode in sorted(speed)]
        colors = ["tab:blue" if who == "retrodiff" else "0.6" for _, who, _ in sorted(speed)]
        axes.barh(names, [speed[key] for key in sorted(speed)], color=colors)
        axes.invert_yaxis()
        axes.set(xlabel="images per second")
        figure.tight_layout()
        figure.savefig(folder / "throughput.png", dpi=120)
        plt.close(figure)


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
