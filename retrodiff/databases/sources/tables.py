"""Pictures in a column of a table: parquet files, and Hugging Face ``datasets``, saved or open."""

from __future__ import annotations

import json
import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from retrodiff.databases.sources.folders import Item, Source
from retrodiff.databases.sources.groups import RowGroups, arrow_batches, checked_batch, plain_value
from retrodiff.databases.sources.limits import one_line, open_parquet
from retrodiff.disk.files import listed
from retrodiff.disk.untrusted import read_json
from retrodiff.pictures.converting import to_image, warn_of_range
from retrodiff.pictures.decoding import UnreadableImage, read_image
from retrodiff.text import escaped


class _Tables(Source):
    """Rows of tables in groups, read when they are asked for.

    Args:
        column: of bytes, of structs with ``bytes`` or ``path`` as Hugging Face writes them, or of
            paths.
        columns: the same for every row.
        sizes: rows of each group.
        schema: of the tables.
        name: what the table is called in errors.
        home: the folder that paths in the table must lie in, and are relative to.
    """

    def __init__(
        self,
        column: str,
        columns: Mapping[str, Any] | None,
        sizes: Sequence[int],
        schema: Any,
        name: str,
        home: Path,
    ):
        import pyarrow as pa

        if column not in schema.names:
            names = ", ".join(schema.names)
            raise ValueError(f"{name} has no column {column!r}; columns: {names}")
        self.column, self.columns, self.home = column, dict(columns or {}), home
        self.plain = [
            field.name
            for field in schema
            if field.name != column and not pa.types.is_nested(field.type)
        ]
        self.classes = _class_names(schema)
        self._starts = np.cumsum([0, *sizes])

    @abstractmethod
    def _row(self, group: int, i: int) -> Any:
        """Row ``i`` of a group, as a record batch of one row."""
        ...

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, i: int) -> str:
        """Row number."""
        return f"row {i}"

    def read(self, i: int) -> list[Item]:
        """The picture of row ``i``."""
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        row = self._row(number, i - int(self._starts[number]))
        record = {escaped(name): plain_value(row.column(name)[0]) for name in self.plain}
        for name, classes in self.classes.items():
            if isinstance(number := record.get(name), int):
                record[name] = classes[number] if 0 <= number < len(classes) else None
        return [Item(self._picture(row.column(self.column)[0].as_py()), record | self.columns)]

    def _picture(self, value: Any) -> Tensor:
        data, path = value, None
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
        if isinstance(data, str):
            data, path = None, data
        if isinstance(data, bytes):
            return read_image(data)
        if not isinstance(path, str) or not path:
            raise UnreadableImage(f"column {self.column!r} holds no bytes")
        home = self.home.resolve()
        try:
            file = (home / path).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise UnreadableImage(f"holds a path and no bytes: {error}") from None
        if not file.is_relative_to(home):
            raise UnreadableImage(
                f"holds a path and no bytes, and {path} lies outside {home}: put the pictures "
                "beside the table, or write their bytes into it"
            )
        try:
            return read_image(file)
        except UnreadableImage as error:
            raise UnreadableImage(f"{path}: {error}") from None


class ParquetImages(_Tables):
    """Pictures in a column of parquet files; the other plain columns become the records.

    Rows are decoded one at a time, in their order as fast as a disk reads them. A column ``id``
    must not hold a value twice; numbers that Hugging Face has written as classes become the
    classes' names. Where a row holds a path and no bytes, the file is read if it lies in the
    folder of the first file or below it.

    Args:
        files: one, or several in the order they shall have.
        column: of bytes, of structs with ``bytes`` or ``path`` as Hugging Face writes them, or of
            paths.
        columns: the same for every row.

    Raises:
        ValueError: no files are given, or one lacks the column.

    Examples:
        >>> import io
        >>> import pyarrow as pa
        >>> import pyarrow.parquet as pq
        >>> from PIL import Image
        >>> from retrodiff.databases import ParquetImages
        >>> encoded = io.BytesIO()
        >>> Image.new("RGB", (8, 8)).save(encoded, "PNG")
        >>> table = pa.table({"image": [encoded.getvalue()], "caption": ["black"]})
        >>> pq.write_table(table, "pictures.parquet")
        >>> ParquetImages("pictures.parquet").read(0)[0].record
        {'caption': 'black'}
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        column: str = "image",
        columns: Mapping[str, Any] | None = None,
    ):
        self.files = listed(files)
        if not self.files:
            raise ValueError("no parquet files: give at least one")
        self.groups: list[tuple[int, int]] = []
        sizes, schema = [], None
        for number, file in enumerate(self.files):
            opened = open_parquet(file)
            schema = schema or opened.schema_arrow
            names = opened.schema_arrow.names
            if column not in names or not set(schema.names) <= set(names):
                lacks = next(n for n in [column, *schema.names] if n not in names)
                raise ValueError(f"{file} has no column {lacks!r}; columns: {', '.join(names)}")
            for group in range(opened.num_row_groups):
                self.groups.append((number, group))
                sizes.append(opened.metadata.row_group(group).num_rows)
        home = self.files[0].parent
        super().__init__(column, columns, sizes, schema, str(self.files[0]), home)
        self._marks = [file.stat().st_mtime_ns for file in self.files]

    def _row(self, group: int, i: int) -> Any:
        number, group = self.groups[group]
        names = (self.column, *self.plain)
        rows = _row_groups(self.files[number], names, self._marks[number], os.getpid())
        return rows.row(group, i)

    def ids(self) -> Iterable[Any] | None:
        """The column ``id``, if there is one."""
        return self._ids() if "id" in self.plain else None

    def _ids(self) -> Iterator[Any]:
        for file in self.files:
            try:
                for batch in open_parquet(file).iter_batches(columns=["id"]):
                    yield from map(plain_value, batch.column(0))
            except OSError as error:
                raise ValueError(f"{file}: column id is damaged: {one_line(error)}") from None

    def paths(self) -> Iterable[Path]:
        """The files."""
        return self.files

    def describe(self) -> dict[str, Any]:
        """The files' names and the number of rows."""
        names = [file.name for file in self.files]
        return {
            "kind": "parquet",
            "files": names,
            "column": self.column,
            "count": len(self),
            "bytes": sum(file.stat().st_size for file in self.files),
            "columns": self.columns,
        }


class SavedDataset(_Tables):
    """Pictures of a Hugging Face dataset that ``save_to_disk`` wrote; needs no ``datasets``.

    The files are memory-mapped. Columns are taken over as in `ParquetImages`.

    Args:
        folder: with ``state.json`` and the arrow files.
        column: of the pictures.
        columns: the same for every row.

    Raises:
        FileNotFoundError: a file that ``state.json`` names is missing.
        ValueError: the folder is no dataset, holds several, or is empty.

    Examples:
        >>> import io, json
        >>> from pathlib import Path
        >>> import pyarrow as pa
        >>> from PIL import Image
        >>> from retrodiff.databases import SavedDataset
        >>> encoded = io.BytesIO()
        >>> Image.new("RGB", (8, 8)).save(encoded, "PNG")
        >>> table = pa.table({"image": [encoded.getvalue()], "caption": ["black"]})
        >>> Path("pictures").mkdir()
        >>> with pa.ipc.new_stream("pictures/data.arrow", table.schema) as stream:
        ...     stream.write_table(table)
        >>> state = {
        ...     "_data_files": [{"filename": "data.arrow"}]
        ... }  # as ``save_to_disk`` writes it
        >>> _ = Path("pictures/state.json").write_text(json.dumps(state))
        >>> SavedDataset("pictures").read(0)[0].record
        {'caption': 'black'}
    """

    def __init__(
        self,
        folder: str | Path,
        column: str = "image",
        columns: Mapping[str, Any] | None = None,
    ):
        self.folder = Path(folder).expanduser()
        if (self.folder / "dataset_dict.json").is_file():
            try:
                about = read_json(self.folder / "dataset_dict.json")
                paths = ", ".join(str(self.folder / str(split)) for split in about["splits"])
            except (OSError, ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{folder} is no dataset: its dataset_dict.json is damaged"
                ) from None
            raise ValueError(f"{folder} holds several datasets, give one of them: {paths}")
        try:
            state = read_json(self.folder / "state.json")
            self.files = [self.folder / Path(f["filename"]).name for f in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{folder} is no dataset of save_to_disk: no state.json") from None
        self.mark = str(state.get("_fingerprint", ""))
        for file in self.files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing, which state.json names: fetch it")
        self._marks = [file.stat().st_mtime_ns for file in self.files]
        self.groups: list[tuple[int, int]] = []
        sizes, schema = [], None
        for number, (file, mark) in enumerate(zip(self.files, self._marks, strict=True)):
            schema, batches = arrow_batches(file, mark)
            self.groups += [(number, batch) for batch in range(len(batches))]
            sizes += [len(batch) for batch in batches]
        if schema is None:
            raise ValueError(f"{folder} names no files: the dataset is empty")
        super().__init__(column, columns, sizes, schema, str(folder), self.folder)

    def _row(self, group: int, i: int) -> Any:
        return self._batch(group).slice(i, 1)

    def _batch(self, group: int) -> Any:
        file, batch = self.groups[group]
        return checked_batch(self.files[file], self._marks[file], batch)

    def ids(self) -> Iterable[Any] | None:
        """The column ``id``, if there is one."""
        if "id" not in self.plain:
            return None
        groups = range(len(self.groups))
        return (value for n in groups for value in self._batch(n).column("id").to_pylist())

    def paths(self) -> Iterable[Path]:
        """The dataset's files."""
        return self.files

    def describe(self) -> dict[str, Any]:
        """The dataset's own fingerprint, and the number of rows."""
        return {
            "kind": "dataset",
            "mark": self.mark,
            "column": self.column,
            "count": len(self),
            "columns": self.columns,
        }


class DatasetImages(Source):
    """Pictures of a Hugging Face ``datasets.Dataset``, or of any sequence of dicts.

    A row that cannot be decoded, or lacks the column, is a skipped picture with its reason.

    Args:
        dataset: has a length; ``dataset[i]`` is a dict.
        column: of whatever `retrodiff.pictures.to_image` takes (PIL images, arrays, encoded bytes,
            paths), or dicts with ``bytes`` or ``path``. Gray pictures become (3, h, w).
        keep: columns that become the records; None: all that are text, numbers, dates or None.

    Raises:
        ValueError: the dataset has no length or no such column.

    Examples:
        >>> from PIL import Image
        >>> from retrodiff.databases import DatasetImages
        >>> rows = [{"image": Image.new("RGB", (8, 8)), "caption": "black"}]
        >>> source = DatasetImages(rows)
        >>> source.read(0)[0].record
        {'number': 0, 'caption': 'black'}
    """

    def __init__(self, dataset: Any, column: str = "image", keep: Sequence[str] | None = None):
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                "the dataset has no length (a stream?): a build continues by row number, give one "
                "that is loaded (streaming=False)"
            )
        self.dataset, self.column, self.keep = dataset, column, keep
        self._warned = False
        names = self._names()
        if names is not None and column not in names:
            raise ValueError(f"the dataset has no column {column!r}; columns: {', '.join(names)}")

    def _names(self) -> list[str] | None:
        """The columns; None where the first row cannot be read."""
        names = getattr(self.dataset, "column_names", None)  # of ``datasets``: decodes nothing
        if isinstance(names, list):
            return names
        try:
            return list(self.dataset[0])
        except Exception:
            return None

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, i: int) -> str:
        """Row number."""
        return f"row {i}"

    def read(self, i: int) -> list[Item]:
        """The picture of row ``i``.

        Raises:
            UnreadableImage: the row has no picture, or one that cannot be decoded.
        """
        try:
            row = self.dataset[i]
            image = row[self.column]
        except KeyError:
            raise UnreadableImage(f"the row has no column {self.column!r}") from None
        except Exception as error:  # whatever decodes the row may raise anything
            reason = re.sub(r" ?<[^>]* at 0x[0-9a-f]+>", "", one_line(error))
            raise UnreadableImage(f"{type(error).__name__}: {reason}") from None
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if image is None:
            raise UnreadableImage(f"column {self.column!r} is empty")
        try:
            pixels = to_image(image, name=f"column {self.column!r}")
        except UnreadableImage:
            raise
        except ValueError as error:
            raise UnreadableImage(str(error)) from None
        if not self._warned and pixels.is_floating_point():
            warn_of_range([pixels], f"column {self.column!r}")
            self._warned = True
        names = self.keep or [n for n, v in row.items() if isinstance(v, _PLAIN)]
        record = {n: _item(row.get(n)) for n in names if n != self.column}
        return [Item(pixels.expand(3, -1, -1), {"number": i, **record})]

    def ids(self) -> Iterable[Any] | None:
        """The column ``id``, if there is one and it is kept."""
        kept = self.keep is None or "id" in self.keep
        if not len(self.dataset) or "id" not in (self._names() or ()) or not kept:
            return None
        if hasattr(self.dataset, "column_names"):  # of ``datasets``: decodes no picture
            return self.dataset["id"]
        return map(self._id, range(len(self.dataset)))

    def _id(self, i: int) -> Any:
        try:
            return self.dataset[i].get("id")
        except Exception:  # it will be skipped
            return None

    def describe(self) -> dict[str, Any]:
        """The dataset's own fingerprint, if it has one, and the number of rows."""
        mark = getattr(self.dataset, "_fingerprint", "")
        return {"kind": "dataset", "mark": mark, "column": self.column, "count": len(self)}


@lru_cache(2)
def _row_groups(file: Path, columns: tuple[str, ...], mark: int, process: int) -> RowGroups:
    del mark, process  # tell apart what had one name at different times, and forked processes
    return RowGroups(file, columns)


_PLAIN = (str, int, float, bool, np.generic, date, type(None))


def _item(value: Any) -> Any:
    """A value of a record as Python has it."""
    if isinstance(value, np.generic):
        return value.item()
    return escaped(value) if isinstance(value, str) else value


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Columns of class numbers, and the classes' names, as Hugging Face notes them."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        features = about["info"]["features"].items()
        return {name: f["names"] for name, f in features if f.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
