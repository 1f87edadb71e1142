"""Pictures inside other files: WebDataset tars, parquet columns, and Hugging Face ``datasets``."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from retrodiff.databases.images import UnreadableImage, from_pil, read_image
from retrodiff.databases.sources import Item, Source

_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")


class Tars(Source):
    """Samples of WebDataset / img2dataset tars: a picture, with ``txt``, ``cls`` and ``json``.

    Nothing is unpacked: members are read at their offset. ``txt`` becomes the column ``caption``,
    ``cls`` the column ``label``, the scalars of ``json`` columns of their own names.

    Args:
        files: the tars, uncompressed, in the order they shall have.
        columns: the same for every row.
    """

    def __init__(self, files: Sequence[str | Path], columns: Mapping[str, Any] | None = None):
        self.files = [Path(file) for file in files]
        self.columns = dict(columns or {})
        self.samples: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
        for number, file in enumerate(self.files):
            self._scan(number, file)
        if not self.samples:
            raise ValueError(f"no pictures in {', '.join(map(str, files)) or 'no tars'}")

    def _scan(self, number: int, file: Path) -> None:
        try:
            with tarfile.open(file, "r:") as tar:
                members = [m for m in tar if m.isfile()]
        except tarfile.TarError as error:
            raise ValueError(f"{file} is not a whole, uncompressed tar: {error}") from None
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        for member in members:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{file}: member {member.name!r} points outside the archive")
            stem, _, ending = path.name.partition(".")
            group = groups.setdefault(str(path.with_name(stem)), {})
            if ending.lower() in group:
                raise ValueError(f"{file}: member {member.name!r} is there twice")
            group[ending.lower()] = (member.offset_data, member.size)
        for key, group in groups.items():
            if any(ending in _PICTURES for ending in group):
                self.samples.append((number, key, group))

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        """Tar and key."""
        number, key, _ = self.samples[i]
        return f"{self.files[number].name}:{key}"

    def read(self, i: int) -> list[Item]:
        """The picture of sample ``i``."""
        number, _, group = self.samples[i]
        record: dict[str, Any] = {"key": self.name(i)}
        with self.files[number].open("rb") as file:

            def member(ending: str) -> bytes:
                file.seek(group[ending][0])
                return file.read(group[ending][1])

            picture = member(next(e for e in _PICTURES if e in group))
            if "json" in group:
                try:
                    known = json.loads(member("json"))
                except ValueError as error:
                    raise UnreadableImage(f"broken json: {error}") from None
                record |= {k: v for k, v in known.items() if not isinstance(v, dict | list)}
            if "txt" in group:
                record["caption"] = member("txt").decode("utf-8", "replace").strip()
            if "cls" in group:
                record["label"] = member("cls").decode("utf-8", "replace").strip()
        return [Item(read_image(picture), record | self.columns)]

    def describe(self) -> dict[str, Any]:
        """The tars' names, and hash of the keys."""
        keys = "\0".join(self.name(i) for i in range(len(self)))
        return {
            "kind": "tars",
            "files": [file.name for file in self.files],
            "count": len(self),
            "names": hashlib.sha256(keys.encode()).hexdigest()[:32],
            "columns": self.columns,
        }


class ParquetImages(Source):
    """Pictures in a column of parquet files; the other plain columns become the records.

    Args:
        files: in the order they shall have.
        column: of bytes, or of structs with ``bytes`` as Hugging Face writes them.
        columns: the same for every row.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        column: str = "image",
        columns: Mapping[str, Any] | None = None,
    ):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.files, self.column = [Path(file) for file in files], column
        self.columns = dict(columns or {})
        self.groups: list[tuple[int, int]] = []
        sizes = [0]
        for number, file in enumerate(self.files):
            opened = pq.ParquetFile(file)
            names = opened.schema_arrow.names
            if column not in names:
                raise ValueError(f"{file} has no column {column!r}; columns: {', '.join(names)}")
            for group in range(opened.num_row_groups):
                self.groups.append((number, group))
                sizes.append(opened.metadata.row_group(group).num_rows)
        self._starts = np.cumsum(sizes)
        self._nested = pa.types.is_nested
        self._group = lru_cache(2)(self._read_group)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_group", "_nested")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        import pyarrow as pa

        self.__dict__.update(state)
        self._nested = pa.types.is_nested
        self._group = lru_cache(2)(self._read_group)

    def _read_group(self, number: int) -> Any:
        import pyarrow.parquet as pq

        file, group = self.groups[number]
        return pq.ParquetFile(self.files[file]).read_row_group(group)

    def name(self, i: int) -> str:
        """Row number."""
        return f"row {i}"

    def read(self, i: int) -> list[Item]:
        """The picture of row ``i``."""
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        table = self._group(number).slice(i - int(self._starts[number]), 1)
        image = table[self.column][0].as_py()
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            raise UnreadableImage(f"column {self.column!r} holds no bytes")
        record = {
            field.name: table[field.name][0].as_py()
            for field in table.schema
            if field.name != self.column and not self._nested(field.type)
        }
        return [Item(read_image(data), record | self.columns)]

    def describe(self) -> dict[str, Any]:
        """The files' names and the number of rows."""
        names = [file.name for file in self.files]
        return {"kind": "parquet", "files": names, "column": self.column, "count": len(self)}


class DatasetImages(Source):
    """Pictures of a Hugging Face ``datasets.Dataset``, or of any sequence of dicts.

    Args:
        dataset: has a length; ``dataset[i]`` is a dict.
        column: of PIL images, arrays (h, w, 3), encoded bytes, or dicts with ``bytes``.
        keep: columns that become the records; None: all that are text, numbers or None.
    """

    def __init__(self, dataset: Any, column: str = "image", keep: Sequence[str] | None = None):
        if len(dataset) and column not in dataset[0]:
            names = ", ".join(dataset[0])
            raise ValueError(f"the dataset has no column {column!r}; columns: {names}")
        self.dataset, self.column, self.keep = dataset, column, keep

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, i: int) -> str:
        """Row number."""
        return f"row {i}"

    def read(self, i: int) -> list[Item]:
        """The picture of row ``i``."""
        row = self.dataset[i]
        image = row[self.column]
        if isinstance(image, dict):
            image = image.get("bytes")
        if isinstance(image, np.ndarray):
            pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        elif isinstance(image, bytes):
            pixels = read_image(image)
        elif image is None:
            raise UnreadableImage(f"column {self.column!r} is empty")
        else:
            pixels = from_pil(image)
        plain = (str, int, float, bool, type(None))
        names = self.keep or [n for n, v in row.items() if isinstance(v, plain)]
        return [Item(pixels, {"number": i, **{n: row[n] for n in names if n != self.column}})]

    def describe(self) -> dict[str, Any]:
        """The dataset's own fingerprint, if it has one, and the number of rows."""
        mark = getattr(self.dataset, "_fingerprint", "")
        return {"kind": "dataset", "mark": mark, "column": self.column, "count": len(self)}
