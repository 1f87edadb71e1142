"""Measures the pictogram model: concept, style, unseen concepts, copying, fidelity, seconds.

    python benchmarks/pictograms/figures.py
    python benchmarks/pictograms/figures.py --model runs/pictograms/half --out runs/half_figures

The judges (`judges.py`) know nothing of the model's encoder. They are asked about real pictures,
too, and about these through the first stage and back: the ceiling for every network on it.

Writes ``figures.json``, ``best_and_worst.png`` and ``copies.png`` (the twenty nearest pairs).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from judges import Judges
from sets import STYLES, Pictograms
from torch import Tensor

from retrodiff.databases import ArrayDatabase, Union
from retrodiff.demo.poster import Cell, Grid, draw_poster
from retrodiff.evaluation.copying import copying
from retrodiff.evaluation.fidelity import kernel_distance
from retrodiff.evaluation.metrics import mind
from retrodiff.model import Model
from retrodiff.pictures import to_bytes

OWN = STYLES[:3]
GUIDANCE = (1.0, 2.0, 3.0, 4.0, 6.0)
MODES = ("text", "neighbors", "text+neighbors")


class Asked:
    """Concepts of a split, and what the model draws for them.

    Args:
        judges: which know the pictures.
        split: of the concepts.
        n: how many; None: all.
    """

    def __init__(self, judges: Judges, split: str, n: int | None) -> None:
        there = {
            (r["concept"], r["style"])
            for r in judges.sets.rows
            if r["split"] == split and r["style"] in STYLES
        }
        whole = sorted({c for c, _ in there if all((c, style) in there for style in STYLES)})
        drawn = random.Random(0).sample(whole, len(whole) if n is None else min(n, len(whole)))
        title = {r["concept"]: r["title"] for r in judges.sets.rows}
        self.titles = [title[c] for c in drawn]
        self.concepts = torch.tensor([judges.names.index(c) for c in drawn])

    def sample(
        self,
        model: Model,
        mode: Any,
        seed: int,
        steps: int | None,
        pictures: Tensor | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """One picture of each concept in bytes (n, 3, 64, 64), asked by title or by a picture."""
        given: dict[str, Any] = {"prompts": self.titles}
        if pictures is not None:
            given = {"images": pictures / 127.5 - 1}
        how: dict[str, Any] = {"mode": mode, "seed": seed, "steps": steps, "guidance": guidance}
        return to_bytes(model.sample(**given, **how).images)


def main() -> None:
    """Samples, judges, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/pictograms"))
    parser.add_argument("--model", default="pictograms", help="a name or a folder")
    parser.add_argument("--out", type=Path, default=Path("runs/pictograms/figures"))
    parser.add_argument("--concepts", type=int, default=200, help="trained ones")
    parser.add_argument("--unseen", type=int, help="held-out concepts; all, if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of the sampler")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sets = Pictograms.read(options.data)
    judges = Judges(sets)
    model = Model.load(options.model)
    measured = Measured(options, sets, judges, model)
    found = measured.all()
    (options.out / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


class Measured:
    """All figures of one model.

    Args:
        options: of the command line.
        sets: all pictures.
        judges: of them.
        model: with D as its database.
    """

    def __init__(
        self, options: argparse.Namespace, sets: Pictograms, judges: Judges, model: Model
    ) -> None:
        self.options, self.sets, self.judges, self.model = options, sets, judges, model
        self.database: Any = model.database
        self.trained = Asked(judges, "train", options.concepts)
        self.unseen = Asked(judges, "held-out", options.unseen)
        self.made: dict[tuple[str, str], list[Tensor]] = {}
        self.ceilings = {
            "real pictures": {s: self.real(self.trained, s) for s in STYLES},
            "the first stage's round trip": {
                s: self.round_trip(self.real(self.trained, s)) for s in STYLES
            },
        }

    @torch.no_grad()
    def round_trip(self, images: Tensor) -> Tensor:
        """Pictures through the first stage and back, all in bytes."""
        stage = self.model.generating()
        return torch.cat(
            [to_bytes(stage.decode(stage.encode(some / 127.5 - 1))) for some in images.split(50)]
        )

    def all(self) -> dict[str, Any]:
        """Every figure, with its N and what it was measured on."""
        seconds = self.seconds()
        self.draw()
        return {
            "date": str(date.today()),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "steps": self.options.steps or self.model.steps,
            "seeds": self.options.seeds,
            "concept among the top 5": self.concepts(),
            "style of the database": self.styles(),
            "unseen concepts, top 5": self.before_and_after(),
            "guidance": self.guidances(),
            "copying": self.copying(),
            "against held-out pictures": self.fidelity(),
            "seconds for 16 pictures": seconds,
        }

    def seconds(self) -> float:
        """Of sampling 16 pictures, the database searched, the second time."""
        prompts = self.trained.titles[:16]
        self.model.sample(prompts=prompts, steps=2)
        start = time.perf_counter()
        self.model.sample(prompts=prompts, steps=self.options.steps)
        return round(time.perf_counter() - start, 2)

    def draw(self) -> None:
        """Samples of the trained concepts: every mode, style and seed."""
        for style in STYLES:
            asked = self.model.replace(database=self.of_style(style), proposal=None)
            for mode in MODES if style in OWN else MODES[1:]:
                seeds = self.options.seeds if mode != "text" else self.options.seeds[:1]
                self.made[style, mode] = [
                    self.trained.sample(asked, mode, seed, self.options.steps) for seed in seeds
                ]
                print(style, mode, flush=True)

    def of_style(self, style: str) -> Any:
        """D of one style; of OpenMoji one made here, as a user would."""
        if style in OWN:
            return self.database.where(f"style == '{style}'")
        rows = self.sets.where(lambda row: row["style"] == style and row["split"] != "held-out")
        return self.rows_of(rows)

    def rows_of(self, rows: Tensor) -> ArrayDatabase:
        """Pictures as a database in memory."""
        images, encoder = self.sets.images[rows], self.model.encoder
        assert encoder is not None
        records = [self.sets.rows[i] for i in rows.tolist()]
        return ArrayDatabase(
            encoder.encode_image(images), encoder.fingerprint, records=records, images=images
        )

    def concepts(self) -> dict[str, Any]:
        """Shares whose asked concept is among the five nearest, and of real pictures."""
        found: dict[str, Any] = {}
        for mode in MODES:
            hits = [
                self.hit(images, self.trained, STYLES.index(style))
                for style in OWN
                for images in self.made[style, mode]
            ]
            found[mode] = summary(torch.stack([h.float().mean() for h in hits]), hits)
        for name, pictures in self.ceilings.items():
            hits = [self.hit(pictures[s], self.trained, STYLES.index(s)) for s in OWN]
            found[name] = summary(torch.stack([h.float().mean() for h in hits]), hits)
        return found

    def hit(self, images: Tensor, asked: Asked, style: int) -> Tensor:
        """Whether each picture's concept is among the five nearest."""
        features = self.judges.embed(images)
        return self.judges.concept_rank(features, asked.concepts, style) < 5

    def real(self, asked: Asked, style: str) -> Tensor:
        """The real pictures of concepts in a style."""
        at = {r["concept"]: i for i, r in enumerate(self.sets.rows) if r["style"] == style}
        names = [self.judges.names[c] for c in asked.concepts.tolist()]
        return self.sets.images[torch.tensor([at[name] for name in names])]

    def styles(self) -> dict[str, Any]:
        """Shares that look like the style of their database, by mode and style."""
        asked = {
            mode: {s: torch.cat(self.made[s, mode]) for s in STYLES}
            for mode in ("neighbors", "text+neighbors")
        }
        found: dict[str, Any] = {
            name: {
                style: round(
                    float((self.judges.styles(images) == STYLES.index(style)).float().mean()), 3
                )
                for style, images in pictures.items()
            }
            for name, pictures in {**self.ceilings, **asked}.items()
        }
        found["n per style"] = len(self.options.seeds) * len(self.trained.titles)
        return found

    def guidances(self) -> dict[str, Any]:
        """Concept and style of text+neighbors at several guidance scales, one seed."""
        found: dict[str, Any] = {}
        for scale in GUIDANCE:
            concepts, styles = [], []
            for style in OWN:
                asked = self.model.replace(database=self.of_style(style), proposal=None)
                images = self.trained.sample(
                    asked, "text+neighbors", 0, self.options.steps, guidance=scale
                )
                number = STYLES.index(style)
                concepts.append(self.hit(images, self.trained, number))
                styles.append(self.judges.styles(images) == number)
            found[str(scale)] = {
                "concept among the top 5": round(float(torch.cat(concepts).float().mean()), 3),
                "style": round(float(torch.cat(styles).float().mean()), 3),
            }
            print("guidance", scale, found[str(scale)], flush=True)
        found["n"] = len(OWN) * len(self.trained.titles)
        return found

    def before_and_after(self) -> dict[str, Any]:
        """Unseen concepts by their neighbors, before and after their pictures are in D.

        D has one style. Asked for by title, by the concept's picture in another style, or by its
        picture in that style, which is then found in any case: what the network alone can do.
        """
        rows = self.sets.where(lambda row: row["split"] == "held-out" and row["style"] in OWN)
        new, found = self.rows_of(rows), {}
        for name, whole in (("before", self.database), ("after", Union(self.database, new))):
            for mode, by in (("neighbors", "neighbors"), ("image", "image"), ("image", "itself")):
                hits: list[Tensor] = []
                for i, style in enumerate(OWN):
                    those = whole.where(f"style == '{style}'")
                    asked = self.model.replace(database=those, proposal=None)
                    shown = style if by == "itself" else OWN[i - 1]
                    query = self.real(self.unseen, shown) if mode == "image" else None
                    for seed in self.options.seeds:
                        images = self.unseen.sample(asked, mode, seed, self.options.steps, query)
                        hits.append(self.hit(images, self.unseen, STYLES.index(style)))
                found[f"{name}, {by}"] = summary(
                    torch.stack([h.float().mean() for h in hits]), hits
                )
                print(name, by, flush=True)
        real = [self.hit(self.real(self.unseen, s), self.unseen, STYLES.index(s)) for s in OWN]
        found["real pictures"] = summary(torch.stack([h.float().mean() for h in real]), real)
        return found

    def copying(self) -> dict[str, Any]:
        """Near-duplicates of pictures of D and X above held-out real pictures; draws the worst."""
        source = self.sets.where(lambda row: row["split"] != "held-out" and row["style"] in OWN)
        held = self.sets.where(lambda row: row["split"] == "held-out" and row["style"] in OWN)
        ours, others = (self.judges.embed(self.sets.images[rows]) for rows in (source, held))
        found: dict[str, Any] = {}
        for mode in MODES:
            images = torch.cat([x for style in OWN for x in self.made[style, mode]])
            report = copying(self.judges.embed(images), others, {"D and X": ours})["D and X"]
            found[mode] = {
                "share": round(report.rate, 3),
                "real held-out pictures": round(report.null_rate, 3),
                "excess": round(report.excess, 3),
                "n": len(images),
            }
            if mode == "text+neighbors":
                pairs = report.worst(20)
                self.pairs(images, source, pairs)
        return found

    def pairs(self, images: Tensor, source: Tensor, pairs: list[tuple[int, int, float]]) -> None:
        """Draws samples, each beside the picture that it is nearest to."""
        cells = [Cell([images[i], self.sets.images[source[row]]]) for i, row, _ in pairs]
        rows = [("", cells[i : i + 5]) for i in range(0, len(cells), 5)]
        grid = Grid(
            "Each pair: a sample, and the picture of D that it is nearest to", [""] * 5, rows
        )
        draw_poster("The twenty nearest pairs", [grid]).save(self.options.out / "copies.png")

    def fidelity(self) -> dict[str, Any]:
        """MIND and KID against held-out real pictures, by mode; real training pictures beside."""
        held = self.sets.where(lambda row: row["split"] == "held-out" and row["style"] in OWN)
        reference = self.judges.embed(self.sets.images[held])
        found: dict[str, Any] = {}
        sets = {m: torch.cat([self.made[s, m][0] for s in OWN]) for m in MODES}
        sets["real pictures"] = torch.cat([self.real(self.trained, style) for style in OWN])
        for name, images in sets.items():
            features = self.judges.embed(images)
            found[name] = {
                "MIND": round(mind(features, reference).value, 5),
                "KID": round(kernel_distance(features, reference).value, 5),
                "n": len(images),
            }
        found["n of held-out pictures"] = len(held)
        self.extremes()
        return found

    def extremes(self) -> None:
        """Draws the samples whose concept is told best, and worst, of one seed."""
        ranked: list[tuple[float, Tensor, str]] = []
        for style in OWN:
            images = self.made[style, "text+neighbors"][0]
            features = self.judges.embed(images)
            scores = features @ self.judges.means[STYLES.index(style)].T
            own = scores.gather(1, self.trained.concepts[:, None])[:, 0]
            ranked += list(zip(own.tolist(), images, self.trained.titles, strict=True))
        ranked.sort(key=lambda one: -one[0])
        grids = [
            Grid(
                f"The {name}, by the judge",
                [""] * 8,
                [
                    (" ", [Cell([image]) for _, image, _ in those[i : i + 8]])
                    for i in range(0, len(those), 8)
                ],
            )
            for name, those in (("best 24", ranked[:24]), ("worst 24", ranked[-24:]))
        ]
        poster = draw_poster(f"Of {len(ranked)} samples of one seed, text+neighbors", grids)
        poster.save(self.options.out / "best_and_worst.png")


def summary(means: Tensor, hits: list[Tensor]) -> dict[str, Any]:
    """Share, spread over seeds and styles, and N."""
    spread = float(means.std()) if len(means) > 1 else 0.0
    return {
        "share": round(float(means.mean()), 3),
        "deviation over seeds and styles": round(spread, 3),
        "n": sum(map(len, hits)),
    }


if __name__ == "__main__":
    main()
