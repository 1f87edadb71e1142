"""Points of the curves: a trained model, how it is asked, and what is measured of its samples."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from embeddings import Embeddings
from photographs import CLASSES, enlarged, numbers
from scale import Scale
from torch import Tensor
from training_table import TRAININGS, Trainer, Training, moments

from retrodiff.disk.files import atomic_write, write_json
from retrodiff.disk.tensors import map_file, write_hashed_tensors
from retrodiff.evaluation import (
    authenticity,
    copying,
    density_coverage,
    frechet_distance,
    kernel_distance,
    mind,
    neighbor_echo,
    precision_recall,
)
from retrodiff.interfaces import Query
from retrodiff.precision import best_precision
from retrodiff.retrieval import NearestNeighbors, NeighborCounts, TopM, Uniform, neighbor_table

REAL = "real photographs"
ROUND_TRIP = "the first stage's round trip"
REAL_PICTURES = (REAL, ROUND_TRIP)
"""Points without a model: pictures of X as they are, and through the first stage."""

NULL = 2000
"""Held-out pictures that say how near pictures come to others without any copying."""


@dataclass(frozen=True)
class Point:
    """One way to ask one model.

    Args:
        training: name in the table, or one of `REAL_PICTURES`.
        part: of the training's steps: 0 a fourth, 1 a half, 2 all.
        k: neighbors; None: as trained.
        database: ``trained with``, ``1k`` or ``5k`` rows of it, or D's pictures of a group.
        proposal: ``p_D``, ``uniform``, or ``top`` and the share of p_D's support.
        guidance: s.
        reference: group of classes that held-out pictures are taken from.
        copies: whether copying is measured.
        classes: group whose share among the samples is judged.
    """

    training: str
    part: int = 2
    k: int | None = None
    database: str = "trained with"
    proposal: str = "p_D"
    guidance: float = 1.0
    reference: str = "all"
    copies: bool = False
    classes: str = ""

    @property
    def asked(self) -> str:
        """Name of the samples: what they depend on."""
        parts = [self.training, f"part {self.part}", f"k {self.k}", self.database]
        parts += [self.proposal, f"s {self.guidance:g}"]
        return re.sub(r"[^\w.=-]+", "_", " ".join(parts))

    @property
    def measured(self) -> str:
        """Name of the numbers."""
        more = f"against {self.reference} {self.classes}{' copies' * self.copies}"
        return re.sub(r"[^\w.=-]+", "_", more.strip())


@dataclass
class Points:
    """Samples points and measures them; what is there already is kept.

    Args:
        scale: of the studies.
        trainer: opens the models.
        folder: a folder for each set of samples is made here.
    """

    scale: Scale
    trainer: Trainer
    folder: Path
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def embeddings(self) -> Embeddings:
        """Of the photographs."""
        return self.trainer.embeddings

    def ready(self, point: Point) -> bool:
        """Whether its training is finished."""
        return point.training in REAL_PICTURES or self.trainer.done(TRAININGS[point.training])

    def numbers(self, point: Point) -> dict[str, Any] | None:
        """What was measured; None: nothing yet."""
        file = self.folder / point.asked / f"{point.measured}.json"
        if not file.exists():
            return None
        import json

        return json.loads(file.read_text())

    def measure(self, point: Point) -> dict[str, Any]:
        """Samples and measures, where that is not done yet."""
        if (found := self.numbers(point)) is not None:
            return found
        images, rows = self._samples(point)
        features = self._features(point, images)
        found = {**asdict(point), **self._facts(point), "n": len(images)}
        found |= self._quality(features, point)
        if point.copies:
            found |= self._copies(features, rows, point)
        if point.classes:
            found["share_judged"] = self._share(features, point.classes)
            found["share_real"] = self._share(self._real(point.classes), point.classes)
        write_json(self.folder / point.asked / f"{point.measured}.json", found)
        return found

    # --- samples -------------------------------------------------------------------------------

    def _samples(self, point: Point) -> tuple[Tensor, Tensor]:
        """Pictures (n, 3, 32, 32) uint8, and the rows that conditioned them (n, k)."""
        file = self.folder / point.asked / "samples.safetensors"
        if not file.exists():
            images, rows = self._sampled(point)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_hashed_tensors(file, {"images": images, "rows": rows}, {})
            self._sheet(point, images, rows)
        found = map_file(file, again="delete it").tensors
        return found["images"].clone(), found["rows"].clone()

    def _sampled(self, point: Point) -> tuple[Tensor, Tensor]:
        n, none = self.scale.samples, torch.empty(self.scale.samples, 0, dtype=torch.int64)
        x = self.embeddings.photographs.trained
        if point.training in REAL_PICTURES:
            images = x.images[x.rows(point.reference)][:n]
            if point.training == ROUND_TRIP:
                stage = self.trainer.first_stage()
                images = _bytes(stage.decode(stage.encode(images / 127.5 - 1)))
            return images, none[: len(images)]
        training = TRAININGS[point.training]
        model = self.trainer.trained(training, moments(self.scale)[point.part])
        how: dict[str, Any] = {"n": n, "guidance": point.guidance, "seed": 0, "batch_size": 250}
        if training.retrieval:
            database = self.database(training, point.database)
            model = model.replace(database=database, proposal=self._proposal(point, database))
            how["k"] = point.k or training.k
        if self.scale.compiled:
            torch.compiler.reset()  # a network's code is kept for a few networks only
            model.compile()
        device = self.trainer.device
        bfloat16 = best_precision(device) == "bfloat16"
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16):
            out = model.sample(**how)
        rows = out.neighbors.indices.flatten(1) if training.retrieval else none
        return _bytes(out.images.float().cpu()), rows.cpu()

    def database(self, training: Training, name: str) -> Any:
        """What is retrieved from."""
        if name == "trained with":
            return self.trainer.database(training)
        rows = self._rows(name)
        return self.embeddings.database(self.trainer.phi(training), "database", rows)

    def _rows(self, name: str) -> Tensor:
        """Rows of D: the first thousands, or those of a group."""
        d = self.embeddings.photographs.database
        if name in ("1k", "5k"):
            return torch.arange(min(len(d) // 2, 1000 * int(name[0])))
        return d.rows(name)

    def _proposal(self, point: Point, database: Any) -> Any:
        if point.proposal == "uniform":
            return Uniform()
        training = TRAININGS[point.training]
        key = ("counts", training.phi, training.database, training.classes, training.exclude)
        key = (*key, point.database, training.k)
        if key not in self._kept:
            query = self.trainer.query(training)
            retriever = self.trainer.retriever(training)
            table = neighbor_table(query, database, training.k, retriever)
            self._kept[key] = table
        counts = NeighborCounts.from_table(self._kept[key], database)
        if point.proposal == "p_D":
            return counts
        return TopM(counts, fraction=float(point.proposal.removeprefix("top ")))

    # --- numbers -------------------------------------------------------------------------------

    def _features(self, point: Point, images: Tensor) -> Tensor:
        file = self.folder / point.asked / "features.safetensors"
        if not file.exists():
            values = self.embeddings.features(images).half()
            write_hashed_tensors(file, {"features": values}, {})
        return map_file(file, again="delete it").tensors["features"].float()

    def _facts(self, point: Point) -> dict[str, Any]:
        if point.training in REAL_PICTURES:
            return {}
        training = TRAININGS[point.training]
        seconds, parameters = self.trainer.facts(training)
        steps = moments(self.scale)[point.part]
        found = {
            "seed": training.seed,
            "parameters": parameters,
            "steps": steps,
            "seconds": round(seconds * steps / self.scale.steps, 1),
        }
        if training.retrieval:
            found["rows"] = len(self.database(training, point.database))
            found["k"] = point.k or training.k
        return found

    def _reference(self, group: str) -> Tensor:
        """Features of held-out pictures: half of all, or of a group the first ones of the whole."""
        if group == "all":
            return self._held()[: len(self.embeddings.photographs.reference)]
        rows = self.embeddings.photographs.held_out.rows(group)
        return self._held()[rows][: self.scale.held_out // 5]

    def _held(self) -> Tensor:
        if "held" not in self._kept:
            self._kept["held"] = self.embeddings.measured("held_out")
        return self._kept["held"]

    def _null(self) -> Tensor:
        """Features of held-out pictures outside of the reference."""
        return self._held()[len(self.embeddings.photographs.reference) :][:NULL]

    def _quality(self, features: Tensor, point: Point) -> dict[str, Any]:
        """Scores, and standard errors by leaving out one group of samples after the other."""
        reference = self._reference(point.reference)
        scores: dict[str, Callable[[Tensor], list[float]]] = {
            "fid": lambda x: [frechet_distance(x, reference).value],
            "precision recall": lambda x: [s.value for s in precision_recall(x, reference)],
        }
        found: dict[str, Any] = {"reference_n": len(reference)}
        groups = torch.arange(len(features)) % self.scale.groups
        for names, score in scores.items():
            whole = score(features)
            without = torch.tensor(
                [score(features[groups != g]) for g in range(self.scale.groups)]
            ).double()
            errors = (without.var(0, correction=0) * (self.scale.groups - 1)).sqrt()
            for name, value, error in zip(names.split(), whole, errors.tolist(), strict=True):
                found |= {name: round(value, 5), f"{name}_error": round(error, 5)}
        kid = kernel_distance(features, reference, subsets=20)
        density, coverage = density_coverage(features, reference)
        more = {"kid": kid, "mind": mind(features, reference), "density": density}
        for name, value in {**more, "coverage": coverage}.items():
            found[name] = round(value.value, 5)
        found["kid_deviation"] = kid.spread
        return found

    def _copies(self, features: Tensor, rows: Tensor, point: Point) -> dict[str, Any]:
        """How near samples come to X, to D and to their own neighbors, above held-out pictures."""
        null = self._null()
        x = self.embeddings.measured("trained")
        sources = {"trained": x}
        training = TRAININGS.get(point.training)
        part = "" if training is None or not training.retrieval else training.database
        if part == "database":
            sources["database"] = self.embeddings.measured("database")
        found: dict[str, Any] = {}
        for name, copies in copying(features, null, sources).items():
            found |= _near(name, copies)
        found["authentic"] = round(authenticity(features, x).value, 5)
        if part in ("database", "trained") and training is not None:
            values = sources[part]
            half = len(self.embeddings.photographs.reference)
            phi = self.trainer.phi(training)
            query = self.embeddings.conditions(phi, "held_out")[half:][: len(null)]
            database = self.database(training, point.database)
            near = neighbor_table(Query(query), database, rows.shape[1], NearestNeighbors())
            if point.database != "trained with":
                own = self._rows(point.database)
                near, rows = own[near.long()], own[rows]
            echo = neighbor_echo(features, rows.tolist(), null, near.tolist(), values)
            found |= _near("neighbors", echo)
        return found

    def _share(self, features: Tensor, group: str) -> float:
        """Share of pictures that a linear judge puts into a group; it learned on the null half."""
        half = len(self.embeddings.photographs.reference)
        labels = self.embeddings.photographs.held_out.labels[half:]
        known = self._held()[half:]
        targets = torch.nn.functional.one_hot(labels, len(CLASSES)).double()
        mean, scale = known.mean(0), known.std(0) + 1e-3

        def rows(x: Tensor) -> Tensor:
            x = (x - mean) / scale
            return torch.cat([x, torch.ones(len(x), 1)], 1).double()

        a = rows(known)
        ridge = 0.1 * len(a) * torch.eye(a.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(a.T @ a + ridge, a.T @ targets)
        chosen = (rows(features) @ weights).argmax(1)
        return round(torch.isin(chosen, numbers(group)).double().mean().item(), 5)

    def _real(self, group: str) -> Tensor:
        rows = self.embeddings.photographs.database.rows(group)[: self.scale.samples]
        return self.embeddings.measured("database")[rows]

    # --- pictures ------------------------------------------------------------------------------

    def _sheet(self, point: Point, images: Tensor, rows: Tensor) -> None:
        """Samples on a sheet; each behind up to four of the pictures that conditioned it."""
        from PIL import Image

        shown = images[:128]
        if rows.shape[1]:
            training = TRAININGS[point.training]
            part = training.database if training.database != "vehicles" else "database"
            pictures = enlarged(self.embeddings.pictures(part))
            at = rows[:32, :4]
            if point.database != "trained with":
                at = self._rows(point.database)[at]
            elif training.database == "vehicles":
                at = self._rows("vehicles")[at]
            gap = torch.full((len(at), 3, 32, 6), 255, dtype=torch.uint8)
            near = pictures[at].movedim(1, -2).flatten(-2)
            shown = torch.cat([near, gap, images[:32], gap, gap], -1)
        across = 4 if rows.shape[1] else 16
        lines = [torch.cat(list(part), -1) for part in shown.split(across)]
        lines = [line for line in lines if line.shape == lines[0].shape]
        sheet = Image.fromarray(torch.cat(lines, -2).movedim(0, -1).contiguous().numpy())
        sheet = sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST)
        with atomic_write(self.folder / point.asked / "sheet.png") as partial:
            sheet.save(partial, format="png")


def _bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def _near(name: str, copies: Any) -> Mapping[str, float]:
    """The numbers of a copying report."""
    excess, error = copies.excess_similarity
    return {
        f"near_{name}": round(copies.rate, 5),
        f"near_{name}_null": round(copies.null_rate, 5),
        f"similarity_{name}": round(excess, 5),
        f"similarity_{name}_error": round(error, 5),
    }
