"""What the page asks of model and databases, without the page: neighbors, samples, pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import torch
from torch import Tensor

from retrodiff.databases import Searchable
from retrodiff.databases.build.encoding import encode_images
from retrodiff.diffusion.generator import DiffusionGenerator
from retrodiff.interfaces import Mode, Neighbors, Query
from retrodiff.model import Estimate, Model
from retrodiff.model.attribution import MEASURE, Attributing
from retrodiff.model.generated import Generation
from retrodiff.model.request import read_request
from retrodiff.numbers import LARGEST_SEED, real, whole
from retrodiff.pictures.decoding import UnreadableImage, read_image
from retrodiff.pictures.thumbnails import thumbnail
from retrodiff.retrieval import Pinned, Uniform
from retrodiff.retrieval.known_words import warning_of_strange
from retrodiff.serving import ServerLimits
from retrodiff.text import printable
from retrodiff.ui.question import Question
from retrodiff.ui.shelves import Shelves

LIMITS = ServerLimits(k=32, upload=16 * 10**6, body=24 * 10**6, requests=64, samples=16, text=500)
"""Of a page: pictures are sent in base64, within the body of a request."""

SHOWN = 12
"""Neighbors that are seen, at least: those that condition an image, and further ones to pin."""

DOUBTED = 20_000
"""Rows up to which it is looked up whether the database knows a prompt's words; more take too long
for neighbors that come with every letter."""

FRAMES = 6
"""Estimates that are decoded while images form; decoding costs time, too."""


class Stopped(Exception):
    """Nobody waits for these samples any more."""


@dataclass(frozen=True, eq=False)
class Neighborhood:
    """What the chosen databases know about a question.

    Args:
        database: all chosen rows.
        used: those that would condition a sample; empty where none does, or where each sample
            draws rows of its own.
        further: the next nearest rows.
        note: one line that the visitor should know; empty: none.

    Examples:
        >>> from retrodiff.testing import small_database
        >>> from retrodiff.ui import Neighborhood
        >>> Neighborhood(small_database(), None, None, note="the filter leaves no row").note
        'the filter leaves no row'
    """

    database: Searchable
    used: Neighbors | None
    further: Neighbors | None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Forming:
    """Images that are being made.

    Args:
        images: (b, 3, h, w) in [-1, 1], as estimated so far.
        step: steps made.
        steps: to be made in all.
        done: the finished ones; None: they are not.

    Examples:
        >>> import torch
        >>> from retrodiff.ui import Forming
        >>> forming = Forming(torch.zeros(4, 3, 64, 64), step=3, steps=16)
        >>> forming.done is None
        True
    """

    images: Tensor
    step: int
    steps: int
    done: Generation | None = None


class Studio:
    """A model with its open databases.

    Searches take turns, and so do samplings, which searches do not wait for. Safe to be used by
    several threads.

    Args:
        model: that is asked; its own database does not matter.
        shelves: the databases that it may be asked with.
        name: of the model, for the page and for what its pictures say of their origin.
        limits: of questions and pictures.

    Raises:
        ValueError: the databases were not made with the model's encoder.

    Examples:
        >>> from retrodiff.ui import Question, Shelf, Shelves, Studio
        >>> studio = Studio(model, Shelves([Shelf("art", art)]), "my model")  # doctest: +SKIP
        >>> asked = Question(prompt="a bell", names=("art",))
        >>> for forming in studio.samples(asked):  # doctest: +SKIP
        ...     print(forming.step)
    """

    def __init__(
        self, model: Model, shelves: Shelves, name: str = "model", limits: ServerLimits = LIMITS
    ):
        if model.encoder is not None:
            what = model.encoder.fingerprint.disagreement(shelves.fingerprint)
            if what is not None:
                raise ValueError(
                    f"model and databases disagree: {what}: open databases that were built with "
                    "the model's encoder, or name their model with --model"
                )
        self.model, self.shelves, self.name, self.limits = model, shelves, name, limits
        self.attributed = _can_attribute(model)
        self._search, self._sample = Lock(), Lock()

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Ways in which this model can be asked, the usual one first."""
        modes: list[Mode] = []
        if self.model.encoder is not None:
            modes = ["text+neighbors", "neighbors", "text"]
            if not self.model.conditioner.uses_neighbors:
                modes = ["text"]
        return (*modes, "unconditional")

    @property
    def reads_text(self) -> bool:
        """Whether prompts can be asked with."""
        return hasattr(self.model.encoder, "encode_text")

    # --- neighbors -------------------------------------------------------------------------------

    def neighbors(self, question: Question) -> Neighborhood:
        """What the chosen databases have nearest to a question, with records.

        Raises:
            ValueError: the question does not fit model or databases.
        """
        self._check(question)
        database = self.shelves.open(question.names, question.shares, question.where)
        if question.mode == "unconditional":
            return Neighborhood(database, None, None, "Each picture draws a row and its neighbors.")
        if question.empty:
            return Neighborhood(database, None, None)
        with self._search:
            model = self._asked(question, database)
            asker = model.asker()
            query = self._query(question, model)
            k = model.k if question.k is None else question.k
            used = asker.neighbors(query, question.mode, k)
            used = used.take((used.indices[0] >= 0).nonzero().flatten())
            taken = set(used.indices[0].tolist())
            reach = min(max(SHOWN, used.k), len(database) - len(question.dropped))
            near = used
            if reach > 0:
                near = model.retriever.retrieve(query, database, reach)
            columns = [i for i, row in enumerate(near.indices[0].tolist()) if row not in taken]
            further = near.take(torch.tensor(columns[: max(0, SHOWN - used.k)], dtype=torch.int64))
            records = database.records(further.indices[0])
            further = dataclasses.replace(further, records=(tuple(records),))
            note = None
            if question.picture is None and len(database) <= DOUBTED:
                shown = used if used.k else further
                prompts = [question.prompt]
                note = warning_of_strange(model.encoder, prompts, database, shown)
        return Neighborhood(database, used, further, _said(note))

    def picture(self, data: bytes) -> tuple[Tensor, bytes]:
        """A picture file, to be asked with: its embedding (1, d), and a small copy of it.

        Raises:
            ValueError: it is too large, no picture, or the model has no encoder.
        """
        if len(data) > self.limits.upload:
            raise ValueError(
                f"the picture has {len(data) / 1e6:.1f} MB, more than "
                f"{self.limits.upload / 1e6:g} MB: send a smaller one"
            )
        if self.model.encoder is None:
            raise ValueError("this model has no encoder, so pictures cannot be asked with")
        with self._search, torch.no_grad():  # one picture is unpacked at a time
            try:
                pixels = read_image(data)
            except UnreadableImage as error:
                raise ValueError(f"the picture cannot be read: {printable(error)}") from None
            embedding = encode_images(self.model.encoder, [pixels])
            return embedding.cpu().float(), thumbnail(pixels, 256)

    # --- samples ---------------------------------------------------------------------------------

    def samples(self, question: Question) -> Iterator[Forming]:
        """Images as they form; the last value has them finished.

        The work is done in a thread, which ends with the iterator.

        Raises:
            ValueError: the question does not fit model or databases.
        """
        self._check(question)
        database = self.shelves.open(question.names, question.shares, question.where)
        model = self._asked(question, database)
        if question.empty and question.mode != "unconditional":
            raise ValueError("there is nothing to ask: write a prompt, or give a picture")
        told: SimpleQueue[Estimate | Generation | Exception] = SimpleQueue()
        stop = Event()
        run = Thread(target=self._run, args=(model, question, told, stop), daemon=True)
        run.start()
        try:
            yield from self._watched(question, told)
        finally:
            stop.set()
            run.join()

    def _run(self, model: Model, question: Question, told: SimpleQueue[Any], stop: Event) -> None:
        """Samples, and tells how it goes."""

        def stepped(estimate: Estimate) -> None:
            if stop.is_set():
                raise Stopped
            seen = [math.ceil(i * estimate.steps / (FRAMES + 1)) for i in range(1, FRAMES + 1)]
            if estimate.step in seen:
                told.put(estimate)

        while not self._sample.acquire(timeout=0.1):
            if stop.is_set():
                return
        try:
            told.put(
                model.sample(
                    **self._given(question),
                    mode=question.mode,
                    k=question.k,
                    guidance=question.guidance,
                    sampler=question.sampler,
                    steps=question.steps,
                    seed=question.seed,
                    attribution=MEASURE if self._paints(question, model) else False,
                    on_step=stepped,
                )
            )
        except Exception as error:  # the visitor's thread raises it
            told.put(error)
        finally:
            self._sample.release()

    def _watched(self, question: Question, told: SimpleQueue[Any]) -> Iterator[Forming]:
        """What the sampling tells, decoded; older estimates are left out where a newer is there."""
        images: Tensor | None = None
        while True:
            value = told.get()
            while isinstance(value, Estimate):
                try:
                    value = told.get_nowait()
                except Empty:
                    break
            if isinstance(value, Exception):
                raise value
            if isinstance(value, Generation):
                steps = int(value.settings["steps"])
                yield Forming(value.images, steps, steps, value)
                return
            part = value.images()
            shown = part.new_ones(question.n, *part.shape[1:]) if images is None else images.clone()
            shown[value.rows] = part
            images = shown
            yield Forming(shown, value.step, value.steps)

    # --- helpers ---------------------------------------------------------------------------------

    def warm(self) -> None:
        """Loads weights and searches once, so that the first visitor need not wait."""
        names = self.shelves.first
        if self.reads_text:
            self.neighbors(Question(prompt="a picture", names=names, mode=self.modes[0]))
        elif self.model.encoder is not None:
            encode_images(self.model.encoder, [torch.full((3, 64, 64), 127, dtype=torch.uint8)])

    def _asked(self, question: Question, database: Searchable) -> Model:
        """The model on the chosen rows, with those pinned that are pinned."""
        changes: dict[str, Any] = {}
        if question.pinned or question.dropped:
            pinned = Pinned(self.model.retriever, question.pinned, question.dropped)
            changes["retriever"] = pinned
        if database is not self.model.database:
            changes["database"] = database
            changes["proposal"] = None if self.model.proposal is None else Uniform()
        if question.mode == "unconditional" and not changes.get("proposal", self.model.proposal):
            changes["proposal"] = Uniform()
        return self.model.replace(**changes) if changes else self.model

    def _paints(self, question: Question, model: Model) -> bool:
        """Whether rows of a database condition the images, and it is recorded what they paint."""
        k = model.k if question.k is None else question.k
        rows = {"text": 0, "text+neighbors": k - 1}.get(question.mode, k)
        return self.attributed and rows > 0

    def _given(self, question: Question) -> dict[str, Any]:
        """The argument of `Model.sample` that says what is asked."""
        if question.mode == "unconditional":
            return {"n": question.n}
        if question.picture is not None:
            embedding = question.picture.expand(question.n, -1)
            return {"query": Query(embedding, ("a picture",) * question.n)}
        return {"prompts": [question.prompt] * question.n}

    def _query(self, question: Question, model: Model) -> Query:
        """The query of one image, as `Model.sample` makes it."""
        given = {name: None for name in ("prompts", "classes", "images", "query", "n")}
        asked = self._given(dataclasses.replace(question, n=1))
        request = read_request(
            {**given, **asked},
            question.mode,
            k=model.k if question.k is None else question.k,
            steps=model.steps,
            seed=question.seed,
            batch_size=1,
        )
        return model.asker().queries(request)

    def _check(self, question: Question) -> None:
        """Bounds of what a page may ask."""
        limits = self.limits
        if question.mode not in self.modes:
            raise ValueError(
                f"this model cannot be asked in mode {printable(question.mode)!r:.40}: choose one "
                f"of {', '.join(self.modes)}"
            )
        for name, text in (("prompt", question.prompt), ("filter", question.where)):
            if len(text) > limits.text:
                raise ValueError(
                    f"the {name} has {len(text):,} characters, more than {limits.text}: shorten it"
                )
        whole("number of samples", question.n, 1, limits.samples)
        whole("seed", question.seed, 0, LARGEST_SEED)
        if question.k is not None:
            whole("k", question.k, 0, limits.k)
        if question.steps is not None:
            whole("steps", question.steps, 1, limits.steps)
        if question.guidance is not None:
            real("guidance", question.guidance, 0, 100)
        if question.picture is None and not question.empty and not self.reads_text:
            if question.mode != "unconditional":
                raise ValueError(
                    "this model's encoder takes pictures only: give one in place of a prompt"
                )


def _can_attribute(model: Model) -> bool:
    """Whether it can be recorded which neighbor painted what."""
    generator = model.generating()
    if not model.conditioner.uses_neighbors or not isinstance(generator, DiffusionGenerator):
        return False
    try:
        Attributing(generator, MEASURE)
    except ValueError:
        return False
    return True


def _said(note: str | None) -> str:
    """A warning as a sentence."""
    return "" if not note else note[0].upper() + note[1:] + "."
