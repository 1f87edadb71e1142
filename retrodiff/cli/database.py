"""``retrodiff database ...``: builds, looks into, searches and changes databases of pictures."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrodiff.cli import options as types
from retrodiff.databases import (
    EmbeddingDatabase,
    Patchify,
    append_to_database,
    build_database,
    captions_of,
    contact_sheet,
    delete_rows,
    import_embeddings,
    open_database,
    open_parts,
    open_source,
)
from retrodiff.databases.build.ingest import ENGINES
from retrodiff.databases.sources.folders import Source
from retrodiff.databases.sources.formats import FORMATS
from retrodiff.databases.sources.skipped import SkippedPictures, skipped_message
from retrodiff.disk.files import atomic_write
from retrodiff.disk.shipped import shipped
from retrodiff.encoders import encoder_from_string
from retrodiff.indexes import build_automatic, recipe_from_string
from retrodiff.interfaces import Fingerprint, Query
from retrodiff.pictures import to_image
from retrodiff.pictures.thumbnails import to_float
from retrodiff.retrieval.known_words import warning_of_strange

NEIGHBORS = 8
"""How many a search shows where --k is not given."""


def add_parser(subparsers: Any) -> None:
    """Adds ``database`` and its commands to the command line."""
    parser = subparsers.add_parser("database", help="build, inspect, search and change databases")
    commands = parser.add_subparsers(dest="database_command", required=True)

    build = commands.add_parser("build", help="encode pictures into a database")
    _source_options(build)
    build.add_argument("out", type=types.new_folder, help="folder to be made")
    _encoder_options(build)
    build.add_argument(
        "--batch-size", type=types.count, default=64, help="pictures per encoder call"
    )
    build.add_argument(
        "--thumbnails", type=types.count, metavar="SIDE", help="keep small copies to show"
    )
    build.add_argument("--overwrite", action="store_true", help="replace what is there")
    build.set_defaults(run=_build)

    take = commands.add_parser("import", help="make a database of embeddings that exist already")
    take.add_argument(
        "source",
        type=types.path,
        help="npy files (one, a folder, or a quoted pattern), a folder of clip-retrieval, or a "
        "folder of npz parts as released with the paper",
    )
    take.add_argument("out", type=types.new_folder, help="folder to be made")
    _encoder_options(
        take, "who made them, as for build; name:TEXT if retrodiff has no such encoder"
    )
    take.add_argument(
        "--scale",
        choices=["raw", "unit"],
        help="raw as the encoder gives them, or divided by their norm; if not given: unit where "
        "the norms are 1",
    )
    take.add_argument("--resume", action="store_true", help="continue what was interrupted")
    take.add_argument("--overwrite", action="store_true", help="replace what is there")
    take.set_defaults(run=_import)

    append = commands.add_parser("append", help="add pictures to a database")
    _source_options(append)
    append.add_argument("database", type=types.path, help="folder, or hf:// address, of a database")
    _encoder_options(append)
    append.set_defaults(run=_append)

    for name, run, text in (
        ("info", _info, "what is in a database"),
        ("verify", _verify, "check every byte against its hash"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "database", type=types.path, help="folder, or hf:// address, of a database"
        )
        command.set_defaults(run=run)

    delete = commands.add_parser("delete", help="take out the rows that meet a condition")
    delete.add_argument("database", type=types.path, help="folder, or hf:// address, of a database")
    delete.add_argument("condition", help="such as \"label == 'dog' and year > 2000\"")
    delete.set_defaults(run=_delete)

    index = commands.add_parser("index", help="build an index and measure its recall")
    index.add_argument("database", type=types.path, help="folder, or hf:// address, of a database")
    index.add_argument(
        "recipe", help="auto, annoy, usearch, faiss, scann, cuvs; annoy:trees=20,rerank=200"
    )
    index.add_argument(
        "-k", "--k", type=types.count, default=20, help="neighbors that recall is measured at"
    )
    index.set_defaults(run=_index)

    search = commands.add_parser("search", help="find neighbors, write a contact sheet")
    search.add_argument("database", type=types.path, help="folder, or hf:// address, of a database")
    search.add_argument("--text", action="append", default=[], help="a prompt; may be repeated")
    search.add_argument(
        "--image", type=types.path, action="append", default=[], help="a file; may be repeated"
    )
    search.add_argument(
        "-k",
        "--k",
        type=types.count,
        help=f"neighbors per query; if not given: {NEIGHBORS}, or all of fewer rows",
    )
    search.add_argument("--index", help="a saved index, or exact; chosen by the rows if not given")
    search.add_argument("--where", help="condition on the columns")
    search.add_argument(
        "--out",
        type=types.picture_file,
        help="the contact sheet; if not given: neighbors.png, or neighbors-2.png and so on",
    )
    search.add_argument("--overwrite", action="store_true", help="replace the file of --out")
    _encoder_options(
        search,
        "as for build; not needed for the database of a model with a package, such as pictograms",
        required=False,
    )
    search.set_defaults(run=_search)


def _source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=types.path,
        help="folder of pictures (its sub-folders are labels), "
        f"{', '.join(known.name for known in FORMATS)}, or a Hugging Face dataset saved to disk; a "
        "folder, a file, or a quoted pattern",
    )
    parser.add_argument("--image-column", default="image", help="of parquet files and datasets")
    parser.add_argument("--patch-size", type=types.count, help="cut patches of this side")
    parser.add_argument("--short-side", type=types.count, help="resize pictures to this first")
    parser.add_argument(
        "--patches", type=types.count, help="random patches per picture; else a grid"
    )
    parser.add_argument("--stride", type=types.count, help="distance of the grid's patches")
    parser.add_argument("--seed", type=types.seed, default=0, help="of the random patches")
    parser.add_argument("--license", help="kept with every row")
    parser.add_argument("--credit", help="kept with every row")
    parser.add_argument(
        "--engine", choices=list(ENGINES), default="local", help="ray: as a job on a Ray cluster"
    )
    parser.add_argument(
        "--workers",
        type=types.integer(0, 1024),
        default=0,
        help="processes that decode ahead; with ray: encoders",
    )
    parser.add_argument("--resume", action="store_true", help="continue what was interrupted")


def _encoder_options(
    parser: argparse.ArgumentParser,
    help: str = "open_clip:NAME:TAG, timm:NAME, pictograms (that of the shipped model), or a "
    "folder with an encoder of your own",
    required: bool = True,
) -> None:
    parser.add_argument("--encoder", required=required, help=help)
    parser.add_argument(
        "--preprocessing",
        help="how pictures are resized for it: rdm, openai or plain; its default if not given",
    )
    parser.add_argument("--no-pretrained", action="store_true", help="random weights (--seed 0)")
    parser.add_argument(
        "--image-size", type=types.count, help="side it sees; if not given: that of its weights"
    )
    parser.add_argument("--device", type=types.device, default="cpu", help="of the encoder")


def _encoder(options: argparse.Namespace) -> Any:
    given = {
        name: value
        for name in ("preprocessing", "image_size")
        if (value := getattr(options, name)) is not None
    }
    return encoder_from_string(
        options.encoder, pretrained=not options.no_pretrained, device=options.device, **given
    )


def _source(options: argparse.Namespace) -> Source:
    columns = {n: v for n in ("license", "credit") if (v := getattr(options, n)) is not None}
    source = open_source(options.source, image_column=options.image_column, columns=columns)
    if options.patch_size is None:
        if options.patches or options.stride or options.short_side:
            raise ValueError("--patches, --stride and --short-side need --patch-size")
        return source
    patchify = Patchify(
        size=options.patch_size,
        short_side=options.short_side,
        n=options.patches,
        stride=options.stride,
        seed=options.seed,
    )
    return patchify.over(source)


def _build(options: argparse.Namespace) -> int:
    with plain_warnings():
        database = build_database(
            options.out,
            _source(options),
            _encoder(options),
            batch_size=options.batch_size,
            thumbnails=options.thumbnails,
            workers=options.workers,
            engine=options.engine,
            resume=options.resume,
            overwrite=options.overwrite,
        )
    print(f"{options.out}: {len(database):,} rows")
    return 0


def _import(options: argparse.Namespace) -> int:
    parts, scale = open_parts(options.source)
    if scale is not None and options.scale not in (None, scale):
        raise ValueError(f"{options.source} is of {scale} scale, not --scale {options.scale}")
    first = parts[0].embeddings[0:1024]
    unit = abs(np.linalg.norm(first.astype(np.float32), axis=1) - 1) < 0.02
    scale = scale or options.scale or ("unit" if unit.all() else "raw")
    kind, _, name = options.encoder.partition(":")
    if kind == "name" and name:
        preprocessing = options.preprocessing or ""
        dim = parts[0].embeddings.shape[1]
        mark = Fingerprint(encoder=name, weights="", preprocessing=preprocessing, dim=dim)
    else:
        mark = _encoder(options).fingerprint
    database = import_embeddings(
        options.out,
        parts,
        replace(mark, scale=scale),
        resume=options.resume,
        overwrite=options.overwrite,
    )
    print(f"{options.out}: {len(database):,} rows, {scale} scale, by {mark.encoder}")
    return 0


def _append(options: argparse.Namespace) -> int:
    with plain_warnings():
        database = append_to_database(
            options.database,
            _source(options),
            _encoder(options),
            workers=options.workers,
            engine=options.engine,
            resume=options.resume,
        )
    print(f"{options.database}: {len(database):,} rows")
    return 0


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Says which pictures were skipped in one line, without the line of code that says so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    for warning in caught:
        if issubclass(warning.category, SkippedPictures):
            print(warning.message, file=sys.stderr)
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def _kept(address: str) -> EmbeddingDatabase:
    """A database in the format of this library, of which the commands below say and do more."""
    database = open_database(address, "exact")
    if not isinstance(database, EmbeddingDatabase):
        raise ValueError(
            f"{address} is kept by another program: use its own tools, or search it with "
            "retrodiff database search"
        )
    return database


def _info(options: argparse.Namespace) -> int:
    database = _kept(options.database)
    for name, value in describe(database).items():
        print(f"{name:<14} {value}")
    return 0


def describe(database: EmbeddingDatabase) -> dict[str, str]:
    """What ``database info`` prints."""
    manifest, mark = database.manifest, database.fingerprint
    sizes: dict[str, int] = {}
    for shard in manifest.shards:
        for name, about in shard.files.items():
            kind = name.split("-")[0]
            sizes[kind] = sizes.get(kind, 0) + about["bytes"]
    hidden = 0 if database.hidden is None else len(database.hidden)
    about = {
        "rows": f"{len(database):,}" + (f" ({hidden:,} deleted)" if hidden else ""),
        "encoder": f"{mark.encoder}, weights {mark.weights[:12]}",
        "preprocessing": mark.preprocessing,
        "width": f"{mark.dim}, {mark.scale}, float16",
        "rows hash": mark.rows,
        "columns": ", ".join(database.columns),
        "size": ", ".join(f"{kind} {n / 1e6:,.1f} MB" for kind, n in sizes.items()),
    }
    if manifest.skipped:
        about["skipped"] = skipped_message(manifest.skipped, 5)
    for name, (_, recall) in database.saved_indexes().items():
        about[f"index {name}"] = str(recall)
    return about


def _verify(options: argparse.Namespace) -> int:
    wrong = _kept(options.database).verify()
    for line in wrong:
        print(f"{options.database}: {line}", file=sys.stderr)
    if not wrong:
        print(f"{options.database}: every file is as it was written")
    return 1 if wrong else 0


def _delete(options: argparse.Namespace) -> int:
    rows = _kept(options.database).where(options.condition).rows
    database = delete_rows(options.database, rows)
    print(f"{options.database}: {len(rows):,} rows deleted, {len(database):,} left")
    return 0


def _index(options: argparse.Namespace) -> int:
    database = _kept(options.database)
    if options.recipe == "auto":
        build = partial(database.build_index, k=options.k, save=False)
        indexed, chosen = build_automatic(len(database), build)
        indexed.save_index()
    else:
        recipe = recipe_from_string(options.recipe)
        chosen = f"{recipe}: {database.build_index(recipe, k=options.k).recall}"
    print(f"{options.database}: {chosen}")
    return 0


def _sheet_file(options: argparse.Namespace) -> Path:
    """Where the contact sheet goes; an earlier one is replaced only when that was asked."""
    if options.out is None:
        names = (f"neighbors{'' if i == 1 else f'-{i}'}.png" for i in count(1))
        return next(file for name in names if not (file := Path(name)).exists())
    out = Path(options.out)
    if out.exists() and not options.overwrite:
        raise FileExistsError(f"{out} exists: choose another --out, or add --overwrite")
    return out


def _search(options: argparse.Namespace) -> int:
    if not options.text and not options.image:
        raise ValueError("nothing to search for: give --text or --image")
    out = _sheet_file(options)
    opened = open_database(options.database, options.index)
    database = opened.where(options.where) if options.where else opened
    if options.encoder is None:
        if shipped(options.database) is None:
            raise ValueError(f"give --encoder, that {options.database} was made with")
        options.encoder = options.database
    encoder = _encoder(options)
    if (what := encoder.fingerprint.disagreement(database.fingerprint)) is not None:
        raise ValueError(
            f"--encoder {options.encoder} and {options.database} disagree: {what}: give the "
            f"encoder that it was built with ({database.fingerprint.encoder})"
        )
    queries: list[Any] = list(options.text)
    parts = []
    if options.text:
        if not hasattr(encoder, "encode_text"):
            raise ValueError(f"{options.encoder} has no text tower: search with --image")
        parts.append(encoder.encode_text(options.text))
    for file in options.image:
        queries.append(to_float(to_image(file)))
        parts.append(encoder.encode_image(queries[-1][None]))
    if not len(database):
        raise ValueError(
            f"no row of {options.database} meets the condition of --where: change it"
            if options.where
            else f"{options.database} has no rows: append pictures to it"
        )
    k = min(NEIGHBORS, len(database)) if options.k is None else options.k
    found = database.search(Query(torch.cat(parts).cpu()), k)
    records = tuple(tuple(database.records(row)) for row in found.indices)
    found = replace(found, records=records)
    names = [*options.text, *options.image]
    whole = captions_of(found, side=None)
    for name, row, lines in zip(names, found.indices.tolist(), whole, strict=True):
        print(name)
        for i, line in zip(row, lines, strict=True):
            print(f"  row {i}: " + line.replace("\n", " ").rstrip())
    pictures = [[database.image(i) for i in row] for row in found.indices.tolist()]
    with atomic_write(out) as partial:
        contact_sheet(queries, pictures, captions_of(found)).save(
            partial, format=types.picture_format(out)
        )
    print(f"contact sheet: {out}")
    asked = found.rows(slice(0, len(options.text)))
    if (told := warning_of_strange(encoder, options.text, database, asked)) is not None:
        print(f"retrodiff: {told}", file=sys.stderr)
    return 0
