"""Two processes write to one place at the same moment: is anything lost that was reported as done?

Ten pairs of each kind. Both processes wait for one signal and then call the public function; the
second one starts up to 30 ms later. Each says what it did: "done", or the line that refused it.
Afterwards the place is opened, every byte is verified, and what is there is compared with what was
reported. Refused work is no loss; a traceback of another kind, a place that does not open and
leftovers beside it are.

    python benchmarks/two_writers.py --out benchmarks/results/two_writers.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from retrodiff import presets
from retrodiff.databases import (
    ArrayDatabase,
    Images,
    append_to_database,
    build_database,
    delete_rows,
    open_database,
)
from retrodiff.indexes import Annoy
from retrodiff.interfaces import Encoder, Fingerprint
from retrodiff.model import Model

QUIET = {"progress": False}
REFUSED = (BlockingIOError, FileExistsError)
ROWS = {"base": 40, "append a": 3, "append b": 5, "overwrite": 7, "build a": 11, "build b": 13}
Job = Callable[[Path], None]


class Means(Encoder):
    """Mean color of quarters: quick, and slow enough for the other process to come in between."""

    dim = 12
    fingerprint = Fingerprint(encoder="means", weights="w", preprocessing="p", dim=12)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) + 2


def pictures(what: str) -> Images:
    """So many random images, told apart by their record."""
    draw = torch.Generator().manual_seed(ROWS[what])
    images = torch.randint(0, 256, (ROWS[what], 3, 8, 8), dtype=torch.uint8, generator=draw)
    return Images(images, [{"what": what, "i": i} for i in range(ROWS[what])])


def append(what: str) -> Job:
    """Appends the images of a name."""
    return lambda path: void(append_to_database(path, pictures(what), Means(), **QUIET))


def build(what: str, overwrite: bool = False) -> Job:
    """Builds a database of the images of a name."""

    def job(path: Path) -> None:
        build_database(path, pictures(what), Means(), overwrite=overwrite, batch_size=4, **QUIET)

    return job


def delete(path: Path) -> None:
    """Deletes the first two rows."""
    delete_rows(path, [0, 1])


def save(seed: int, overwrite: bool) -> Job:
    """Saves a small model whose weights all are its number."""

    def job(path: Path) -> None:
        tiny_model(seed).save(path, overwrite=overwrite)

    return job


def index(path: Path) -> None:
    """Builds the index again and again."""
    for _ in range(10):
        open_database(path).build_index(Annoy(trees=5), **QUIET)


def openings(path: Path) -> None:
    """Opens the index 100 times."""
    for _ in range(100):
        database = open_database(path, "annoy")
        assert len(database.search(database_query(database), 3)) == 1


def database_query(database: object) -> object:
    """A query: the first row."""
    from retrodiff.interfaces import Query

    return Query(database.embeddings(torch.tensor([0])))  # type: ignore[attr-defined]


def tiny_model(seed: int) -> Model:
    """A model of some hundred kilobytes; all weights of its network are ``seed``."""
    from retrodiff.networks.principal import PrincipalPatches

    images = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    model = presets.rdm_small(
        encoder=Means(),
        first_stage=PrincipalPatches.fit(images, patch=2, components=8),
        database=ArrayDatabase(rows, Means.fingerprint),
        size=8,
        channels=32,
        k=2,
    )
    with torch.no_grad():
        for weight in model.denoiser.network.parameters():  # type: ignore[attr-defined]
            weight.fill_(seed)
    return model


def void(value: object) -> None:
    """Nothing."""
    del value


def at_once(jobs: tuple[Job, Job], path: Path, late: tuple[float, float]) -> list[str]:
    """Both jobs in processes of their own, begun at one moment; what each of them reported."""
    reading, children = [], []
    go = time.time() + 0.05
    for job, wait in zip(jobs, late, strict=True):
        out, into = os.pipe()
        if (child := os.fork()) == 0:
            os.close(out)
            time.sleep(max(0.0, go + wait - time.time()))
            try:
                job(path)
                said = "done"
            except REFUSED as error:
                said = f"refused: {error}"
            except BaseException as error:
                said = f"failed: {error!r}"
            os.write(into, said.encode()[:2000])
            os._exit(0)
        os.close(into)
        reading.append(out)
        children.append(child)
    said = [os.read(out, 4000).decode() for out in reading]
    for child, out in zip(children, reading, strict=True):
        os.waitpid(child, 0)
        os.close(out)
    return said


def held(path: Path) -> dict[str, int]:
    """Rows of the database by what they came from; refuses what does not verify."""
    database = open_database(path)
    assert database.verify() == [], database.verify()
    found: dict[str, int] = {}
    for record in database.records(torch.arange(len(database))):
        found[record["what"]] = found.get(record["what"], 0) + 1
    return found


def lost_rows(done: list[str], before: dict[str, int], path: Path) -> list[str]:
    """What was reported as done and is not there, in words; an overwrite takes all before it."""
    found = held(path)
    outcomes = set()
    for order in (done, done[::-1]):  # either may have been the first
        rows = dict(before)
        for what in order:
            if what == "delete":
                first = next(iter(rows))
                rows[first] -= 2
            elif what.startswith("append"):
                rows[what] = ROWS[what]
            else:
                rows = {what: ROWS[what]}
        outcomes.add(json.dumps(rows, sort_keys=True))
    if json.dumps(found, sort_keys=True) in outcomes:
        return []
    return [f"{path.name} holds {found} after {done}, expected one of {sorted(outcomes)}"]


def lost_model(done: list[str], before: dict[str, int], path: Path) -> list[str]:
    """Whether the model that is there is wholly one of those that were reported as saved."""
    del before
    model = Model.load(path, encoder=Means(), database=None)
    values = {
        float(value)
        for weight in model.denoiser.network.parameters()  # type: ignore[attr-defined]
        for value in weight.detach().unique()
    }
    saved = {float(name.rpartition(" ")[2]) for name in done}
    return [] if len(values) == 1 and values <= saved else [f"weights {values} after {done}"]


KINDS: dict[str, tuple[tuple[str, Job], tuple[str, Job], bool]] = {
    "append and append": (
        ("append a", append("append a")), ("append b", append("append b")), True
    ),
    "append and delete": (("append a", append("append a")), ("delete", delete), True),
    "append and overwrite": (
        ("append a", append("append a")), ("overwrite", build("overwrite", True)), True
    ),
    "delete and overwrite": (("delete", delete), ("overwrite", build("overwrite", True)), True),
    "build and build": (("build a", build("build a")), ("build b", build("build b")), False),
    "overwrite and overwrite": (
        ("build a", build("build a", True)), ("build b", build("build b", True)), True
    ),
    "save and save of a model": (("save 1", save(1, False)), ("save 2", save(2, False)), False),
    "overwriting saves of a model": (("save 1", save(1, True)), ("save 2", save(2, True)), False),
    "index again and open": (("index", index), ("open", openings), True),
}  # fmt: skip


def measure(kind: str, pairs: int, draw: random.Random, folder: Path) -> dict[str, object]:
    """So many pairs of a kind."""
    (first, job_a), (second, job_b), based = KINDS[kind]
    figures = {"pairs": pairs, "both done": 0, "one refused": 0, "both refused": 0}
    lost: list[str] = []
    for number in range(pairs):
        path = folder / f"{kind} {number}".replace(" ", "-")
        before = {}
        if based:
            build("base")(path)
            before = {"base": ROWS["base"]}
            if kind.startswith("index"):
                open_database(path).build_index(Annoy(trees=5), **QUIET)
        late = (draw.random() * 0.03, draw.random() * 0.03)
        said = at_once((job_a, job_b), path, late)
        names = [name for name, says in zip((first, second), said, strict=True) if says == "done"]
        lost += [f"{kind}: {says}" for says in said if says.startswith("failed")]
        figures[("both refused", "one refused", "both done")[len(names)]] += 1
        try:
            if kind.startswith("index"):
                lost += lost_rows([], before, path)
            elif names:
                lost += (lost_model if "model" in kind else lost_rows)(names, before, path)
        except Exception as error:
            lost.append(f"{kind}: what is there cannot be read: {error!r}")
        beside = [p.name for p in folder.iterdir() if p.name.startswith(f"{path.name}.")]
        if beside:
            lost.append(f"{kind}: left beside it: {beside}")
    return {**figures, "lost": len(lost), "how": lost[:5]}


def main() -> None:
    """Runs all kinds; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2 pairs of each kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    pairs = 2 if options.quick else options.pairs
    with tempfile.TemporaryDirectory() as name:
        figures = {kind: measure(kind, pairs, draw, Path(name)) for kind in KINDS}
    text = json.dumps({"seed": options.seed, "kinds": figures}, indent=2)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    sys.exit(any(kind["lost"] for kind in figures.values()))


if __name__ == "__main__":
    main()
