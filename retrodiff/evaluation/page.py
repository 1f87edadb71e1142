"""The HTML page of a report: one file, its pictures inside, nothing fetched."""

from __future__ import annotations

import base64
import html
from collections import Counter
from typing import TYPE_CHECKING

from retrodiff.evaluation.copying import Copying
from retrodiff.evaluation.run_curves import draw
from retrodiff.evaluation.sets import ImageSet, license_of
from retrodiff.text import printable

if TYPE_CHECKING:
    from retrodiff.evaluation.report import Report

SHOWN, WITH_NEIGHBORS, NEIGHBORS, PAIRS = 60, 10, 8, 12

STYLE = """
:root { color-scheme: light dark; --ink: #1c2524; --soft: #5d6b69; --line: #d9e0df; --card: #fff;
  --page: #f6f8f8; --teal: #0f766e; --good: #15803d; --bad: #b42318; --open: #a15c07 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eceb; --soft: #9aa8a6; --line: #33403f;
  --card: #1b2322; --page: #131918; --teal: #2dd4bf; --good: #4ade80; --bad: #f97066;
  --open: #fbbf24 } }
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .8rem } h3 { font-size: 1rem; margin: 1.4rem 0 .5rem }
p { margin: .5rem 0; max-width: 46rem } .soft, figcaption { color: var(--soft) }
.chips { display: flex; flex-wrap: wrap; gap: .4rem; margin: .9rem 0 0 }
.chips span { border: 1px solid var(--line); background: var(--card); border-radius: 99px;
  padding: .1rem .7rem; font-size: .875rem; overflow-wrap: anywhere }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .9rem;
  margin-top: 1.6rem }
.card { background: var(--card); border: 1px solid var(--line); border-left: 5px solid var(--soft);
  border-radius: 8px; padding: .8rem 1rem } .card h2 { margin: 0; font-size: 1rem }
.card p { margin: .25rem 0 0; font-size: .94rem } .card b { float: right; font-size: .8rem }
.good { border-left-color: var(--good) } .good b { color: var(--good) }
.bad { border-left-color: var(--bad) } .bad b { color: var(--bad) }
.open { border-left-color: var(--open) } .open b { color: var(--open) }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px } table { border-collapse: collapse; width: 100%; font-size: .94rem }
th, td { text-align: left; padding: .5rem .8rem; border-top: 1px solid var(--line);
  vertical-align: top } tr:first-child > * { border-top: 0 }
th { font-weight: 600; color: var(--soft); font-size: .85rem }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
td small { display: block; color: var(--soft) }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, 84px); gap: 6px }
.pictures img, .row img, .pair img { width: 84px; height: 84px; object-fit: contain;
  background: var(--card); border-radius: 4px; display: block; image-rendering: auto }
.row { display: flex; gap: 6px; align-items: center; margin: 0 0 8px; overflow-x: auto }
.row .own { border: 3px solid var(--teal); border-radius: 7px; margin-right: 10px; flex: none }
.row > img { flex: none } .row > span { min-width: 7rem; max-width: 9rem; font-size: .85rem;
  color: var(--soft); overflow-wrap: anywhere }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(176px, 1fr)); gap: 14px }
.pair { margin: 0 } .pair div { display: flex; gap: 4px } figcaption { font-size: .8rem;
  overflow-wrap: anywhere; margin-top: 2px } .curves { width: 100%; height: auto; display: block }
.curves text { font: 12px system-ui, sans-serif; fill: var(--soft) }
.curves .grid { stroke: var(--line) } .plot { padding: 1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px }
li { margin: .3rem 0; max-width: 52rem } summary { cursor: pointer; margin: .6rem 0 }
.bars rect.track { fill: var(--line) } .bars rect.value { fill: var(--teal) }
"""

WORDS = {"good": "looks good", "bad": "look closer", "open": "not known"}


def page(report: Report) -> str:
    """The page of a report."""
    title = f"Evaluation of {_text(report.generated.name)}"
    parts = [
        f"<h1>{title}</h1>",
        f"<p class=soft>{len(report.generated):,} generated images against "
        f"{len(report.reference):,} held-out real images of {_text(report.reference.name)}.</p>",
        _chips(report),
        _cards(report),
        _gallery("Samples", report.generated, "generated images"),
        _with_neighbors(report),
        _gallery("Real images, for comparison", report.reference, "real images", 24),
        _scores(report),
        _notes(report),
        _copies(report),
        _curves(report),
        _provenance(report),
        _settings(report),
    ]
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{title}</title>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _chips(report: Report) -> str:
    told = [f"features {report.features}", *report.sampled.conditions.split(" ")]
    if not report.sampled.settings:
        told = [f"features {report.features}", report.sampled.conditions]
    if report.sampled.encoder:
        told.insert(1, f"conditioned on {report.sampled.encoder}")
    return f"<div class=chips>{''.join(f'<span>{_text(t)}</span>' for t in told)}</div>"


def _cards(report: Report) -> str:
    cards = "".join(
        f"<section class='card {verdict}'><b>{WORDS[verdict]}</b><h2>{_text(headline)}</h2>"
        f"<p>{_text(text)}</p></section>"
        for headline, text, verdict in report.verdicts()
    )
    return f"<div class=cards>{cards}</div>" if cards else ""


def _gallery(title: str, images: ImageSet, label: str, most: int = SHOWN) -> str:
    n = len(images)
    chosen = [round(i * (n - 1) / max(1, min(n, most) - 1)) for i in range(min(n, most))]
    shown = "".join(_image(images.small[i], images.files[i]) for i in chosen)
    some = f" <span class=soft>{len(chosen)} of {n:,}</span>" if len(chosen) < n else ""
    return f'<h2>{title}{some}</h2><div class=pictures role=img aria-label="{label}">{shown}</div>'


def _with_neighbors(report: Report) -> str:
    """Samples beside the neighbors that conditioned them."""
    source, sampled = report.sources.get("neighbors"), report.sampled
    if source is None or not report.neighbors:
        return ""
    n = len(report.generated)
    has = [i for i in range(n) if sampled.rows[i]]
    step = max(1, len(has) // WITH_NEIGHBORS)
    rows = []
    for i in has[::step][:WITH_NEIGHBORS]:
        places = [report.neighbors[row] for row in sampled.rows[i]][:NEIGHBORS]
        near = "".join(_image(source.small[j], source.files[j]) for j in places)
        asked = sampled.sources[i]
        words = f"<span>{_text(asked)}</span>" if isinstance(asked, str) else ""
        own = f"<div class=own>{_image(report.generated.small[i], report.generated.files[i])}</div>"
        rows.append(f"<div class=row>{own}{near}{words}</div>")
    return (
        "<h2>Samples and the neighbors that conditioned them</h2>"
        f"<p class=soft>Framed: the sample. Beside it: what was retrieved.</p>{''.join(rows)}"
    )


def _scores(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{_text(s.name)}<small>{_text(s.note)}</small>"
        f"<td class=number>{s.value:.4g}{'' if s.spread is None else f' ± {s.spread:.2g}'}"
        f"<small>{s.better} is better</small>"
        f"<td class=number>{'' if s.real is None else f'{s.real:.4g}'}"
        f"<td>{_text(s.images)}<small>{_text(s.features)}</small>"
        f"<small>{_text(report.sampled.conditions)}</small>"
        for s in report.scores
    )
    head = "<tr><th>metric<th>value<th>real images<th>computed from"
    return (
        f"<h2>Numbers</h2><div class=wide><table>{head}{rows}</table></div>"
        "<p class=soft>Real images: the same number for one half of the real images against the "
        "other half, or for real images in place of generated ones. A perfect generator comes "
        "near it. For MIND it is the bias at these numbers of images.</p>"
    )


def _notes(report: Report) -> str:
    if not report.notes:
        return ""
    items = "".join(f"<li>{_text(note)}</li>" for note in report.notes)
    return f"<h2>Keep in mind</h2><ul>{items}</ul>"


def _copies(report: Report) -> str:
    if not report.copying:
        return ""
    rows = "".join(_copying_row(name, found) for name, found in report.copying.items())
    head = (
        "<tr><th>copies of<th>generated<th>held-out<th>excess similarity<th>planted copies found"
        "<th>at the looser threshold"
    )
    parts = [
        "<h2>Copies</h2><p>An image is called a near-duplicate if it is so many times nearer to an "
        "image of the source than to any held-out image as only 1 % of the held-out images "
        f"are.</p><div class=wide><table>{head}{rows}</table></div>"
        f"<p class=soft>Compared by {_text(report.features)}, {_text(report.details)}, cosine. "
        "Looser threshold: the one that finds 95 % of the planted copies; generated against "
        "held-out.</p>"
    ]
    for name, found in report.copying.items():
        source = report.sources[name]
        whose = "the neighbors used" if name == "neighbors" else f"the {name} images"
        pairs = "".join(
            f"<figure class=pair><div>{_shown(report.generated, i)}{_shown(source, j)}</div>"
            f"<figcaption>cosine {cosine:.3f}, "
            f"{_text(source.files[j][-40:])}</figcaption></figure>"
            for i, j, cosine in found.worst(PAIRS)
        )
        parts.append(
            f"<h3>The worst pairs with {_text(whose)}, generated on the left</h3>"
            f"<div class=pairs>{pairs}</div>"
        )
    return "".join(parts)


def _copying_row(name: str, found: Copying) -> str:
    excess, error = found.excess_similarity
    looser = found.looser()
    kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in found.found().items())
    planted = "-" if found.sensitivity is None else f"{found.sensitivity:.0%}"
    loose = "-" if looser is None else f"{looser[0]:.1%} against {looser[1]:.1%}"
    whose = "neighbors used (echo)" if name == "neighbors" else name
    return (
        f"<tr><td>{_text(whose)}<td class=number>{found.rate:.1%}<small>of "
        f"{len(found.margin):,}</small><td class=number>{found.null_rate:.1%}<small>of "
        f"{len(found.null):,}, {found.times:.2f} times nearer</small>"
        f"<td class=number>{excess:+.4f} ± {error:.2g}"
        f"<td>{planted}<small>{_text(kinds)}</small><td class=number>{loose}"
    )


def _curves(report: Report) -> str:
    if not report.curves:
        return ""
    return f"<h2>Training</h2><div class=plot>{draw(report.curves)}</div>"


def _provenance(report: Report) -> str:
    sets = {"generated": report.generated, "reference": report.reference, **report.sources}
    rows = "".join(
        f"<tr><td>{_text(name)}<td>{_text(images.name)}<td class=number>{len(images):,}"
        f"<td>{_licenses(images)}"
        for name, images in sets.items()
        if name != "neighbors"
    )
    head = "<tr><th>images<th>where<th>how many<th>licenses"
    parts = [
        f"<h2>Where the images come from</h2><div class=wide><table>{head}{rows}</table></div>"
    ]
    if used := report.used():
        counts = Counter(row["license"] or "not recorded" for row in used)
        told = ", ".join(f"{_text(name)} ({n:,})" for name, n in counts.most_common())
        lines = "".join(
            f"<tr><td class=number>{row['row']}<td>{_text(row['file'] or '-')}"
            f"<td>{_text(row['license'] or 'not recorded')}<td>{_text(row['credit'] or '-')}"
            f"<td class=number>{row['used']}"
            for row in used
        )
        head = "<tr><th>row<th>file<th>license<th>credit<th>used for"
        parts.append(
            f"<p>{len(used):,} rows of the database conditioned these images. Licenses: {told}.</p>"
            f"<details><summary>Every row that was used</summary><div class=wide><table>{head}"
            f"{lines}</table></div></details>"
        )
    return "".join(parts)


def _settings(report: Report) -> str:
    if not report.sampled.settings:
        return ""
    rows = "".join(
        f"<tr><td>{_text(name)}<td>{_text(value)}"
        for name, value in report.sampled.settings.items()
    )
    return (
        "<h2>Settings of the sampling</h2><details><summary>Everything that makes the images again"
        f"</summary><div class=wide><table>{rows}</table></div></details>"
    )


def _licenses(images: ImageSet) -> str:
    counts = Counter(license_of(record) or "not recorded" for record in images.records)
    told = [f"{_text(name)} ({n:,})" for name, n in counts.most_common(8)]
    return ", ".join(told) if counts.keys() - {"not recorded"} else "not recorded"


def _shown(images: ImageSet, i: int) -> str:
    return _image(images.small[i], images.files[i])


def _image(small: bytes, name: str = "") -> str:
    kind = "png" if small.startswith(b"\x89PNG") else "jpeg"
    data = base64.b64encode(small).decode()
    return f'<img alt="" title="{_text(name)}" src="data:image/{kind};base64,{data}">'


def _text(value: object) -> str:
    return html.escape(printable(value))
