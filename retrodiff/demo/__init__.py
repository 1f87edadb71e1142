"""`retrodiff demo`: a trained model and its databases, then a small model trained from scratch.

See `retrodiff.demo.pictograms` and `retrodiff.demo.digits`.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from retrodiff.databases import EmbeddingDatabase
from retrodiff.demo import digits, pictograms
from retrodiff.disk.files import check_free, place, write_json
from retrodiff.disk.shipped import shipped
from retrodiff.model.generated import Generation
from retrodiff.pictures.sheet import Line, Section, draw_sheet

MARKER = "report.json"
PACKAGES = ("torch", "timm", "open_clip_torch", "torch-ema", "safetensors", "scikit-learn")


@dataclass(frozen=True)
class Settings:
    """Sizes of both halves."""

    pictograms: pictograms.Settings = field(default_factory=pictograms.Settings)
    digits: digits.Settings = field(default_factory=digits.Settings)


class CopyingError(RuntimeError):
    """Samples repeat training or database images more often than real new images do."""


def run(
    out: str | Path,
    *,
    seed: int = 0,
    settings: Settings | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Samples, trains and measures; writes databases, models, pictures and ``report.json``.

    ``samples.png``, ``attribution.png`` and the film ``demo.gif`` come first, of the shipped model;
    ``digits.png`` is of the model that is trained.

    Args:
        out: folder to be written.
        seed: of everything random. The same seed gives the same images.
        settings: smaller ones are for tests.
        overwrite: replace an earlier demo there.
        progress: show bars.

    Returns:
        The report.

    Raises:
        FileNotFoundError: the package of the pictogram model is not installed.
        ImportError: scikit-learn is not installed.
        CopyingError: samples copy above the null; the report is written all the same.
    """
    shipped("pictograms")
    if find_spec("sklearn") is None:
        raise ImportError("the demo needs scikit-learn: pip install 'retrodiff[demo]'")
    out = place(out)
    check_free(out, MARKER, overwrite, None)  # parts are replaced one by one
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MARKER, {"unfinished": True})
    settings = settings or Settings()
    start = time.perf_counter()

    shown = pictograms.run(out, settings.pictograms, seed=seed)
    if progress:
        print(f"pictograms: {shown['images']} images in {shown['seconds']:.0f} s; look at {out}")

    numbers = digits.run(out, settings.digits, seed, progress)
    numbers.model.save(out / "digits", overwrite=True)
    draw_sheet(sections(numbers)).save(out / "digits.png")

    report: dict[str, Any] = {
        "pictograms": shown,
        **numbers.report,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_rss_mb": peak_rss_mb(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "retrodiff": version("retrodiff"),
            **{name: version(name) for name in PACKAGES},
        },
    }
    write_json(out / MARKER, report)
    if report["copying"]["standard_errors_above"] > 3:
        raise CopyingError(
            f"{report['copying']['share']:.1%} of the samples duplicate a row of D or X, against "
            f"{report['copying']['share_of_real']:.1%} of real held-out images: see {out / MARKER}"
        )
    return report


def peak_rss_mb() -> float:
    """The most memory this process ever held, in MB."""
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def sections(numbers: digits.Digits) -> list[Section]:
    """What ``digits.png`` shows: every mode of sampling."""
    made: list[Section] = []
    database = numbers.model.database
    assert isinstance(database, EmbeddingDatabase)
    shown = {
        "text": "Digits, text only: the prompt's embedding, no search at all",
        "text_neighbors": "Digits, text and its k - 1 neighbors",
        "neighbors": "Digits, k neighbors of the text",
        "class": "Digits, class-conditional: k drawn from the 20 nearest rows",
    }
    for name, title in shown.items():
        made.append(Section(title, _lines(numbers.samples[name], numbers.model, (3, 7))))
    made.append(
        Section(
            "Digits, image query: k neighbors of a held-out scan",
            _lines(numbers.samples["image"], numbers.model, (0, 1), numbers.asked),
        )
    )
    made.append(
        Section(
            "Digits, unconditional: pseudo-queries drawn from p_D, top half",
            _lines(numbers.samples["unconditional"], numbers.model, (0, 1, 2)),
        )
    )
    made.append(
        Section(
            "Digits, the database swapped for one of 0 to 4: unconditional",
            _lines(numbers.samples["swapped"], numbers.swapped, (0, 1, 2)),
        )
    )
    words = " and ".join(digits.WORDS[digit] for digit in digits.UNSEEN)
    made.append(
        Section(
            f"Digits never trained on ({words}), now in the database: k neighbors of the text",
            _lines(numbers.samples["unseen.after"], numbers.model, (0, 1)),
        )
    )
    return made


def table(report: dict[str, Any]) -> str:
    """The report's main figures as a few lines of text."""
    names = {
        "text": "text only",
        "text_neighbors": "text + k-1 neighbors",
        "neighbors": "k neighbors",
    }
    half, unseen = report["accuracy_at_half_the_steps"], report["unseen"]
    lines = [f"{'digits: asked class':28}{'trained':>9}{'half-way':>10}{'unseen':>9}"]
    for name, share in report["accuracy"].items():
        cells = [f"{names.get(name, name):28}{share:9.3f}"]
        cells.append(f"{half[name]:10.3f}" if name in half else " " * 10)
        cells.append(f"{unseen['after'][name]:9.3f}" if name in unseen["after"] else "")
        lines.append("".join(cells))
    swap, copying, gap = report["swap"], report["copying"], report["loss_gap"]
    lines += [
        f"{'judge on real images':28}{report['judge_on_real_x']:9.3f}",
        f"{'swap to 0-4, before/after':28}{swap['share_before']:9.3f}{swap['share_allowed']:10.3f}",
        f"{'duplicates, samples/real':28}{copying['share']:9.3f}{copying['share_of_real']:10.3f}",
        f"{'shuffled neighbors, loss':28}{gap['ratio']:+9.1%}  ({gap['standard_errors']:.0f} s.e.)",
    ]
    shown = report["pictograms"]
    lines.append(f"pictograms: {shown['images']} images in {shown['seconds']:.0f} s, no training")
    lines.append(f"{report['seconds']:.0f} s, peak {report['peak_rss_mb']:.0f} MB")
    return "\n".join(lines)


def _lines(
    out: Generation, model: Any, rows: Sequence[int], images: torch.Tensor | None = None
) -> list[Line]:
    """Some of the generated images, with seven more of the same query where it was asked again."""
    lines: list[Line] = []
    for i in rows:
        source = out.query.source[i]
        same = [j for j, other in enumerate(out.query.source) if other == source][:8]
        samples = out.images[same]
        if len(same) < 8:
            again = out.query.rows([i] * (8 - len(same)))
            more = model.sample(query=again, mode="neighbors", seed=1, progress=False)
            samples = torch.cat([samples, more.images])
        near = [model.database.image(j) for j in out.neighbors.indices[i].tolist() if j >= 0]
        if images is not None:
            line = Line(images[i], near, list(samples), "a held-out scan")
        elif source.startswith("row "):
            row = int(source.removeprefix("row "))
            line = Line(model.database.image(row), near, list(samples), f"drawn: {source}")
        else:
            line = Line(source, near, list(samples))
        lines.append(line)
    return lines
