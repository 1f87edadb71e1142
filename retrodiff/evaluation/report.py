"""One HTML file that says how good generated images are and whether they copy, pictures inside."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retrodiff.evaluation.copying import Copying
from retrodiff.evaluation.metrics import Score
from retrodiff.evaluation.sets import ImageSet
from retrodiff.text import printable

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.pictures { display: flex; flex-wrap: wrap; gap: 6px }
.pictures img { width: 96px; height: 96px; object-fit: contain; background: var(--soft) }
.pair { display: inline-block; margin: 0 14px 14px 0 } .pair img { width: 96px; height: 96px;
  object-fit: contain; background: var(--soft) } .pair span { display: block; font-size: .8rem }
p.note { opacity: .75 } .verdict { font-weight: 600 }
"""


@dataclass(frozen=True)
class Report:
    """What an evaluation found, with everything needed to read the numbers.

    Args:
        generated: the images in question.
        reference: the real images they are compared with.
        features: name of the network that made the features.
        scores: numbers.
        copying: by source.
        sources: the images of each source, for the worst pairs.
        conditions: settings of the sampling and of the evaluation, by name.
        notes: what to keep in mind.
    """

    generated: ImageSet
    reference: ImageSet
    features: str
    scores: Sequence[Score]
    copying: Mapping[str, Copying] = field(default_factory=dict[str, Copying])
    sources: Mapping[str, ImageSet] = field(default_factory=dict[str, ImageSet])
    conditions: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: Sequence[str] = ()

    def lines(self) -> list[str]:
        """The numbers as plain text, one a line."""
        told = [str(score) for score in self.scores]
        return [*told, *map(str, self.copying.values()), *self.notes]

    def json(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON."""
        return {
            "generated": {"name": self.generated.name, "images": len(self.generated)},
            "reference": {"name": self.reference.name, "images": len(self.reference)},
            "features": self.features,
            "scores": [vars(score) for score in self.scores],
            "copying": {
                name: {
                    "rate": found.rate,
                    "held_out_rate": found.null_rate,
                    "excess": found.excess,
                    "threshold": found.threshold,
                    "planted_copies_found": found.sensitivity,
                    "generated": len(found.similarity),
                    "held_out": len(found.null),
                    "worst": [
                        {
                            "file": self.generated.files[i],
                            "source": self.sources[name].files[j],
                            "similarity": cosine,
                        }
                        for i, j, cosine in found.worst()
                    ],
                }
                for name, found in self.copying.items()
            },
            "conditions": dict(self.conditions),
            "notes": list(self.notes),
        }

    def html(self, shown: int = 48) -> str:
        """The whole page.

        Args:
            shown: generated images shown at the top, evenly spaced.
        """
        step = max(1, len(self.generated) // shown)
        pictures = "".join(_image(small) for small in self.generated.small[::step][:shown])
        title = f"Evaluation of {_text(self.generated.name)}"
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
            '<meta name=viewport content="width=device-width, initial-scale=1">'
            f"<style>{STYLE}</style><h1>{title}</h1>"
            f"<p>{len(self.generated):,} generated images against {len(self.reference):,} of "
            f"{_text(self.reference.name)}; features of {_text(self.features)}.</p>"
            f'<div class=pictures role=img aria-label="generated images">{pictures}</div>'
            f"<h2>Numbers</h2>{self._scores()}{self._notes()}{self._copies()}"
            f"{self._provenance()}{self._conditions()}</html>"
        )

    def _scores(self) -> str:
        rows = "".join(
            f"<tr><td>{_text(s.name)}<td class=number>{s.value:.4g}"
            f"{'' if s.spread is None else f' ± {s.spread:.2g}'}<td>{s.better} is better"
            f"<td class=number>{s.generated:,}{f' against {s.reference:,}' if s.reference else ''}"
            f"<td>{_text(s.note)}"
            for s in self.scores
        )
        head = "<tr><th>metric<th>value<th><th>images<th>keep in mind"
        return f"<table>{head}{rows}</table>"

    def _notes(self) -> str:
        return "".join(f"<p class=note>{_text(note)}</p>" for note in self.notes)

    def _copies(self) -> str:
        parts = []
        for name, found in self.copying.items():
            verdict = _verdict(found)
            source = self.sources[name]
            pairs = "".join(
                f"<div class=pair>{_image(self.generated.small[i])}{_image(source.small[j])}"
                f"<span>cosine {cosine:.3f}</span><span>{_text(source.files[j][-32:])}</span></div>"
                for i, j, cosine in found.worst(12)
            )
            parts.append(
                f"<h2>Copies of the {_text(name)} images?</h2><p class=verdict>{verdict}</p>"
                f"<p>{_text(found)}.</p><p>The nearest pairs, generated on the left:</p>{pairs}"
            )
        return "".join(parts)

    def _provenance(self) -> str:
        rows = "".join(
            f"<tr><td>{_text(name)}<td class=number>{len(source):,}<td>{_licenses(source)}"
            for name, source in {"reference": self.reference, **self.sources}.items()
        )
        head = "<tr><th>images<th>how many<th>licenses"
        return f"<h2>Where the images come from</h2><table>{head}{rows}</table>"

    def _conditions(self) -> str:
        if not self.conditions:
            return ""
        rows = "".join(
            f"<tr><td>{_text(name)}<td>{_text(value)}" for name, value in self.conditions.items()
        )
        return f"<h2>Conditions</h2><table>{rows}</table>"


def _verdict(found: Copying) -> str:
    if found.excess > 0.01:
        return f"{found.excess:.1%} more near-duplicates than among held-out real images."
    if found.sensitivity is not None and found.sensitivity < 0.8:
        return (
            f"None found, but these features find only {found.sensitivity:.0%} of planted copies: "
            "this says little."
        )
    return "No more near-duplicates than among real images that the model never saw."


def _licenses(images: ImageSet) -> str:
    if not images.licenses:
        return "not recorded"
    counts = Counter(name or "not recorded" for name in images.licenses)
    return ", ".join(f"{_text(name)} ({n:,})" for name, n in counts.most_common())


def _image(small: bytes) -> str:
    kind = "png" if small.startswith(b"\x89PNG") else "jpeg"
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(small).decode()}">'


def _text(value: object) -> str:
    return html.escape(printable(value))
