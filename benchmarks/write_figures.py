"""Writes the demo's figures into README.md and docs/benchmarks.md, from its report.

    make demo && python benchmarks/write_figures.py runs/demo

Also copies the demo's picture and film into the documentation. Run `benchmarks/demo_seeds.py` first
to have the worst of three seeds beside the demo's own.
"""

import argparse
import json
import re
import shutil
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODES = {
    "text_neighbors": ("text + k−1 neighbors", "≥ 0.95"),
    "neighbors": ("k neighbors of the text", "≥ 0.95"),
    "class": ("class-conditional", "≥ 0.95"),
    "text": ("text only", "≥ 0.92"),
    "image": ("image query", ""),
}


def rows(report: dict[str, Any], worst: dict[str, float] | None) -> list[tuple[str, str, str]]:
    """What was measured, how much, and the bound."""
    swap, gap, copying = report["swap"], report["loss_gap"], report["copying"]
    unseen, half = report["unseen"], report["accuracy_at_half_the_steps"]
    n, scale = report["n_per_mode"], report["guidance"]
    table = [
        (
            "whole demo after installation",
            f"{report['seconds'] / 60:.1f} minutes, peak {report['peak_rss_mb'] / 1000:.2f} GB",
            "≤ 6 minutes, ≤ 2 GB",
        ),
        (
            f"its pictograms: {report['pictograms']['images']} images in samples.png, the film and "
            "attribution, no training",
            f"{report['pictograms']['seconds']:.0f} s",
            "≤ 60 s",
        ),
    ]
    for mode, (name, bound) in MODES.items():
        value = f"{report['accuracy'][mode]:.3f}"
        if worst is not None:
            value += f"; worst of three seeds {worst[f'accuracy.{mode}']:.3f}"
        if mode in half:
            value += f"; half the steps {half[mode]:.3f}"
        # Image queries are all held-out scans of trained digits, however many the split has.
        count = "all held-out scans" if mode == "image" else f"n = {n}"
        table.append((f"digits, asked class: {name} ({count}, guidance {scale})", value, bound))
    drawn = swap["share_of_draws_before"]
    table += [
        ("the judge on real images (the ceiling)", f"{report['judge_on_real_x']:.3f}", ""),
        (
            "database swapped to 0–4: unconditional samples in 0–4",
            f"{swap['share_allowed']:.3f}",
            "≥ 0.90",
        ),
        (
            "before the swap, against the share of the drawn rows",
            f"{swap['share_before']:.3f} against {drawn:.3f}",
            "within 0.10",
        ),
        (
            "digits never trained on, not in D / in D: k neighbors",
            f"{unseen['before_they_are_in_D']['neighbors']:.2f} / "
            f"{unseen['after']['neighbors']:.2f}",
            "none",
        ),
        (
            "the same: text + k−1 neighbors",
            f"{unseen['before_they_are_in_D']['text_neighbors']:.2f} / "
            f"{unseen['after']['text_neighbors']:.2f}",
            "none",
        ),
        (
            "the same: text only",
            f"{unseen['before_they_are_in_D']['text']:.2f} / {unseen['after']['text']:.2f}",
            "none",
        ),
        (
            "samples that duplicate a row of D or X, against real held-out images",
            f"{copying['share']:.3f} against {copying['share_of_real']:.3f}",
            "not above",
        ),
        (
            "held-out loss, shuffled neighbors minus right ones",
            f"{gap['ratio']:+.1%} of the loss, {gap['standard_errors']:.0f} standard errors",
            "≥ 3 standard errors",
        ),
        (
            "diversity within a class against real images: text + k−1",
            f"{report['diversity']['text_neighbors']['ratio']:.2f}",
            "",
        ),
    ]
    return table


def markdown(report: dict[str, Any], worst: dict[str, float] | None) -> str:
    """The table with what it was measured on."""
    lines = ["| what | measured | bound |", "|---|---|---|"]
    lines += [f"| {what} | {value} | {bound} |" for what, value, bound in rows(report, worst)]
    versions = report["versions"]
    lines.append("")
    lines.append(
        f"Measured {date.today()} by `make demo` (seed {report['seed']}), {report['threads']} CPU "
        f"cores, no GPU, torch {versions['torch']}."
    )
    return "\n".join(lines)


def replace(path: Path, name: str, text: str) -> None:
    """Puts text between the markers of a page."""
    page = path.read_text()
    pattern = rf"(<!-- figures:{name} -->\n).*?(<!-- /figures -->)"
    new, count = re.subn(pattern, lambda m: f"{m[1]}\n{text}\n\n{m[2]}", page, flags=re.S)
    if count != 1:
        raise ValueError(f"{path} has {count} places for the figures of {name}, not one")
    path.write_text(new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=Path, default=ROOT / "runs" / "demo_seeds.json")
    options = parser.parse_args()
    report = json.loads((options.demo / "report.json").read_text())
    worst = json.loads(options.seeds.read_text())["worst"] if options.seeds.is_file() else None
    for page in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
        replace(page, "demo", markdown(report, worst))
    for name in ("samples.png", "demo.gif"):
        shutil.copy(options.demo / name, ROOT / "docs" / "images" / name)


if __name__ == "__main__":
    main()
