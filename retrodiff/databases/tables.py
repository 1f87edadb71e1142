"""Pictures in a column of a table: parquet files, and Hugging Face ``datasets``, saved or open."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrodiff.databases.images import UnreadableImage, from_pil, read_image
from retrodiff.databases.sources import Item, Source
from retrodiff.databases.streams import one_line


class _Tables(Source):
    """Rows of tables in groups; a group is read when one of its rows is asked for.

    Args:
        column: of bytes, or of structs with ``bytes`` as Hugging Face writes them.
        columns: the same for every row.
        sizes: rows of each group.
        schema: of the tables.
        name: what the table is called in errors.
    """

    def __init__(
        self,
        column: str,
        columns: Mapping[str, Any] | None,
        sizes: Sequence[int],
        schema: Any,
        name: str,
    ):
        import pyarrow as pa

        if column not in schema.names:
            names = ", ".join(schema.names)
            raise ValueError(f"{name} has no column {column!r}; columns: {names}")
        self.column, self.columns = column, dict(columns or {})
        self.plain = [
            field.name
            for field in schema
            if field.name != column and not pa.types.is_nested(field.type)
        ]
        self.classes = _class_names(schema)
        self._starts = np.cumsum([0, *sizes])

    @abstractmethod
    def _group(self, number: int) -> Any:
        """The table of a group."""
        ...

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, i: int) -> str:
        """Row number."""
        return f"row {i}"

    def read(self, i: int) -> list[Item]:
        """The picture of row ``i``."""
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        row = self._group(number).slice(i - int(self._starts[number]), 1)
        image = row.column(self.column)[0].as_py()
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            raise UnreadableImage(f"column {self.column!r} holds no bytes")
        record = {name: row.column(name)[0].as_py() for name in self.plain}
        for name, classes in self.classes.items():
            if isinstance(number := record.get(name), int):
                record[name] = classes[number] if 0 <= number < len(classes) else None
        return [Item(read_image(data), record | self.columns)]


class ParquetImages(_Tables):
    """Pictures in a column of parquet files; the other plain columns become the records.

    One row group is in memory at a time. A column ``id`` must not hold a value twice; numbers that
    Hugging Face has written as classes become the classes' names.

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

        self.files = [Path(file) for file in files]
        if not self.files:
            raise ValueError("no parquet files: give at least one")
        self.groups: list[tuple[int, int]] = []
        sizes, schema = [], None
        for number, file in enumerate(self.files):
            try:
                opened = pq.ParquetFile(file)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{file} is no whole parquet file: {one_line(error)}") from None
            schema = schema or opened.schema_arrow
            names = opened.schema_arrow.names
            if column not in names or not set(schema.names) <= set(names):
                lacks = next(n for n in [column, *schema.names] if n not in names)
                raise ValueError(f"{file} has no column {lacks!r}; columns: {', '.join(names)}")
            for group in range(opened.num_row_groups):
                self.groups.append((number, group))
                sizes.append(opened.metadata.row_group(group).num_rows)
        super().__init__(column, columns, sizes, schema, str(self.files[0]))
        self._marks = [file.stat().st_mtime_ns for file in self.files]

    def _group(self, number: int) -> Any:
        file, group = self.groups[number]
        return _row_group(self.files[file], self._marks[file], group)

    def ids(self) -> Iterable[Any] | None:
        """The column ``id``, if there is one."""
        return self._ids() if "id" in self.plain else None

    def _ids(self) -> Iterator[Any]:
        import pyarrow.parquet as pq

        for file in self.files:
            for batch in pq.ParquetFile(file).iter_batches(columns=["id"]):
                yield from batch.column(0).to_pylist()

    def describe(self) -> dict[str, Any]:
        """The files' names and the number of rows."""
        names = [file.name for file in self.files]
        return {
            "kind": "parquet",
            "files": names,
            "column": self.column,
            "count": len(self),
            "columns": self.columns,
        }


class SavedDataset(_Tables):
    """Pictures of a Hugging Face dataset that ``save_to_disk`` wrote; needs no ``datasets``.

    The files are memory-mapped. Columns are taken over as in `ParquetImages`.

    Args:
        folder: with ``state.json`` and the arrow files.
        column: of the pictures.
        columns: the same for every row.
    """

    def __init__(
        self,
        folder: str | Path,
        column: str = "image",
        columns: Mapping[str, Any] | None = None,
    ):
        self.folder = Path(folder)
        if (self.folder / "dataset_dict.json").is_file():
            splits = json.loads((self.folder / "dataset_dict.json").read_text("utf-8"))["splits"]
            paths = ", ".join(str(self.folder / split) for split in splits)
            raise ValueError(f"{folder} holds several datasets, give one of them: {paths}")
        try:
            state = json.loads((self.folder / "state.json").read_text("utf-8"))
            self.files = [self.folder / Path(f["filename"]).name for f in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{folder} is no dataset of save_to_disk: no state.json") from None
        self.mark = str(state.get("_fingerprint", ""))
        self._marks = [file.stat().st_mtime_ns for file in self.files]
        self.groups: list[tuple[int, int]] = []
        sizes, schema = [], None
        for number, (file, mark) in enumerate(zip(self.files, self._marks, strict=True)):
            schema, batches = _arrow_batches(file, mark)
            self.groups += [(number, batch) for batch in range(len(batches))]
            sizes += [len(batch) for batch in batches]
        if schema is None:
            raise ValueError(f"{folder} names no files: the dataset is empty")
        super().__init__(column, columns, sizes, schema, str(folder))

    def _group(self, number: int) -> Any:
        file, batch = self.groups[number]
        return _arrow_batches(self.files[file], self._marks[file])[1][batch]

    def ids(self) -> Iterable[Any] | None:
        """The column ``id``, if there is one."""
        if "id" not in self.plain:
            return None
        groups = range(len(self.groups))
        return (value for n in groups for value in self._group(n).column("id").to_pylist())

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

    def ids(self) -> Iterable[Any] | None:
        """The column ``id``, if there is one and it is kept."""
        kept = self.keep is None or "id" in self.keep
        if not len(self.dataset) or "id" not in self.dataset[0] or not kept:
            return None
        if hasattr(self.dataset, "column_names"):  # of ``datasets``: decodes no picture
            return self.dataset["id"]
        return (row["id"] for row in self.dataset)

    def describe(self) -> dict[str, Any]:
        """The dataset's own fingerprint, if it has one, and the number of rows."""
        mark = getattr(self.dataset, "_fingerprint", "")
        return {"kind": "dataset", "mark": mark, "column": self.column, "count": len(self)}


@lru_cache(2)
def _row_group(file: Path, mark: int, group: int) -> Any:
    import pyarrow.parquet as pq

    del mark  # tells apart what had one name at different times
    return pq.ParquetFile(file).read_row_group(group)


@lru_cache(64)
def _arrow_batches(file: Path, mark: int) -> tuple[Any, list[Any]]:
    """Schema and record batches of an arrow stream, memory-mapped."""
    import pyarrow as pa

    del mark
    try:
        with pa.ipc.open_stream(pa.memory_map(str(file))) as stream:
            return stream.schema, list(stream)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is no whole arrow stream: {one_line(error)}") from None


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Columns of class numbers, and the classes' names, as Hugging Face notes them."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        features = about["info"]["features"].items()
        return {name: f["names"] for name, f in features if f.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
