"""Shows what one small trained network draws when it is shown other databases; nothing is trained.

The model is that of the package ``retrodiff-pictograms``. Its network has seen three styles; which
style and which thing it draws is what the database and the prompt say.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from retrodiff.databases import Searchable, Union, open_database
from retrodiff.demo.film import filmed, write_film
from retrodiff.demo.poster import Cell, Grid, draw_poster
from retrodiff.disk.files import atomic_write
from retrodiff.disk.shipped import shipped
from retrodiff.interfaces import Mode
from retrodiff.model import Model
from retrodiff.model.attribution_sheet import attribution_sheet
from retrodiff.model.generated import Generation
from retrodiff.retrieval import NeighborCounts, TopM, Uniform

STYLES = {"noto": "Noto", "fluent": "Fluent 3D", "twemoji": "Twemoji"}
MODES: dict[Mode, str] = {
    "text": "the prompt alone, no search",
    "text+neighbors": "the prompt and 3 neighbors",
    "neighbors": "4 neighbors of the prompt",
}
ASKED = "noto"
"""Style of the pictures that unseen concepts are asked for with."""
SCALES = (1.0, 2.0, 4.0)
NEIGHBORS = (1, 2, 8)


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Args:
        prompts: of the database swap.
        modes: prompts that are asked in every mode.
        unseen: concepts that neither network nor encoder was trained on, in no style; those whose
            pictures come with the package.
        filmed: prompts of the film.
        steps: of the sampler; None: the model's.
        swapped_in: folders of more databases by name, made with the model's encoder; such as one
            of a style that the network was never trained on.
    """

    prompts: Sequence[str] = ("red apple", "cat face", "wrapped gift", "jack-o-lantern")
    modes: Sequence[str] = ("red heart", "sunflower")
    unseen: Sequence[str] = ("woman swimming", "person shrugging", "peacock")
    filmed: Sequence[str] = ("red apple", "cat face", "guitar", "jack-o-lantern")
    steps: int | None = None
    swapped_in: Mapping[str, Path] = field(default_factory=dict)


def run(out: Path, settings: Settings | None = None, *, seed: int = 0) -> dict[str, Any]:
    """Samples the shipped model in every mode and from every database.

    Args:
        out: folder for ``samples.png``, ``attribution.png`` and ``demo.gif``.
        settings: fewer images are for tests.
        seed: of everything random.

    Returns:
        Counts and seconds, as JSON-able values.

    Raises:
        FileNotFoundError: the package of the model is not installed.
    """
    settings = settings or Settings()
    start = time.perf_counter()
    model = Model.load("pictograms")
    loaded = time.perf_counter() - start
    story = Story(model, settings, seed)
    grids = story.grids()
    weights = sum(p.numel() for p in model.denoiser.parameters())  # type: ignore[union-attr]
    heading = f"One network of {weights / 1e6:.1f} million weights; the database says what, and how"
    _save(draw_poster(heading, grids), out / "samples.png")
    sampled = time.perf_counter() - start

    acts = [
        filmed(story.styled(style), STYLES[style], settings.filmed, seed, settings.steps)
        for style in ("fluent", "noto")
    ]
    write_film(out / "demo.gif", acts)
    explained = story.styled("fluent").sample(
        prompts=list(settings.filmed), steps=settings.steps, seed=seed, attribution=True
    )
    _save(attribution_sheet(explained), out / "attribution.png")
    return {
        "images": story.images,
        "rows": len(story.database),
        "parameters": weights,
        "seconds_to_load": round(loaded, 1),
        "seconds_to_samples": round(sampled, 1),
        "seconds": round(time.perf_counter() - start, 1),
    }


class Story:
    """Asks a model and makes grids of what it answers.

    Args:
        model: of the pictograms.
        settings: what is asked.
        seed: of everything random.
    """

    def __init__(self, model: Model, settings: Settings, seed: int) -> None:
        assert isinstance(model.database, Searchable)
        self.model, self.database = model, model.database
        self.settings, self.seed = settings, seed
        self.images = 0

    def grids(self) -> list[Grid]:
        """The whole story, one grid after the other."""
        unseen = held_out()
        return [
            self.swap(),
            self.modes(),
            *([self.before_and_after(unseen)] if unseen is not None else []),
            self.unconditional(),
            self.sweeps(),
        ]

    def swap(self) -> Grid:
        """The same prompts, seeds and weights with one database after the other."""
        columns = {name: self.styled(style) for style, name in STYLES.items()}
        for name, folder in self.settings.swapped_in.items():
            columns[name] = self.model.replace(database=open_database(folder), proposal=None)
        prompts = self.settings.prompts
        cells = [self.cells(m, prompts, "text+neighbors") for m in columns.values()]
        rows = [(prompts[i], [column[i] for column in cells]) for i in range(len(prompts))]
        title = "The database swapped: same prompts, same seeds, same weights"
        return Grid(title, [f"database: {name}" for name in columns], rows)

    def modes(self) -> Grid:
        """Three ways to ask for the same."""
        prompts = self.settings.modes
        cells = [self.cells(self.styled("fluent"), prompts, mode) for mode in MODES]
        rows = [(prompts[i], [column[i] for column in cells]) for i in range(len(prompts))]
        return Grid("Three ways to ask, one network", list(MODES.values()), rows)

    def before_and_after(self, unseen: Searchable) -> Grid:
        """Concepts that were never trained on, asked for with a picture of one style.

        Their pictures in the other styles are in D afterwards, and are not before.
        """
        records = unseen.records(torch.arange(len(unseen)))
        titles = [str(record["title"]) for record in records]
        shown = list(self.settings.unseen) or sorted(set(titles))[:3]
        asked = [
            unseen.image(
                next(i for i, r in enumerate(records) if (r["title"], r["style"]) == (title, ASKED))
            )
            for title in shown
        ]
        both = Union(self.database, unseen.where(f"style != '{ASKED}'"))
        columns = [
            self.cells(self.model.replace(database=rows, proposal=None), asked, "image")
            for rows in (self.database, both)
        ]
        rows = [
            (title, [Cell([picture]), *(cells[n] for cells in columns)])
            for n, (title, picture) in enumerate(zip(shown, asked, strict=True))
        ]
        return Grid(
            "Concepts that neither network nor encoder was trained on, asked for with a picture",
            ["the query", "before its like are in the database", "after"],
            rows,
        )

    def unconditional(self) -> Grid:
        """Rows drawn from the database in place of a query."""
        proposal = self.model.proposal or Uniform()
        top = TopM(proposal, 0.1) if isinstance(proposal, NeighborCounts) else proposal
        cells: list[Cell] = []
        for chosen in (proposal, top):
            model = self.model.replace(proposal=chosen)
            out = model.sample(n=6, steps=self.settings.steps, seed=self.seed)
            self.images += len(out)
            cells.append(Cell(list(out.images)))
        columns = ["rows drawn as often as they were neighbors", "from the top tenth of them"]
        return Grid("Nothing asked: neighbors of rows of the database", columns, [("", cells)])

    def sweeps(self) -> Grid:
        """Guidance and the number of neighbors."""
        model, prompt = self.styled("twemoji"), self.settings.prompts[-1]
        cells = [
            self.cells(model, [prompt], "text+neighbors", 2, guidance=scale)[0] for scale in SCALES
        ]
        cells += [self.cells(model, [prompt], "neighbors", 2, k=k)[0] for k in NEIGHBORS]
        columns = [f"guidance {scale:g}" for scale in SCALES] + [
            f"{k} neighbor{'s' * (k > 1)}" for k in NEIGHBORS
        ]
        strip = [Cell(cell.samples, cell.neighbors[:4]) for cell in cells]
        return Grid(
            "How strongly the condition acts, and how many neighbors", columns, [(prompt, strip)]
        )

    def cells(
        self,
        model: Model,
        queries: Sequence[str] | Sequence[torch.Tensor],
        mode: Mode,
        samples: int = 4,
        **options: Any,
    ) -> list[Cell]:
        """Samples of each prompt or picture with the neighbors that they were made from."""
        repeated: Any = [query for query in queries for _ in range(samples)]
        given = {"images": torch.stack(repeated)} if mode == "image" else {"prompts": repeated}
        out = model.sample(
            **given,
            mode=mode,
            steps=self.settings.steps,
            seed=self.seed,
            **options,
        )
        self.images += len(out)
        return [
            Cell(
                list(out.images[i * samples : (i + 1) * samples]),
                [] if mode == "text" else _neighbors(model, out, i * samples),
            )
            for i in range(len(queries))
        ]

    def styled(self, style: str) -> Model:
        """The model with the pictures of one style as its database."""
        return self.model.replace(
            database=self.database.where(f"style == '{style}'"), proposal=None
        )


def held_out() -> Searchable | None:
    """The pictures of concepts that were never trained on; None where the package has none."""
    folder = (shipped("pictograms") or Path("pictograms")).parent / "held_out"
    if not folder.is_dir():
        return None
    database = open_database(folder)
    assert isinstance(database, Searchable)
    return database


def _neighbors(model: Model, out: Generation, i: int) -> list[Any]:
    assert isinstance(model.database, Searchable)
    rows = out.neighbors.indices[i].tolist()
    return [model.database.image(row) for row in rows if row >= 0]


def _save(picture: Any, file: Path) -> None:
    with atomic_write(file) as partial:
        picture.save(partial, "PNG")
