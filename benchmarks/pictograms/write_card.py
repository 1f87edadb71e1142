"""Writes the figures of the pictogram model into its card and into docs/benchmarks.md.

    python benchmarks/pictograms/write_card.py

Reads what encoder.py, first_stage.py and figures.py wrote, of the whole training and of its first
725,000 pictures where they are there (half_figures), and copies the pictures of figures.py beside
the card.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "packages" / "pictograms"
MODES = {
    "text": "the prompt alone",
    "neighbors": "4 neighbors",
    "text+neighbors": "the prompt and 3 neighbors",
}
TRIP = "the first stage's round trip"
STYLES = {"noto": "Noto", "fluent": "Fluent", "twemoji": "Twemoji", "openmoji": "OpenMoji"}


def main() -> None:
    """Reads, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "pictograms")
    options = parser.parse_args()
    whole = read(options.data / "figures" / "figures.json")
    half = read(options.data / "half_figures" / "figures.json")
    encoder, first_stage = (read(options.data / f"{n}.json") for n in ("encoder", "sharp"))
    assert whole is not None
    assert encoder is not None
    assert first_stage is not None
    text = "\n".join([*table(rows(whole, half, encoder, first_stage)), "", measured(whole)])
    for page in (PACKAGE / "MODEL_CARD.md", ROOT / "docs" / "benchmarks.md"):
        replace(page, text)
    for name in ("best_and_worst.png", "copies.png"):
        shutil.copy(options.data / "figures" / name, PACKAGE / "images" / name)


def read(file: Path) -> dict[str, Any] | None:
    """A JSON file, if it is there."""
    return json.loads(file.read_text()) if file.exists() else None


def rows(
    whole: dict[str, Any],
    half: dict[str, Any] | None,
    encoder: dict[str, Any],
    first_stage: dict[str, Any],
) -> list[tuple[str, str, str]]:
    """What was measured, how much, and the bound."""
    found: list[tuple[str, str, str]] = []
    concepts = whole["concept among the top 5"]
    for mode, name in MODES.items():
        value = share(concepts[mode])
        if half is not None:
            value += (
                f"; after 725,000 pictures {half['concept among the top 5'][mode]['share']:.2f}"
            )
        bound = "≥ 0.60" if mode == "text+neighbors" else ""
        found.append((f"trained concepts, asked one in the judge's top 5: {name}", value, bound))
    for name in ("real pictures", TRIP):
        found.append((f"the same judge on {name}", share(concepts[name]), "(ceiling)"))
    styles = whole["style of the database"]
    n = styles["n per style"]
    for style, name in STYLES.items():
        both = ", ".join(
            f"{MODES[m]} {styles[m][style]:.2f}" for m in ("text+neighbors", "neighbors")
        )
        both += f"; real pictures {styles['real pictures'][style]:.2f}"
        both += f", their round trip {styles[TRIP][style]:.2f}"
        bound = "≥ 0.90" if style != "openmoji" else "never trained on"
        what = f"looks like {name}, the database's style (n = {n})"
        found.append((what, both, bound))
    scales = {k: v for k, v in whole["guidance"].items() if k != "n"}
    found.append(
        (
            f"guidance {', '.join(scales)}: asked concept in the top 5, the database's style (one "
            f"seed, n = {whole['guidance']['n']})",
            "; ".join(
                ", ".join(f"{v[what]:.2f}" for v in scales.values())
                for what in ("concept among the top 5", "style")
            ),
            "",
        )
    )
    unseen = whole["unseen concepts, top 5"]
    for mode, name, bound in (
        ("neighbors", "neighbors of the title", "≥ 3 times"),
        ("image", "neighbors of its picture in another style", "≥ 3 times"),
        ("itself", "neighbors of the picture that comes into D", "(what the network alone can do)"),
    ):
        before, after = unseen[f"before, {mode}"], unseen[f"after, {mode}"]
        times = after["share"] / before["share"] if before["share"] else float("inf")
        found.append(
            (
                f"unseen concepts, top 5: {name} (n = {before['n']}; real pictures "
                f"{unseen['real pictures']['share']:.2f})",
                f"before they are in D {before['share']:.3f}, after {after['share']:.3f}: "
                f"{times:.1f} times",
                bound,
            )
        )
    for mode, name in MODES.items():
        one = whole["copying"][mode]
        found.append(
            (
                f"near-duplicates of D and X: {name} (n = {one['n']})",
                f"{one['share']:.3f} against {one['real held-out pictures']:.3f} of real held-out "
                f"pictures: {one['excess']:+.3f}",
                "≤ 0.05 above",
            )
        )
    fidelity = whole["against held-out pictures"]
    for name in (*MODES, "real pictures"):
        one = fidelity[name]
        value = f"MIND {one['MIND']:.4f}, KID {one['KID']:.4f}"
        if half is not None and name != "real pictures":
            before = half["against held-out pictures"][name]
            value += f"; after 725,000 pictures {before['MIND']:.4f}, {before['KID']:.4f}"
        what = MODES.get(name, "real pictures of the trained concepts")
        found.append((f"distance to held-out pictures: {what} (n = {one['n']})", value, "falling"))
    found.append(
        (
            f"16 pictures, {whole['steps']} steps, {whole['threads']} CPU thread(s)",
            f"{whole['seconds for 16 pictures']:.1f} s",
            "≤ 10 s",
        )
    )
    recall = encoder["held-out titles -> held-out pictures, three styles"]
    there = encoder["database titles -> all pictures, three styles"]
    at = ("recall@1", "recall@5", "recall@20")
    found += [
        (
            f"encoder: {recall['titles']} unseen titles to {recall['pictures']} unseen pictures",
            ", ".join(f"{k} {recall[k]:.2f}" for k in at) + f" (chance@5 {recall['chance@5']:.2f})",
            "",
        ),
        (
            f"encoder: {there['titles']} titles of D to all {there['pictures']:,} pictures",
            ", ".join(f"{k} {there[k]:.2f}" for k in at),
            "",
        ),
        (
            "encoder: style of unseen pictures read by a linear probe, three styles",
            f"{encoder['styles']['style read by a linear probe, three styles']:.2f}",
            "",
        ),
        (
            "first stage: unseen pictures, Noto, Fluent, Twemoji",
            "PSNR "
            + ", ".join(f"{first_stage[s]['psnr']:.1f}" for s in ("noto", "fluent", "twemoji")),
            "",
        ),
    ]
    return found


def share(one: dict[str, Any]) -> str:
    """A share with its spread and N."""
    spread = one["deviation over seeds and styles"]
    return f"{one['share']:.2f} ± {spread:.2f} (n = {one['n']})"


def table(found: list[tuple[str, str, str]]) -> list[str]:
    """Markdown."""
    lines = ["| what | measured | bound |", "|---|---|---|"]
    return lines + [f"| {what} | {value} | {bound} |" for what, value, bound in found]


def measured(whole: dict[str, Any]) -> str:
    """When and on what."""
    threads = whole["threads"]
    machine = f"{threads} CPU thread{'s' * (threads > 1)} ({whole['machine']})"
    return (
        f"Measured {whole['date']} by `benchmarks/pictograms/figures.py`, seeds "
        f"{', '.join(map(str, whole['seeds']))}, {machine}, "
        f"no GPU, torch {whole['torch']}. ± is the deviation over seeds and styles. The judge of "
        "concepts: EfficientNet-Lite0, nearest mean over the other styles, among all concepts; of "
        "styles: a logistic regression on the statistics of its early maps, trained on real "
        "held-out pictures and softened copies of them."
    )


def replace(page: Path, text: str) -> None:
    """Puts text between the markers of a page."""
    pattern = r"(<!-- figures:pictograms -->\n).*?(<!-- /figures -->)"
    new, count = re.subn(
        pattern, lambda m: f"{m[1]}\n{text}\n\n{m[2]}", page.read_text(), flags=re.S
    )
    if count != 1:
        raise ValueError(f"{page} has {count} places for the figures of pictograms, not one")
    page.write_text(new)


if __name__ == "__main__":
    main()
