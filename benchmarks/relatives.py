"""Trains and samples the systems around the paper on scanned digits, and asks a judge.

    python benchmarks/relatives.py knn_diffusion --out runs/relatives
    python benchmarks/relatives.py all --out runs/relatives

Each takes a few minutes on one core. What is there already is used; a training that was interrupted
goes on. For every relative a sheet ``NAME.png`` is drawn and its figures are written to
``NAME.json``; ``--record`` joins them in ``benchmarks/results/relatives.json`` and draws the
picture of the documentation.

scikit-learn's 1,797 scans (8x8) are split into D, training images X and held-out images, on which
the judge is trained, an SVM. A small CLIP is trained on D and X with captions.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff import presets
from retrodiff.databases import ArrayDatabase
from retrodiff.demo.digit_figures import Judge
from retrodiff.demo.digit_scans import WORDS, Split, caption
from retrodiff.demo.digits import Settings, clip_of
from retrodiff.diffusion import DiffusionPrior
from retrodiff.disk.files import write_json
from retrodiff.encoders import ClassNames, Regions, load_encoder, save_encoder
from retrodiff.interfaces import Query, unit
from retrodiff.model import Model
from retrodiff.pictures.sheet import Line, Section, draw_sheet
from retrodiff.retrieval import (
    ExcludeSelf,
    Instances,
    NearestNeighbors,
    interpolated,
    neighbor_table,
)
from retrodiff.training import Pairing, TrainingSet, cosine, fit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "relatives.json"
PICTURE = ROOT / "docs" / "images" / "relatives.png"
QUIET: dict[str, Any] = {"seed": 1, "batch_size": 256}


@dataclass(frozen=True)
class World:
    """The digits, their encoder and the judge.

    Args:
        out: folder for everything that is made.
        n: images that are asked for each figure.
    """

    out: Path
    n: int = 490

    @cached_property
    def parts(self) -> Split:
        """600 scans for D, 700 for X, 497 for the judge and as queries."""
        from sklearn.datasets import load_digits

        scans: Any = load_digits()
        images = torch.from_numpy(scans.images).float().unsqueeze(1) / 8 - 1
        digits = torch.from_numpy(scans.target).long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return Split(*((images[rows], digits[rows]) for rows in order.split([600, 700, 497])))

    @cached_property
    def encoder(self) -> Any:
        """The small CLIP."""
        folder = self.out / "encoder"
        if not folder.exists():
            save_encoder(clip_of(self.parts, Settings(), 0, True), folder)
        return load_encoder(folder)

    @cached_property
    def judge(self) -> Judge:
        """Knows held-out images only."""
        return Judge(self.parts)

    @cached_property
    def database(self) -> ArrayDatabase:
        """D."""
        return self._database(*self.parts.database)

    @cached_property
    def instances(self) -> ArrayDatabase:
        """X as a database."""
        return self._database(*self.parts.training)

    @cached_property
    def blocks(self) -> ArrayDatabase:
        """The quarters of the scans in D."""
        cut = Regions(self.encoder, 2).blocks(self.parts.database[0])
        return self._database(cut, self.parts.database[1].repeat_interleave(4))

    @cached_property
    def embeddings(self) -> Tensor:
        """Of X."""
        return self.encoder.encode_image(self.parts.training[0]).detach()

    @cached_property
    def texts(self) -> Tensor:
        """Embeddings of the captions of X."""
        each = self.encoder.encode_text([caption(digit) for digit in range(10)]).detach()
        return each[self.parts.training[1]]

    def _database(self, images: Tensor, digits: Tensor) -> ArrayDatabase:
        records = [{"label": WORDS[digit]} for digit in digits.tolist()]
        embeddings = self.encoder.encode_image(images).detach()
        return ArrayDatabase(embeddings, self.encoder.fingerprint, records, images=images)

    def held_out(self) -> tuple[Tensor, list[int]]:
        """Images that no network was trained on, and their digits."""
        images, digits = self.parts.held_out
        return images[: self.n], digits[: self.n].tolist()

    @property
    def digits(self) -> list[int]:
        """What is asked for, all digits alike."""
        return [i % 10 for i in range(self.n)]

    @property
    def prompts(self) -> list[str]:
        """Their captions."""
        return [caption(digit) for digit in self.digits]


@dataclass(frozen=True)
class Relative:
    """One system: how it is built, trained and asked.

    Args:
        build: the model.
        data: what it is trained on.
        ask: the trained model -> figures, and lines of a sheet.
        steps: of training.
        bound: names of the figures that are to reach 0.85.
    """

    build: Callable[[World], Model]
    data: Callable[[World], TrainingSet]
    ask: Callable[[Model, World], tuple[dict[str, Any], list[Line]]]
    bound: tuple[str, ...]
    steps: int = 360


def trained(name: str, world: World) -> Model:
    """The trained model of a relative; a training that was interrupted goes on."""
    relative = RELATIVES[name]
    torch.manual_seed(0)
    return fit(
        relative.build(world),
        relative.data(world),
        steps=relative.steps,
        batch_size=32,
        lr=cosine(2e-3, relative.steps, 50),
        ema=0.99,
        checkpoint=world.out / f"{name}.safetensors",
        checkpoint_every=100,
        resume=True,
        overwrite=True,
    ).model


# --- how each is asked ---------------------------------------------------------------------------

SHOWN = 10


def texts(model: Model, world: World, mode: Any, label: str) -> tuple[float, Line]:
    """Share of the asked digit for prompts in a mode, and a line of samples."""
    out = model.sample(prompts=world.prompts, mode=mode, **QUIET)
    line = Line(f"{label}, zero to nine", [], list(out.images[:SHOWN]))
    return world.judge.share(out.images, world.digits), line


def pictures(model: Model, world: World, label: str) -> tuple[float, list[Line]]:
    """Share of images of the digit of the picture that was asked with, and lines of samples."""
    images, digits = world.held_out()
    out = model.sample(images=images, **QUIET)
    lines = []
    for i in range(3):
        again = model.sample(images=[images[i]] * SHOWN, **QUIET)
        lines.append(Line(images[i], [], list(again.images), label))
    return world.judge.share(out.images, digits), lines


def ask_ldm(model: Model, world: World) -> tuple[dict[str, Any], list[Line]]:
    """Without a condition there is nothing to ask: how the digits are spread, and how surely."""
    out = model.sample(n=world.n, **QUIET)
    digits = torch.from_numpy(world.judge.digits(out.images))
    shares = torch.bincount(digits, minlength=10) / len(digits)
    real = torch.bincount(world.parts.training[1], minlength=10) / len(world.parts.training[1])
    found = {
        "share_of_each_digit": [round(float(s), 3) for s in shares],
        "total_variation_to_training": float((shares - real).abs().sum() / 2),
    }
    return found, [Line("n=", [], list(out.images[i : i + SHOWN])) for i in (0, 10)]


def ask_ldm_class(model: Model, world: World) -> tuple[dict[str, Any], list[Line]]:
    """Classes by name."""
    out = model.sample(classes=[WORDS[digit] for digit in world.digits], **QUIET)
    lines = [Line("zero to nine", [], list(out.images[i : i + SHOWN])) for i in (0, 10)]
    return {"class": world.judge.share(out.images, world.digits)}, lines


def ask_knn(model: Model, world: World) -> tuple[dict[str, Any], list[Line]]:
    """Text with and without neighbors, pictures, and edited pictures."""
    found: dict[str, Any] = {}
    lines: list[Line] = []
    for mode in ("neighbors", "text+neighbors", "text"):
        found[mode], line = texts(model, world, mode, f"mode={mode}")
        lines.append(line)
    found["image"], more = pictures(model, world, "images=")
    images, digits = world.held_out()
    wanted = [(digit + 1 + i % 9) % 10 for i, digit in enumerate(digits)]
    asked: dict[str, Any] = {"prompts": [caption(d) for d in wanted], "mode": "neighbors"}
    far = (model.sample(**asked, **QUIET).images - images).square().flatten(1).mean(1)
    found["edited"] = {}
    for strength in (0.4, 0.5, 0.6, 0.8):
        out = model.sample(**asked, start=images, strength=strength, **QUIET)
        distance = (out.images - images).square().flatten(1).mean(1)
        found["edited"][str(strength)] = {
            "asked": world.judge.share(out.images, wanted),
            "distance_to_start": float(distance.mean() / far.mean()),
        }
    for i in range(2):
        edited = model.sample(
            prompts=[caption(d) for d in range(10)],
            mode="neighbors",
            start=images[i],
            strength=0.55,
            **QUIET,
        )
        more.append(Line(images[i], [], list(edited.images), "edited, 0.55"))
    return found, lines + more


def ask_instance(model: Model, world: World) -> tuple[dict[str, Any], list[Line]]:
    """Pictures, and instances that stand for the database."""
    share, lines = pictures(model, world, "instance")
    out = model.sample(n=world.n, **QUIET)
    assert out.query.ids is not None
    drawn = world.parts.training[1][out.query.ids].tolist()
    lines.append(Line("n=, instances of X", [], list(out.images[:SHOWN])))
    return {"image": share, "k_means_instance": world.judge.share(out.images, drawn)}, lines


def ask_regions(model: Model, world: World) -> tuple[dict[str, Any], list[Line]]:
    """Pictures, whose blocks ask; and the estimate's blocks, which ask again while sampling."""
    share, lines = pictures(model, world, "regions")
    images, digits = world.held_out()
    out = model.sample(images=images, reretrieve=[3, 6], **QUIET)
    lines.append(Line("again at steps 3 and 6", [], list(out.images[:SHOWN])))
    return {"image": share, "reretrieving": world.judge.share(out.images, digits)}, lines


def ask_unclip(model: Model, world: World) -> tuple[dict[str, Any], list[Line]]:
    """Text through the prior and without it, variations, and what lies between two pictures."""
    found: dict[str, Any] = {}
    found["prior"], line = texts(model, world, "text", "prompts=")
    lines = [line]
    found["without_prior"], line = texts(model.replace(prior=None), world, "text", "no prior")
    lines.append(line)
    found["variations"], more = pictures(model, world, "variations")
    images, digits = world.held_out()
    embeddings = model.encoder.encode_image(images).detach()  # type: ignore[union-attr]
    ends = [(i, i + 1) for i in range(0, len(digits) - 1, 2) if digits[i] != digits[i + 1]]
    arcs = [interpolated(embeddings[a], embeddings[b], SHOWN) for a, b in ends]
    out = model.sample(query=Query.cat([arc.rows([0, SHOWN - 1]) for arc in arcs]), **QUIET)
    right = [digits[at] for pair in ends for at in pair]
    found["interpolation_ends"] = world.judge.share(out.images, right)
    for (a, b), arc in zip(ends[:3], arcs, strict=False):
        # Each with the noise of image 0, so that only the embedding changes.
        made = [model.sample(query=arc.rows([i]), **QUIET).images[0] for i in range(SHOWN)]
        more.append(Line(images[a], [images[b]], made, "from, to"))
    return found, lines + more


def ask_prior(model: Model, world: World) -> tuple[dict[str, Any], list[Line]]:
    """Whether the row of D nearest to a drawn embedding shows the asked digit."""
    prior = prior_of(model, world)
    text = world.encoder.encode_text(world.prompts).detach()
    found: dict[str, Any] = {}
    for draws in (1, 2):
        one = DiffusionPrior(prior.generator, prior.steps, draws, prior.norm)
        drawn = one.translate(text, torch.Generator().manual_seed(0))
        near = world.database.search(Query(drawn), 1).indices.flatten()
        digits = world.parts.database[1][near].tolist()
        share = sum(a == b for a, b in zip(digits, world.digits, strict=True)) / world.n
        found[f"nearest_row_draws_{draws}"] = share
        near_text = torch.cosine_similarity(drawn, text).mean()
        found[f"cosine_to_text_draws_{draws}"] = float(near_text)
    own = torch.cosine_similarity(world.embeddings, world.texts).mean()
    return {**found, "cosine_of_real_pairs": float(own)}, []


def prior_of(model: Model, world: World) -> DiffusionPrior:
    """The prior that a trained model is."""
    return DiffusionPrior(model.diffusion(), norm=float(world.embeddings.norm(dim=-1).mean()))


# --- the relatives -------------------------------------------------------------------------------

CLASSES = ClassNames(WORDS)


def pairs(world: World) -> Pairing:
    """Each training image with each of its 50 neighbors, itself excluded."""
    query = Query(world.embeddings, ids=torch.arange(len(world.embeddings)))
    retriever = ExcludeSelf(NearestNeighbors())
    return Pairing.from_table(neighbor_table(query, world.instances, 50, retriever))


def region_data(world: World) -> TrainingSet:
    """X, each block with its neighbors among the blocks of D."""
    images = world.parts.training[0]
    embeddings = Regions(world.encoder, 2).encode_image(images).detach()
    table = neighbor_table(Query(embeddings), world.blocks, 4, NearestNeighbors(), progress=False)
    return TrainingSet(images, embeddings, table, world.blocks)


RELATIVES: dict[str, Relative] = {
    "ldm": Relative(
        build=lambda w: presets.ldm(),
        data=lambda w: TrainingSet.alone(w.parts.training[0]),
        ask=ask_ldm,
        bound=(),
    ),
    "ldm_class": Relative(
        build=lambda w: presets.ldm(encoder=CLASSES),
        data=lambda w: TrainingSet.alone(
            w.parts.training[0],
            CLASSES.encode_text([WORDS[d] for d in w.parts.training[1].tolist()]),
        ),
        ask=ask_ldm_class,
        bound=("class",),
    ),
    "knn_diffusion": Relative(
        build=lambda w: presets.knn_diffusion(encoder=w.encoder, database=w.database),
        data=lambda w: TrainingSet.of(
            w.parts.training[0], w.encoder, w.database, NearestNeighbors(), 10, progress=False
        ),
        ask=ask_knn,
        bound=("neighbors",),
    ),
    "instance_conditioned": Relative(
        build=lambda w: presets.instance_conditioned(
            encoder=w.encoder, database=w.instances, proposal=Instances.fit(w.instances, 50)
        ),
        data=lambda w: TrainingSet.alone(w.parts.training[0], w.embeddings).paired(pairs(w)),
        ask=ask_instance,
        bound=("image", "k_means_instance"),
    ),
    "region_retrieval": Relative(
        build=lambda w: presets.region_retrieval(encoder=w.encoder, database=w.blocks),
        data=region_data,
        ask=ask_regions,
        bound=("image",),
    ),
    "unclip_prior": Relative(
        build=lambda w: presets.unclip_prior(encoder=w.encoder, embeddings=w.embeddings),
        data=lambda w: TrainingSet.alone(unit(w.embeddings)[:, :, None, None], w.texts),
        ask=ask_prior,
        bound=("nearest_row_draws_2",),
    ),
    "unclip": Relative(
        build=lambda w: presets.unclip(
            encoder=w.encoder, prior=prior_of(trained("unclip_prior", w), w)
        ),
        data=lambda w: TrainingSet.alone(w.parts.training[0], w.embeddings),
        ask=ask_unclip,
        bound=("prior", "interpolation_ends"),
    ),
}


def run(name: str, world: World) -> None:
    """Trains and asks one relative, and writes ``NAME.json`` and ``NAME.png``."""
    relative = RELATIVES[name]
    began = time.process_time()
    model = trained(name, world)
    seconds = time.process_time() - began
    figures, lines = relative.ask(model, world)
    weights = sum(p.numel() for p in model.denoiser.parameters())  # type: ignore[union-attr]
    value = {
        "figures": figures,
        "below_0.85": [key for key in relative.bound if figures[key] < 0.85],
        "n": world.n,
        "steps": relative.steps,
        "weights": weights,
    }
    write_json(world.out / f"{name}.json", value)
    if lines:
        draw_sheet([Section(name, lines)], side=48).save(world.out / f"{name}.png")
    print(f"{name}: {seconds:.0f} s of processor time for training in this run")
    print(json.dumps(figures, indent=1))


def joined(files: list[Path]) -> Any:
    """Sheets below each other, in 16 grays."""
    from PIL import Image

    sheets = [Image.open(file).convert("L") for file in files]
    size = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    whole, y = Image.new("L", size, 255), 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height
    return whole.quantize(16)


def main() -> None:
    """Trains and asks what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("relative", choices=[*RELATIVES, "all", "none"])
    parser.add_argument("--out", type=Path, default=Path("runs/relatives"))
    parser.add_argument("--n", type=int, default=490, help="images asked for each figure")
    parser.add_argument("--record", action="store_true", help="write the committed figures")
    options = parser.parse_args()
    world = World(options.out, options.n)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in RELATIVES if options.relative == "all" else [options.relative]:
        if name != "none":
            run(name, world)
    if options.record:
        known = {name: options.out / f"{name}.json" for name in RELATIVES}
        found = {n: json.loads(f.read_text("utf-8")) for n, f in known.items() if f.exists()}
        about = {"machine": platform.machine(), "torch": torch.__version__, "judge": "SVM"}
        write_json(RESULTS, {"about": about, "relatives": found})
        joined([file for n in found if (file := options.out / f"{n}.png").exists()]).save(
            PICTURE, optimize=True
        )


if __name__ == "__main__":
    main()
