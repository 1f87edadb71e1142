"""Damages files at random and reads them: does every try end well, or in one clear line?

Every format is made once. Each try copies it, damages one file, and uses it in a child process
that may take 1 GB of memory more than it began with, and ten seconds. A try ends

* right: the result is that of the undamaged files,
* refused: a ValueError or OSError of one line,
* found: the result differs, and the format's ``verify`` says that a file is damaged,

or it counts as a fault: a crash, a hang, a traceback (any other error), a silently wrong result.

    python benchmarks/damaged_files.py --tries 1000
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from retrodiff.databases import (
    Images,
    append_to_database,
    build_database,
    delete_rows,
    open_database,
)
from retrodiff.encoders import TimmEncoder, load_encoder, save_encoder
from retrodiff.indexes import Annoy, Faiss, ScaNN, USearch
from retrodiff.interfaces import Encoder, Fingerprint, Query
from retrodiff.model import Model
from retrodiff.retrieval import (
    NearestNeighbors,
    NeighborCounts,
    neighbor_table,
    open_neighbor_table,
)

MEMORY = 1024**3
"""Bytes that a try may take beyond those that its process began with."""

SECONDS = 10.0
ENDS = ("right", "refused", "found", "crash", "hang", "traceback", "silent")
FAULTS = ENDS[3:]


@dataclass(frozen=True)
class Format:
    """A kind of files.

    Args:
        make: fills a folder.
        use: reads it; its result is told apart by ``repr`` or by the bytes of tensors.
        verify: what the format's own check finds wrong; None: it has none.
        needs: a package.
        modules: imported before the tries, so that not each of them does.
    """

    make: Callable[[Path], object]
    use: Callable[[Path], Any]
    verify: Callable[[Path], list[str]] | None = None
    needs: str = "torch"
    modules: tuple[str, ...] = ()


class Pooled(Encoder):
    """Mean colors of a 4 x 4 grid."""

    @property
    def dim(self) -> int:
        """16 squares of 3 colors."""
        return 48

    @property
    def fingerprint(self) -> Fingerprint:
        """Of no weights."""
        return Fingerprint(encoder="pooled", weights="w", preprocessing="none", dim=48)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, h, w) -> (b, 48)."""
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def pictures(n: int) -> Images:
    """Random ones, with records of several types."""
    g = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (n, 3, 8, 8), generator=g, dtype=torch.uint8)
    records = [
        {"file": f"f{i}.png", "label": "cat dog bird".split()[i % 3], "year": i, "tags": ["a"] * i}
        for i in range(n)
    ]
    return Images(data, records)


QUIET: dict[str, Any] = {"progress": False}
ASKED = Query(torch.randn(7, 48, generator=torch.Generator().manual_seed(1)))


# --- formats -------------------------------------------------------------------------------------


def make_database(folder: Path) -> Any:
    """Three shards, one of them appended, and deleted rows."""
    path = folder / "d.rdb"
    build_database(path, pictures(40), Pooled(), shard_rows=16, thumbnails=8, **QUIET)
    append_to_database(path, pictures(8), Pooled(), **QUIET)
    return delete_rows(path, [3, 17, 41])


def use_database(folder: Path, index: str = "exact") -> Any:
    """Everything that a reader of a database does."""
    database: Any = open_database(folder / "d.rdb", index)
    found = database.search(ASKED, 4)
    rows = torch.arange(len(database))
    shown = [database.image(i) for i in range(0, len(database), 5)]
    chosen = database.where("year > 10 and label != 'cat'").rows
    return (
        *(found.indices, found.similarity, chosen, database.embeddings(rows), torch.stack(shown)),
        repr(database.records(rows)),
    )


def verify_database(folder: Path) -> list[str]:
    """The database's own check."""
    database: Any = open_database(folder / "d.rdb")
    return database.verify()


def with_index(recipe: Any) -> Format:
    """A database with an index; results of the index only."""

    def make(folder: Path) -> None:
        make_database(folder).build_index(recipe, **QUIET)

    def use(folder: Path) -> Any:
        found = open_database(folder / "d.rdb", recipe.name).search(ASKED, 4)
        return found.indices, found.similarity

    return Format(make, use, verify_database, recipe.name)


def table(folder: Path, **options: Any) -> Any:
    """A neighbor table in a file."""
    data = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))
    return neighbor_table(
        Query(data), small(), 3, NearestNeighbors(), path=folder / "n", batch_size=32, **options
    )


def small() -> Any:
    """A database in memory."""
    from retrodiff.testing import small_database

    return small_database(rows=60, dim=8)


class Stop(Exception):
    """Ends work in the middle."""


@contextlib.contextmanager
def stopped(count: int, module: Any, name: str) -> Any:
    """The call number ``count`` of a function raises."""
    original = getattr(module, name)
    left = [count]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return original(*args, **kwargs)

    setattr(module, name, call)
    with contextlib.suppress(Stop):
        yield
    setattr(module, name, original)


def make_unfinished_table(folder: Path) -> None:
    """Five batches of ten."""
    with stopped(5, NearestNeighbors, "retrieve"):
        table(folder)


def unfinished(build: Callable[..., Any]) -> Format:
    """Work that is interrupted at its third batch, and resumed."""

    def make(folder: Path) -> None:
        with stopped(7, Pooled, "encode_image"):
            build(folder, resume=False)

    def use(folder: Path) -> Any:
        build(folder, resume=True)
        return use_database(folder)

    return Format(make, use, verify_database)


def build(folder: Path, resume: bool) -> Any:
    """A build in shards of ten rows."""
    options: dict[str, Any] = {
        "shard_rows": 10,
        "batch_size": 5,
        "thumbnails": 8,
        "resume": resume,
        **QUIET,
    }
    return build_database(folder / "d.rdb", pictures(48), Pooled(), **options)


def append(folder: Path, resume: bool) -> Any:
    """An append in shards of ten rows."""
    path = folder / "d.rdb"
    if not path.exists():
        encode, Pooled.encode_image = Pooled.encode_image, _original
        build_database(
            path, pictures(12), Pooled(), shard_rows=10, batch_size=5, thumbnails=8, **QUIET
        )
        Pooled.encode_image = encode
    return append_to_database(path, pictures(48), Pooled(), resume=resume, **QUIET)


_original = Pooled.encode_image


def make_proposal(folder: Path) -> None:
    """Counts of a small database."""
    data = torch.randn(50, 8, generator=torch.Generator().manual_seed(3))
    NeighborCounts.fit(Query(data), small(), 3).save(folder / "p")


def use_proposal(folder: Path) -> Any:
    """What is drawn."""
    drawn = NeighborCounts.load(folder / "p").propose(small(), 9, torch.Generator().manual_seed(0))
    return drawn.ids, drawn.embedding


def train(folder: Path, steps: int) -> Any:
    """A run of the training loop, begun or continued."""
    from retrodiff.training.ema import NamedEMA
    from retrodiff.training.optimize import Part, optimize

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 1))

    def loss(trained: torch.nn.Module, part: Part) -> torch.Tensor:
        return trained(torch.randn(4, 6, generator=part.generator)).square().mean()

    file = folder / "t.safetensors"
    optimize(module, loss, steps=steps, lr=1e-2, ema=NamedEMA(module, 0.9), checkpoint=file,
             resume=True, progress=False)  # fmt: skip
    return tuple(p.detach() for p in module.parameters())


def make_model(folder: Path) -> None:
    """A small model of every part that has weights, with an encoder of its own."""
    model().save(folder / "m")


def model() -> Model:
    """Random weights."""
    from retrodiff.builder import Builder
    from retrodiff.diffusion import ClassifierFree, DPMpp2M, EDMDenoiser, NeighborEmbeddings
    from retrodiff.networks.dit import DiT

    torch.manual_seed(0)
    net = DiT(shape=(3, 8, 8), patch=4, width=16, depth=1, heads=2, widths={"neighbors": 8})
    parts = Builder().database(small()).conditioner(NeighborEmbeddings("raw"))
    parts = parts.denoiser(EDMDenoiser(net)).sampler(DPMpp2M()).guidance(ClassifierFree(2.0))
    return parts.defaults(k=2, steps=1).build()


def use_model(folder: Path) -> Any:
    """One image."""
    loaded = Model.load(folder / "m", database=small())
    query = Query(torch.ones(1, 8))
    return loaded.sample(query=query, seed=0, progress=False).images


def make_encoder(folder: Path) -> None:
    """A small vision transformer."""
    torch.manual_seed(0)
    save_encoder(TimmEncoder("test_vit", pretrained=False), folder / "e")


def use_encoder(folder: Path) -> Any:
    """Embedding of one image."""
    encoder = load_encoder(folder / "e")
    return encoder.encode_image(torch.zeros(1, 3, 32, 32))


FORMATS = {
    "database": Format(make_database, use_database, verify_database),
    "index annoy": with_index(Annoy(trees=4, components=8)),
    "index usearch": with_index(USearch()),
    "index faiss": with_index(Faiss()),
    "index scann": with_index(ScaNN(leaves=4)),
    "neighbor table": Format(
        lambda folder: table(folder),
        lambda folder: open_neighbor_table(folder / "n", small()).clone(),
    ),
    "proposal": Format(make_proposal, use_proposal),
    "unfinished table": Format(make_unfinished_table, lambda folder: table(folder, resume=True)),
    "unfinished build": unfinished(build),
    "unfinished append": unfinished(append),
    "training checkpoint": Format(
        lambda folder: train(folder, 3),
        lambda folder: train(folder, 5),
        modules=("retrodiff.training.optimize", "torch_ema", "torch._dynamo"),
    ),
    "model": Format(make_model, use_model, modules=("retrodiff.networks.dit", "open_clip", "timm")),
    "encoder": Format(make_encoder, use_encoder, modules=("timm",)),
}


# --- damage --------------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    None, -1, 0, 1, 2**40, 2**63, 2**70, 1e308, True, "", "x", "../../x", "/etc/passwd", "\0", [],
    {}, [[]] * 3, "9" * 5000, [0, 2**40], [-4, 4],
]  # fmt: skip


def damage(folder: Path, draw: random.Random) -> str:
    """Damages one file below a folder; what was done, in words."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    file = draw.choice(files)
    kinds = [flip, truncate, zero, lengthen, exchange, header]
    how = draw.choice(kinds)
    what = how(file, files, draw)
    return f"{how.__name__} {file.relative_to(folder)} {what}"


def flip(file: Path, files: list[Path], draw: random.Random) -> str:
    """Changes a few bits."""
    data = bytearray(file.read_bytes())
    at = [draw.randrange(len(data)) for _ in range(draw.choice([1, 1, 1, 2, 8, 64]))]
    for i in at:
        data[i] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return str(at[:8])


def truncate(file: Path, files: list[Path], draw: random.Random) -> str:
    """Cuts the end off."""
    size = draw.randrange(file.stat().st_size)
    os.truncate(file, size)
    return str(size)


def zero(file: Path, files: list[Path], draw: random.Random) -> str:
    """Writes zeros over a stretch, as a lost page would be."""
    data = bytearray(file.read_bytes())
    start = draw.randrange(len(data))
    stop = min(len(data), start + draw.choice([1, 8, 64, 512, 4096]))
    data[start:stop] = bytes(stop - start)
    file.write_bytes(data)
    return f"{start}..{stop}"


def lengthen(file: Path, files: list[Path], draw: random.Random) -> str:
    """Appends bytes."""
    size = draw.choice([1, 7, 100, 5000])
    with file.open("ab") as opened:
        opened.write(draw.randbytes(size))
    return str(size)


def exchange(file: Path, files: list[Path], draw: random.Random) -> str:
    """Puts another file in its place, or removes it."""
    other = draw.choice(files)
    if other == file:
        file.unlink()
        return "removed"
    data = other.read_bytes()
    other.write_bytes(file.read_bytes())
    file.write_bytes(data)
    return f"with {other.name}"


def header(file: Path, files: list[Path], draw: random.Random) -> str:
    """Changes an entry of a JSON file or of a safetensors header; elsewhere the first bytes."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    start = 8 if 2 <= length <= len(data) - 8 and data[8:9] == b"{" else 0
    text = data[start : start + length] if start else data
    if draw.random() < 0.1:
        claimed = draw.choice([2**40, 2**63, 2**64 - 1, 0, 1, len(data), 10**8])
        file.write_bytes(claimed.to_bytes(8, "little") + data[8:])
        return f"length {claimed}"
    if draw.random() < 0.1:
        text, what = nested(draw), "nested"
    else:
        try:
            value = json.loads(text)
        except ValueError:
            file.write_bytes(draw.randbytes(16) + data[16:])
            return "first bytes"
        what = edited(value, draw)
        text = json.dumps(value).encode()
    rest = data[8 + length :] if start else b""
    file.write_bytes((len(text).to_bytes(8, "little") if start else b"") + text + rest)
    return what


def nested(draw: random.Random) -> bytes:
    """Brackets within brackets."""
    depth = draw.choice([100, 10_000, 1_000_000])
    one, other = draw.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return one * depth + (b"0" + other * depth if draw.random() < 0.5 else b"")


def edited(value: Any, draw: random.Random) -> str:
    """Changes one entry, however deep."""
    where = []
    while isinstance(value, dict | list) and value:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        where.append(str(key))
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.2:
            if draw.random() < 0.2:
                del value[key]
                return f"without {'.'.join(where)}"
            value[key] = draw.choice(HOSTILE)
            return f"{'.'.join(where)} = {str(value[key])[:20]!r}"
        value = inner
    return "nothing"


# --- tries ---------------------------------------------------------------------------------------


def marked(result: Any) -> str:
    """Hash of a result."""
    digest = hashlib.sha256()
    for part in result if isinstance(result, tuple) else (result,):
        if isinstance(part, torch.Tensor):
            digest.update(str(part.shape).encode() + part.contiguous().numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def attempt(format: Format, folder: Path, expected: str | None) -> tuple[str, str]:
    """How a use of the folder ends in a child process, and what it said."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            _limited()
            end = _used(format, folder, expected)
            os.write(write, json.dumps([end[0], end[1][:5000]]).encode())
            os._exit(0)
        finally:
            os._exit(3)
    os.close(write)
    until, said = time.monotonic() + SECONDS, b""
    while (left := until - time.monotonic()) > 0 and select.select([read], [], [], left)[0]:
        if not (part := os.read(read, 65_536)):
            break
        said += part
    hung = left <= 0
    os.close(read)
    if hung:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if hung:
        return "hang", f"more than {SECONDS:g} s"
    if status or not said:
        return "crash", f"status {status}"
    return tuple(json.loads(said))


def _limited() -> None:
    """Sets the limit of memory; no words, no core file."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    sys.stdout = sys.stderr = io.StringIO()
    warnings.simplefilter("ignore")


def _used(format: Format, folder: Path, expected: str | None) -> tuple[str, str]:
    try:
        mark = marked(format.use(folder))
        if expected is None:
            return "right", mark
        if mark == expected:
            return "right", ""
        found = format.verify(folder) if format.verify is not None else []
        return ("found", found[0]) if found else ("silent", "")
    except (ValueError, OSError) as error:
        line = str(error)
        clear = "\n" not in line.strip() and type(error) is not UnicodeDecodeError and line.strip()
        return ("refused", line) if clear else ("traceback", f"{type(error).__name__}: {line}")
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {str(error)[:500]}"


def run(name: str, tries: int, seed: int = 0, work: Path | None = None) -> dict[str, Any]:
    """Damages a format many times; counts of the ends, and the first faults of each kind."""
    format = FORMATS[name]
    for module in ("pyarrow.parquet", "PIL.Image", "safetensors.torch", *format.modules):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(dir=work) as place:
        whole, folder = Path(place, "whole"), Path(place, "damaged")
        whole.mkdir()
        made = os.fork()  # so that this process has checked no file yet
        if made == 0:
            try:
                warnings.simplefilter("ignore")
                format.make(whole)
            except BaseException as error:
                print(f"{name}: {error!r}", file=sys.stderr)
                os._exit(1)
            os._exit(0)
        if os.waitpid(made, 0)[1]:
            raise RuntimeError(f"{name} could not be made")
        shutil.copytree(whole, folder)
        end, expected = attempt(format, folder, None)
        if end != "right":
            raise RuntimeError(f"undamaged, {name} ended in {end}: {expected}")
        ends: Counter[str] = Counter()
        faults: dict[str, list[str]] = {}
        for number in range(tries):
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            what = damage(folder, random.Random(f"{name} {seed} {number}"))
            end, said = attempt(format, folder, expected)
            ends[end] += 1
            if end in FAULTS:
                faults.setdefault(end, []).append(f"{number}: {what}: {said[:300]}")
        return {**{end: ends[end] for end in ENDS}, "faults": {k: v[:5] for k, v in faults.items()}}


def main() -> None:
    """Runs all formats, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in options.formats or FORMATS:
        if find_spec(FORMATS[name].needs) is None:
            print(f"{name}: {FORMATS[name].needs} is not installed")
            continue
        results[name] = run(name, options.tries, options.seed)
        print(name, json.dumps(results[name], indent=1), flush=True)
    if options.out:
        about = {"tries": options.tries, "seed": options.seed, "memory": MEMORY, "seconds": SECONDS}
        options.out.write_text(json.dumps({**about, "formats": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
