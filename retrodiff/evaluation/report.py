"""What an evaluation found, as text, as JSON, and as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrodiff.disk.files import plain_json, write_folder, write_json
from retrodiff.evaluation.copying import Copying
from retrodiff.evaluation.metrics import Score
from retrodiff.evaluation.run_curves import Curve
from retrodiff.evaluation.sampled import Sampled
from retrodiff.evaluation.sets import ImageSet, license_of

MARKER, PAGE = "report.json", "report.html"
FORMAT = 2

FEW = 50
"""Images below which no verdict on fidelity and diversity is given."""

LOW = 0.6
"""A number below this share of what real images get is called low."""


@dataclass(frozen=True)
class Report:
    """What an evaluation found, with everything needed to read the numbers.

    Args:
        generated: the images in question.
        reference: the real images they are compared with.
        features: name of the network that made the features.
        scores: numbers.
        copying: by source; ``neighbors`` are those that conditioned each image.
        sources: the images of each source, for the worst pairs.
        sampled: settings, prompts and neighbors of the images, as far as they are known.
        neighbors: row of the database -> which image of ``sources["neighbors"]`` that is.
        curves: losses of the training.
        details: what the copying report compares, in words.
        notes: what to keep in mind.

    Examples:
        >>> from pathlib import Path
        >>> import torch
        >>> from retrodiff.encoders import TimmEncoder
        >>> from retrodiff.evaluation import evaluate
        >>> from retrodiff.model.generated import to_picture
        >>> for name in ("samples", "held-out"):
        ...     Path(name).mkdir()
        ...     for i in range(12):
        ...         to_picture(torch.rand(3, 32, 32) * 2 - 1).save(f"{name}/{i}.png")
        >>> features = TimmEncoder("test_resnet", image_size=32)
        >>> report = evaluate("samples", "held-out", features, progress=False)
        >>> report.score("MIND").name
        'MIND'
        >>> report.save("report").name
        'report.html'
    """

    generated: ImageSet
    reference: ImageSet
    features: str
    scores: Sequence[Score]
    copying: Mapping[str, Copying] = field(default_factory=dict[str, Copying])
    sources: Mapping[str, ImageSet] = field(default_factory=dict[str, ImageSet])
    sampled: Sampled = field(default_factory=Sampled)
    neighbors: Mapping[int, int] = field(default_factory=dict[int, int])
    curves: Sequence[Curve] = ()
    details: str = ""
    notes: Sequence[str] = ()

    def lines(self) -> list[str]:
        """The numbers as plain text, one a line, each with its conditions."""
        about = f"; {self.sampled.conditions}"
        told = [f"{score}{about}" for score in self.scores]
        told += [f"{found}; {self.features}, {self.details}{about}" for found in self.found()]
        told += [f"{headline}: {text}" for headline, text, _ in self.verdicts()]
        return [*told, *self.notes]

    def found(self) -> list[Copying]:
        """The copying report of each source."""
        return list(self.copying.values())

    def score(self, start: str) -> Score | None:
        """The first score whose name starts so, such as ``recall``; None: there is none."""
        return next((s for s in self.scores if s.name.startswith(start)), None)

    def verdicts(self) -> list[tuple[str, str, str]]:
        """What the numbers say: headline, a sentence, and ``good``, ``bad`` or ``open``.

        Precision and recall are compared with those of one half of the real images against the
        other half, copies with held-out images.
        """
        found = [
            self._share(
                "Fidelity",
                ("precision", "density"),
                good="Images lie where real ones do",
                bad="Few images lie where real ones do",
            ),
            self._share(
                "Diversity",
                ("recall", "coverage"),
                good="The kinds of real images are covered",
                bad="Few kinds of real images are covered",
            ),
            self._copied(),
        ]
        return [verdict for verdict in found if verdict is not None]

    def _share(
        self, headline: str, names: tuple[str, str], good: str, bad: str
    ) -> tuple[str, str, str] | None:
        scores = [s for s in map(self.score, names) if s is not None and s.real]
        if not scores:
            return None
        low = min(s.value / (s.real or 1) for s in scores) < LOW
        numbers = ", ".join(
            f"{s.name.split(' (')[0]} {s.value:.2f} (real images {s.real:.2f})" for s in scores
        )
        n = scores[0].generated
        if n < FEW:
            return headline, f"{n} images are too few to tell: {numbers}.", "open"
        return headline, f"{bad if low else good}: {numbers}.", "bad" if low else "good"

    def _copied(self) -> tuple[str, str, str] | None:
        if not self.copying:
            return None
        bad = [c for c in self.copying.values() if copies_found(c)]
        if bad:
            told = ", ".join(
                f"{c.rate:.1%} near-duplicates of {c.source} (held-out images: {c.null_rate:.1%})"
                for c in bad
            )
            return "Copies", f"The images copy: {told}.", "bad"
        blind = [c for c in self.copying.values() if (c.sensitivity or 1) < 0.8]
        if blind:
            share = min(c.sensitivity or 0 for c in blind)
            text = f"None found, but only {share:.0%} of planted copies would be: this says little."
            return "Copies", text, "open"
        text = "No more near-duplicates than among real images that the model never saw."
        return "Copies", text, "good"

    def used(self) -> list[dict[str, Any]]:
        """Every row of the database that conditioned an image: record, license, how often."""
        counts: dict[int, int] = {}
        records: dict[int, Any] = {}
        for mine, known in zip(self.sampled.rows, self.sampled.records, strict=False):
            for row, record in zip(mine, known, strict=False):
                counts[row] = counts.get(row, 0) + 1
                records[row] = record
        order = sorted(counts, key=lambda row: (-counts[row], row))
        return [
            {
                "row": row,
                "used": counts[row],
                "file": records[row].get("file") or records[row].get("id"),
                "license": license_of(records[row]) or None,
                "credit": records[row].get("credit"),
            }
            for row in order
        ]

    def json(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON."""
        return {
            "generated": {"name": self.generated.name, "images": len(self.generated)},
            "reference": {"name": self.reference.name, "images": len(self.reference)},
            "features": self.features,
            "conditions": self.sampled.conditions,
            "scores": [vars(score) for score in self.scores],
            "verdicts": [
                {"about": headline, "text": text, "verdict": verdict}
                for headline, text, verdict in self.verdicts()
            ],
            "copying": {name: self._copying(name, c) for name, c in self.copying.items()},
            "rows_used": self.used(),
            "settings": dict(self.sampled.settings),
            "notes": list(self.notes),
        }

    def _copying(self, name: str, found: Copying) -> dict[str, Any]:
        looser = found.looser()
        excess, error = found.excess_similarity
        return {
            "features": f"{self.features}, {self.details}",
            "rate": found.rate,
            "held_out_rate": found.null_rate,
            "excess": found.excess,
            "excess_similarity": excess,
            "excess_similarity_error": error,
            "threshold": found.threshold,
            "times_nearer": found.times,
            "planted_copies_found": found.sensitivity,
            "planted_by_kind": found.found(),
            "where_95_percent_of_planted_are_found": looser
            and {"rate": looser[0], "held_out_rate": looser[1]},
            "generated": len(found.margin),
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

    def html(self) -> str:
        """The whole page, its pictures inside."""
        from retrodiff.evaluation.page import page

        return page(self)

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Writes ``report.html`` and ``report.json`` into a folder.

        Args:
            folder: is made.
            overwrite: replace an earlier report there.

        Returns:
            The page.
        """

        def write(temporary: Path) -> None:
            (temporary / PAGE).write_text(self.html(), "utf-8")
            value = {"format": FORMAT, **_finite(self.json())}
            write_json(temporary / MARKER, plain_json(value))

        done = write_folder(folder, write, marker=MARKER, own=own_files, overwrite=overwrite)
        return done / PAGE


def own_files(folder: Path) -> set[str]:
    """What an evaluation wrote into a folder."""
    return {MARKER, PAGE}


def copies_found(found: Copying) -> bool:
    """Whether there are more near-duplicates than chance explains: 3 standard errors, and 1 %."""
    pairs = [(found.rate, found.null_rate)]
    if (looser := found.looser()) is not None and (found.sensitivity or 0) < 0.95:
        pairs.append(looser)
    n, h = len(found.margin), len(found.null)
    for rate, null in pairs:
        both = (rate * n + null * h) / (n + h)
        error = (both * (1 - both) * (1 / n + 1 / h)) ** 0.5
        if rate - null > max(0.01, 3 * error):
            return True
    return False


def _finite(value: Any) -> Any:
    """The same without infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value - value != 0 else value
