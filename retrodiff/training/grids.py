"""Pictures of what a model can do so far: query | neighbors | samples, the same ones each time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrodiff.disk.files import atomic_write, place
from retrodiff.interfaces import Generator, Randomness, member
from retrodiff.model import Model
from retrodiff.model.asking import conditioned
from retrodiff.numbers import whole
from retrodiff.pictures.sheet import Line, Section, draw_sheet
from retrodiff.randomness import normal
from retrodiff.training.data import TrainingSet
from retrodiff.training.images import pixels
from retrodiff.training.watching import Moment, forgiving, is_due, undisturbed

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 8
"""Most neighbors of a query that are drawn."""


class Grids:
    """Writes a PNG of query | neighbors | samples every some steps, with the averaged weights.

    Queries, neighbors and noise are the same in every picture, so that two pictures differ by what
    was learned between them. Queries are held-out images and, below them, training images: where
    only the second look right, images are learned by heart.

    Args:
        folder: receives ``samples-000400.png`` and its siblings.
        data: held-out images with their neighbors in D; or training images, if there are no others.
        every: steps between pictures; there is one after the last step, too.
        trained: training images that are asked as well; None: none are.
        lines: queries from each set, evenly spaced; of ``trained`` half as many.
        samples: images per query.
        steps: of the sampler; None: the model's.
        seed: of the noise.
        side: of an image in the picture, in pixels.

    Examples:
        >>> import torch
        >>> from retrodiff import presets
        >>> from retrodiff.encoders import ClassNames
        >>> from retrodiff.training import Grids, TrainingSet, fit
        >>> names = ClassNames(("black", "white"))
        >>> images = torch.tensor([-1.0, 1.0]).repeat(8).view(16, 1, 1, 1).expand(-1, 1, 8, 8)
        >>> data = TrainingSet.alone(images, names.encode_text(["black", "white"] * 8))
        >>> grids = Grids("run", data, every=2, steps=2)
        >>> options = {"steps": 2, "batch_size": 8, "lr": 1e-3, "progress": False}
        >>> result = fit(presets.ldm(encoder=names), data, watch=[grids], **options)
        >>> grids.file(2).name
        'samples-000002.png'
    """

    def __init__(
        self,
        folder: str | Path,
        data: TrainingSet,
        every: int,
        *,
        trained: TrainingSet | None = None,
        lines: int = 4,
        samples: int = 2,
        steps: int | None = None,
        seed: int = 0,
        side: int = 64,
    ) -> None:
        self.folder = place(folder)
        self.data, self.trained = data, trained
        self.every, self.lines = whole("every", every), whole("lines", lines)
        self.samples, self.side = whole("samples", samples), whole("side", side)
        self.steps = None if steps is None else whole("steps", steps)
        self.seed = whole("seed", seed, 0)
        self.latest: tuple[int, Image] | None = None
        """Steps done and picture of the last one of this sitting."""

    def draw(self, model: Model, title: str = "") -> Image:
        """The picture of a model as it is now.

        Args:
            model: in evaluation mode.
            title: what is asked, above the first lines.
        """
        device = member(model.generating(), Generator, "device")
        with undisturbed(device):
            asked = self._lines(model, self.data, self.lines, 0)
            sections = [Section(title or "Held-out images", asked)]
            if self.trained is not None:
                asked = self._lines(model, self.trained, max(1, self.lines // 2), self.lines)
                sections.append(Section("Training images", asked))
        return draw_sheet(sections, self.side)

    def file(self, done: int) -> Path:
        """Where the picture after some steps is."""
        return self.folder / f"samples-{done:06d}.png"

    def begin(self, done: int) -> None:
        """Does nothing: the first picture comes after some steps."""

    def look(self, moment: Moment) -> None:
        """Draws, if it is time."""
        if not is_due(moment.done, moment.steps, self.every):
            return
        title = f"Held-out images, after step {moment.done:,} ({moment.images:,} images seen)"
        picture = self.draw(moment.averaged(), title)
        self.latest = (moment.done, picture)
        file = self.file(moment.done)
        with forgiving(str(file)), atomic_write(file) as partial:
            picture.save(partial, format="PNG")

    def state(self) -> dict[str, Tensor]:
        """Nothing: a picture depends on the weights alone."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` returned."""

    def _lines(self, model: Model, data: TrainingSet, most: int, first: int) -> list[Line]:
        """Some lines of one set, whose randomness begins with that of line ``first``."""
        rows = torch.linspace(0, len(data) - 1, min(most, len(data))).round().long()
        asking = rows if data.pairing is None else data.pairing.condition[rows]
        _, query, neighbors = data.batch(rows, model.k)
        again = [i for i in range(len(rows)) for _ in range(self.samples)]
        numbers = range(first * self.samples, first * self.samples + len(again))
        generating = model.generating()
        latents = model.sample_latents(
            context=conditioned(model.conditioner, query.rows(again), neighbors.rows(again)),
            noise=normal(
                Randomness.of(self.seed, numbers, "noise"), (len(again), *generating.shape)
            ),
            steps=self.steps,
            generator=Randomness.of(self.seed, numbers, "sampler"),
        )
        made = generating.decode(latents).float().cpu().split(self.samples)
        shown = pixels(data.images, asking)
        blank = torch.ones(3, *shown.shape[-2:])
        lines: list[Line] = []
        for i, row in enumerate(asking.tolist()):
            name = name_of(data.images, row)
            near = neighbors.indices[i].flatten()[:SHOWN].tolist()
            said = [f"{s:.2f}" for s in neighbors.similarity[i].flatten()[:SHOWN].tolist()]
            query_shown = shown[i] if shown.shape[1] in (1, 3) else name
            pictures = [picture_of(data.database, j, blank) for j in near]
            lines.append(Line(query_shown, pictures, made[i], name, said))
        return lines


def name_of(images: Any, row: int) -> str:
    """What an image is called: its file, if its set knows."""
    name = getattr(images, "name", None)
    return f"image {row}" if name is None else str(name(row))


def picture_of(database: Any, row: int, blank: Tensor) -> Tensor:
    """A database row's picture; blank where neither thumbnail nor file is at hand."""
    image = getattr(database, "image", None)
    try:
        return blank if image is None else image(row)
    except (OSError, ValueError):
        return blank
