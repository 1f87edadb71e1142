"""Tells from a path what it holds: pictures to build from, or embeddings to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retrodiff.databases.build.imports import Part
from retrodiff.databases.build.released import clip_retrieval_parts, npy_parts, rdm_parts
from retrodiff.databases.sources.folders import ImageFolder, Source
from retrodiff.databases.sources.skipped import warn_of_unused
from retrodiff.databases.sources.tables import ParquetImages, SavedDataset
from retrodiff.databases.sources.tars import Tars
from retrodiff.databases.sources.walk import (
    ARCHIVES,
    files_below,
    has_pictures,
    holds_database,
    is_archive,
    is_picture,
    natural,
)
from retrodiff.databases.sources.zips import Zips
from retrodiff.interfaces import Scale


class Format(NamedTuple):
    """Files that hold pictures, known by their endings.

    Args:
        name: what several such files are called in errors.
        endings: of the files, in small letters, such as ``.tar``.
        opens: files in their order, column of the pictures, columns for every row -> the source.
    """

    name: str
    endings: tuple[str, ...]
    opens: Callable[[Sequence[Path], str, Mapping[str, Any] | None], Source]

    def of(self, files: Sequence[Path]) -> list[Path]:
        """Those of the files that are of this format."""
        return [file for file in files if file.name.lower().endswith(self.endings)]


FORMATS = (
    Format("tars", ARCHIVES, lambda files, _, columns: Tars(files, columns)),
    Format("parquet files", (".parquet",), ParquetImages),
    Format("zips", (".zip",), lambda files, _, columns: Zips(files, columns)),
)
"""What `open_source` knows beside folders of pictures and saved datasets: a new format goes here.

Of a folder that holds files of several formats, the first one here is taken.
"""


def open_source(
    path: str | Path, *, image_column: str = "image", columns: Mapping[str, Any] | None = None
) -> Source:
    """The pictures at a path, whatever holds them.

    A folder with ``state.json`` is a dataset of ``save_to_disk``. One without picture files is a
    WebDataset if there are tars in it or below it, compressed or not, a table if there are parquet
    files, and archives if there are zips; any other is a folder of pictures. Single files of these
    formats work too, and patterns such as ``"shards/0*.tar"``.

    Args:
        path: folder, file, or pattern.
        image_column: of a table.
        columns: the same for every row, such as ``{"license": "CC0"}``.

    Raises:
        ValueError: the path holds embeddings, or nothing that is known.
        FileNotFoundError: there is nothing at the path.
    """
    path = Path(path).expanduser()
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return SavedDataset(path, image_column, columns)
    if (path / "img_emb").is_dir():
        raise ValueError(
            f"{path} holds embeddings of clip-retrieval, not pictures: import it "
            "(retrodiff database import)"
        )
    if path.is_dir() and (holds_database(path) or has_pictures(path)):
        return ImageFolder(path, columns)
    files = _below(path) if path.is_dir() else _files(path)
    if not any(is_picture(file.name) for file in files):
        for known in FORMATS:
            if chosen := known.of(files):
                others = [f.name for f in set(files).difference(chosen) if is_archive(f.name)]
                why = f"an archive, but no {known.name.removesuffix('s')}: unpack it"
                warn_of_unused(path, [(name, why) for name in sorted(others, key=natural)])
                return known.opens(chosen, image_column, columns)
    if not path.is_dir() and files:
        names = ", ".join(known.name for known in FORMATS)
        raise ValueError(
            f"{path} is no source of pictures: give a folder, {names}, or a dataset that "
            "save_to_disk wrote"
        )
    return ImageFolder(path, columns)


def open_parts(path: str | Path) -> tuple[list[Part], Scale | None]:
    """The embeddings at a path, and their scale where the format says it.

    Known are a folder of clip-retrieval (``img_emb``), a folder of numbered npz files as released
    with Blattmann et al. 2022, and npy files: one, a pattern, or a folder. A parquet file of the
    same name beside an npy file holds its records.

    Raises:
        ValueError: there are no embeddings at the path, or one of several parquet files is missing.
    """
    path = Path(path).expanduser()
    if (path / "img_emb").is_dir():
        return clip_retrieval_parts(path), "unit"
    files = _files(path)
    arrays = [file for file in files if file.suffix == ".npy"]
    if arrays:
        tables = [file.with_suffix(".parquet") for file in arrays]
        has = [table.is_file() for table in tables]
        if any(has) and not all(has):
            raise ValueError(
                f"{tables[has.index(False)]} is missing, though other npy files have their parquet "
                "file: give one for each, or none"
            )
        return npy_parts(arrays, tables if all(has) else None), None
    if path.is_dir() and any(file.suffix == ".npz" for file in files):
        return rdm_parts(path), None
    raise ValueError(
        f"{path} holds no embeddings: give npy files, a folder of clip-retrieval, or a folder of "
        "npz parts"
    )


def _below(path: Path) -> list[Path]:
    """The files in a folder and below it, in the order people count."""
    return [path / found.name for found in files_below(path) if found.problem is None]


def _files(path: Path) -> list[Path]:
    """The files of a folder or a pattern, or the file itself, in the order people count."""
    if path.is_dir():
        found = [file for file in path.iterdir() if not file.name.startswith(".")]
    elif path.is_file():
        found = [path]
    elif set("*?[") & set(path.name):
        found = list(path.parent.glob(path.name))
        if not found:
            raise FileNotFoundError(f"nothing fits {path}: check the pattern")
    elif path.exists():
        found = []
    else:
        raise FileNotFoundError(f"{path} does not exist: give a folder or a file")
    return sorted((f for f in found if f.is_file()), key=lambda f: natural(f.name))
