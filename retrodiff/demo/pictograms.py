"""Shows what one small trained network draws when it is shown other databases; nothing is trained.

The model is that of the package ``retrodiff-pictograms``, whose weights are still being trained, so
the demo does not call this yet. Its network has seen three styles; which style and which thing it
draws is what the database and the prompt say.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrodiff.databases import Searchable, Union, open_database
from retrodiff.disk.shipped import shipped
from retrodiff.interfaces import Mode
from retrodiff.model import Model
from retrodiff.model.generated import Generation
from retrodiff.pictures import Line, Section
from retrodiff.retrieval import NeighborCounts, TopM, Uniform

STYLES = {"noto": "Noto", "fluent": "Fluent 3D", "twemoji": "Twemoji"}
MODES: dict[Mode, str] = {
    "text": "the prompt alone, no search",
    "text+neighbors": "the prompt and 3 neighbors",
    "neighbors": "4 neighbors of the prompt",
}


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Args:
        prompts: of the first two sections.
        unseen: concepts that neither network nor encoder was trained on, in no style.
        samples: images of each line.
        steps: of the sampler; None: the model's.
    """

    prompts: Sequence[str] = ("robot", "red apple", "cat face", "guitar")
    unseen: Sequence[str] = ()
    samples: int = 5
    steps: int | None = None


@dataclass(frozen=True)
class Told:
    """The sections of a sheet, and what it took.

    Args:
        sections: queries, neighbors and samples.
        report: counts and seconds, as JSON-able values.
    """

    sections: Sequence[Section]
    report: dict[str, Any]


def run(settings: Settings | None = None, *, seed: int = 0) -> Told:
    """Samples the shipped model in every mode and from every database.

    Args:
        settings: fewer images are for tests.
        seed: of everything random.

    Raises:
        FileNotFoundError: the package of the model is not installed.
    """
    settings = settings or Settings()
    start = time.perf_counter()
    model = Model.load("pictograms")
    loaded = time.perf_counter() - start
    sections = list(story(model, settings, seed))
    images = sum(len(line.samples) for section in sections for line in section.lines)
    seconds = time.perf_counter() - start
    return Told(
        sections,
        {
            "images": images,
            "seconds": round(seconds, 1),
            "seconds_to_load": round(loaded, 1),
            "rows": len(_database(model)),
        },
    )


def story(model: Model, settings: Settings, seed: int) -> Iterator[Section]:
    """The sections, one after the other.

    Args:
        model: of the pictograms.
        settings: what is asked.
        seed: of everything random.
    """
    database = _database(model)
    asked = Asked(model, settings, seed)
    fluent = model.replace(database=database.where("style == 'fluent'"), proposal=None)
    yield Section(
        "Three ways to ask, one network",
        [asked.line(fluent, settings.prompts[0], mode, note) for mode, note in MODES.items()],
    )
    lines = [
        asked.line(_styled(model, database, style), prompt, "text+neighbors", name)
        for prompt in settings.prompts
        for style, name in STYLES.items()
    ]
    yield Section("The database swapped: same prompt, same seed, same weights", lines)
    unseen = held_out()
    if unseen is not None and settings.unseen:
        both = Union(database, unseen)
        lines = []
        for prompt in settings.unseen:
            for rows, note in ((database, "before"), (both, "after its pictures are in D")):
                with_rows = model.replace(database=rows, proposal=None)
                lines.append(asked.line(with_rows, prompt, "neighbors", note))
        yield Section("Concepts that were never trained on", lines)
    yield Section("Nothing asked: rows drawn from the database", asked.unconditional())
    scales = [
        asked.line(fluent, settings.prompts[-1], "text+neighbors", f"guidance {scale:g}", scale)
        for scale in (1.0, 2.0, 4.0)
    ]
    yield Section("Guidance: how strongly the condition acts", scales)


class Asked:
    """Asks a model and makes lines of what it answers.

    Args:
        model: of the pictograms.
        settings: how many samples.
        seed: of everything random.
    """

    def __init__(self, model: Model, settings: Settings, seed: int) -> None:
        self.model, self.settings, self.seed = model, settings, seed

    def line(
        self, model: Model, prompt: str, mode: Mode, note: str, guidance: float | None = None
    ) -> Line:
        """Samples of one prompt beside the neighbors that they were made from."""
        out = model.sample(
            prompts=[prompt] * self.settings.samples,
            mode=mode,
            guidance=guidance,
            steps=self.settings.steps,
            seed=self.seed,
        )
        return Line(f"“{prompt}”", _neighbors(model, out, 0), list(out.images), note)

    def unconditional(self) -> list[Line]:
        """Samples of rows that are drawn: from all that were neighbors, then from the top tenth."""
        proposal = self.model.proposal or Uniform()
        top = TopM(proposal, 0.1) if isinstance(proposal, NeighborCounts) else proposal
        lines: list[Line] = []
        for chosen, note in ((proposal, "drawn from p_D"), (top, "from its top tenth")):
            model = self.model.replace(proposal=chosen)
            out = model.sample(n=self.settings.samples, steps=self.settings.steps, seed=self.seed)
            near = [_neighbors(model, out, i)[0] for i in range(len(out))]
            lines.append(Line(None, near[:4], list(out.images), note))
        return lines


def held_out() -> Searchable | None:
    """The pictures of concepts that were never trained on; None where the package has none."""
    folder = (shipped("pictograms") or Path("pictograms")).parent / "held_out"
    if not folder.is_dir():
        return None
    database = open_database(folder)
    assert isinstance(database, Searchable)
    return database


def _styled(model: Model, database: Searchable, style: str) -> Model:
    return model.replace(database=database.where(f"style == '{style}'"), proposal=None)


def _database(model: Model) -> Searchable:
    assert isinstance(model.database, Searchable)
    return model.database


def _neighbors(model: Model, out: Generation, i: int) -> list[Any]:
    rows = out.neighbors.indices[i].tolist()
    return [_database(model).image(row) for row in rows if row >= 0]
