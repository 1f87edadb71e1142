"""The trainings of all studies in one table, and how one is run: stopped and continued at will."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from embeddings import WIDTH, Embeddings
from scale import Scale
from torch import Tensor

from retrodiff import Builder
from retrodiff.diffusion import (
    ClassifierFree,
    DPMpp2M,
    Dropped,
    EDMDenoiser,
    NeighborEmbeddings,
    Pooled,
    Rescaled,
    Unconditional,
)
from retrodiff.interfaces import Query, Retriever
from retrodiff.model import Model
from retrodiff.networks.principal import PrincipalPatches
from retrodiff.networks.unet import UNet
from retrodiff.retrieval import ExcludeSelf, NearestNeighbors, neighbor_table
from retrodiff.training import TrainingSet, cosine, fit

MOST = 16
"""Neighbors that are looked up for each picture; trainings take the first k."""

WIDTHS = {"full": (3, 2), "half": (2, 2), "quarter": (2, 1)}
"""Channels in thirds of the scale's, and levels of the UNet."""


@dataclass(frozen=True)
class Training:
    """What one training differs in from the first.

    Args:
        name: of its folder.
        retrieval: False: the network without retrieval, LDM.
        width: of the network, see `WIDTHS`.
        k: neighbors of a picture.
        phi: encoder of the conditions.
        classes: group of classes that X is restricted to.
        database: ``database``, crops of it, ``trained`` (X itself), or ``vehicles``, D's pictures
            of them.
        exclude: leave a picture out of its own neighbors, where D is X.
        seed: of weights, order and noise.
    """

    name: str
    retrieval: bool = True
    width: str = "full"
    k: int = 4
    phi: str = "lite0"
    classes: str = "all"
    database: str = "database"
    exclude: bool = False
    seed: int = 0


TRAININGS: dict[str, Training] = {
    training.name: training
    for training in (
        # (a), and what nearly all other studies ask
        Training("rdm"),
        Training("ldm", retrieval=False),
        Training("rdm seed 1", seed=1),
        Training("ldm seed 1", retrieval=False, seed=1),
        Training("rdm half", width="half"),
        Training("rdm quarter", width="quarter"),
        # (b)
        Training("rdm k=1", k=1),
        Training("rdm k=16", k=16),
        Training("rdm k=2", k=2),
        Training("rdm k=8", k=8),
        # (d)
        Training("rdm animals", classes="animals"),
        Training("ldm animals", retrieval=False, classes="animals"),
        Training("rdm two", classes="two"),
        Training("ldm two", retrieval=False, classes="two"),
        # (c)
        Training("rdm random phi", phi="random"),
        Training("rdm vqgan phi", phi="vqgan"),
        # (g)
        Training("rdm animals from vehicles", classes="animals", database="vehicles"),
        # (i)
        Training("rdm own", database="trained"),
        Training("rdm own excluded", database="trained", exclude=True),
        # (h)
        Training("rdm crops16", database="crops16"),
        Training("rdm crops8", database="crops8"),
        # second seeds of (a)
        Training("rdm half seed 1", width="half", seed=1),
        Training("rdm quarter seed 1", width="quarter", seed=1),
    )
}
"""In the order in which they are worth their time."""

PARTS = (4, 2)
"""A training's model is also kept after a fourth and a half of its steps."""


def moments(scale: Scale) -> list[int]:
    """Steps after which a model is kept, the last included."""
    return [*(max(1, scale.steps // part) for part in PARTS), scale.steps]


class Clock:
    """Seconds of training, over all sittings: of the processors where they do the work.

    Other work on the machine does not count. On a GPU it is the time on the wall.

    Args:
        log: file that gets a line now and then.
        every: steps between lines.
        device: where the network is.
    """

    def __init__(self, log: Path, every: int, device: str) -> None:
        self.log, self.every = log, every
        self.now = time.process_time if device == "cpu" else time.perf_counter
        self.seconds = torch.zeros((), dtype=torch.float64)
        self.last = 0.0
        self.losses: list[float] = []

    def begin(self, done: int) -> None:
        """Before the first step of a sitting."""
        del done
        self.last = self.now()

    def look(self, moment: Any) -> None:
        """After each step."""
        now = self.now()
        self.seconds += now - self.last
        self.last = now
        self.losses.append(moment.loss)
        if moment.done % self.every == 0 or moment.last:
            mean = sum(self.losses) / len(self.losses)
            with self.log.open("a") as file:
                file.write(f"step {moment.done} loss {mean:.4f} {float(self.seconds):.0f} s\n")
            self.losses.clear()

    def state(self) -> dict[str, Tensor]:
        """The seconds so far."""
        return {"seconds": self.seconds.clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Goes on from there."""
        self.seconds = state.get("seconds", self.seconds).clone()


@dataclass
class Trainer:
    """Runs trainings and opens what came of them.

    Args:
        scale: of the studies.
        embeddings: of the photographs.
        folder: a folder for each training is made here.
        device: where networks run.
    """

    scale: Scale
    embeddings: Embeddings
    folder: Path
    device: str = "cpu"
    _first_stage: Any = field(default=None, repr=False)

    def done(self, training: Training) -> bool:
        """Whether it is finished."""
        return (self.folder / training.name / "done.txt").exists()

    def train(self, training: Training) -> None:
        """Trains it, or goes on with it; does nothing where it is finished."""
        folder = self.folder / training.name
        if self.done(training):
            return
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(training.seed)
        scale = self.scale
        clock = Clock(folder / "log.txt", max(1, scale.steps // 24), self.device)
        fitted = fit(
            self.fresh(training).to(self.device),
            self.data(training),
            steps=scale.steps,
            batch_size=scale.batch,
            lr=cosine(2e-3, scale.steps, max(1, min(60, scale.steps // 10))),
            optimizer="muon",
            precision="auto",
            ema=0.995,
            seed=training.seed,
            checkpoint=folder / "training.safetensors",
            checkpoint_every=max(1, min(100, scale.steps // 4)),
            resume=True,
            snapshots=moments(scale)[:-1],
            watch=[clock],
            progress=False,
        )
        for step, model in {**fitted.snapshots, scale.steps: fitted.model}.items():
            model.replace(database=None).save(folder / f"step {step}", overwrite=True)
        parameters = sum(p.numel() for p in fitted.model.denoiser.parameters())  # type: ignore
        (folder / "done.txt").write_text(f"{float(clock.seconds):.1f} {parameters}\n")

    def facts(self, training: Training) -> tuple[float, int]:
        """Seconds of training, and parameters."""
        seconds, parameters = (self.folder / training.name / "done.txt").read_text().split()
        return float(seconds), int(parameters)

    def trained(self, training: Training, step: int) -> Model:
        """The model with the averaged weights after some steps; the database is to be given."""
        return Model.load(self.folder / training.name / f"step {step}").to(self.device)

    def fresh(self, training: Training) -> Model:
        """The model to be trained: EDM on whitened principal components of 4x4 patches."""
        thirds, levels = WIDTHS[training.width]
        width = min(WIDTH, self._width(training)) if training.retrieval else None
        channels = max(32, self.scale.channels * thirds // 3 // 32 * 32)
        torch.manual_seed(training.seed)
        network = UNet(
            in_channels=16,
            out_channels=16,
            size=8,
            channels=channels,
            multipliers=(1,) * levels,
            blocks_per_level=1,
            attention_factors=(1, 2)[:levels],
            context_width=width,
            vector_width=width,
        )
        denoiser = EDMDenoiser(
            network, sigma_data=1.0, mean=0.3, std=1.4, sigma_min=0.01, sigma_max=40.0
        )
        recipe = (
            Builder()
            .denoiser(denoiser)
            .autoencoder(self.first_stage())
            .retriever(NearestNeighbors())
            .sampler(DPMpp2M())
            .guidance(ClassifierFree(1.0))
            .conditioner(Unconditional())
            .defaults(k=training.k, steps=self.scale.sampler_steps)
        )
        if width is not None:
            conditions = Rescaled(Pooled(NeighborEmbeddings("unit")), width**0.5)
            recipe = recipe.conditioner(Dropped(conditions, 0.1))
        return recipe.build()

    def data(self, training: Training) -> TrainingSet:
        """X with its neighbors."""
        x = self.embeddings.photographs.trained
        rows = x.rows(training.classes)
        if not training.retrieval:
            return TrainingSet.alone(x.images[rows])
        query, database = self.query(training), self.database(training)
        table = neighbor_table(query, database, MOST, self.retriever(training))
        return TrainingSet(x.images[rows], query.embedding, table, database)

    def query(self, training: Training) -> Query:
        """The pictures of X, as queries; where D is X, they say which rows they are."""
        rows = self.embeddings.photographs.trained.rows(training.classes)
        values = self.embeddings.conditions(self.phi(training), "trained")[rows]
        return Query(values, ids=rows if training.database == "trained" else None)

    def retriever(self, training: Training) -> Retriever:
        """Which rows are a training picture's neighbors."""
        return ExcludeSelf(NearestNeighbors()) if training.exclude else NearestNeighbors()

    def database(self, training: Training) -> Any:
        """D as it was trained with."""
        phi = self.phi(training)
        if training.database == "vehicles":
            rows = self.embeddings.photographs.database.rows("vehicles")
            return self.embeddings.database(phi, "database", rows)
        return self.embeddings.database(phi, training.database)

    def phi(self, training: Training) -> str:
        """Name of the encoder, at this scale."""
        return self.scale.phi if training.phi == "lite0" else training.phi

    def first_stage(self) -> PrincipalPatches:
        """Sixteen whitened components of the 48 numbers of a patch, fitted on X."""
        if self._first_stage is None:
            images = self.embeddings.photographs.trained.images[:2000] / 127.5 - 1
            self._first_stage = PrincipalPatches.fit(images, patch=4, components=16)
        return copy.deepcopy(self._first_stage)  # a model that is moved takes it along

    def _width(self, training: Training) -> int:
        return self.embeddings.conditions(self.phi(training), "database").shape[1]


def needed(names: Sequence[str]) -> list[Training]:
    """Trainings by name, in the table's order.

    Raises:
        ValueError: there is none of that name.
    """
    if unknown := [name for name in names if name not in TRAININGS]:
        raise ValueError(f"no training {unknown[0]!r}; there are {', '.join(TRAININGS)}")
    return [training for name, training in TRAININGS.items() if name in names]
