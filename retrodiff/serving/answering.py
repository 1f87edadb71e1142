"""What a search server answers, without the web: searches, rows, small copies, samples.

Numbers of rows are always those of the served database, also under a filter. Work on encoder and
database is done one request at a time, since neither promises more; sampling has a turn of its own,
so that searches do not wait for it.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrodiff.databases.searchable import Searchable, Subset
from retrodiff.evaluation.sets import license_of
from retrodiff.interfaces import Encoder, Query, Record
from retrodiff.pictures import to_float
from retrodiff.pictures.decoding import UnreadableImage, read_image
from retrodiff.pictures.thumbnails import thumbnail
from retrodiff.serving.server_limits import ServerLimits
from retrodiff.text import escaped, printable

if TYPE_CHECKING:
    from retrodiff.model import Model

FILTERS = 8
"""Filters whose rows are remembered; the one asked longest ago is forgotten."""


class Refused(ValueError):
    """A request that cannot be answered as it stands; the message is for the client.

    Examples:
        >>> from retrodiff.serving import Refused
        >>> issubclass(Refused, ValueError)
        True
    """


class NotFound(Refused):
    """A row, or the picture of one, that is not there.

    Examples:
        >>> from retrodiff.serving import NotFound, Refused
        >>> issubclass(NotFound, Refused)
        True
    """


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    Args:
        row: its number in the database.
        similarity: cosine with the query, in [-1, 1].
        license: what its record says; None: nothing.
        record: where it comes from, as JSON has it.
    """

    row: int
    similarity: float
    license: str | None
    record: dict[str, Any]


class SearchService:
    """Answers requests about one database; `running` and `serve` put it on the web.

    Args:
        database: what is searched, as `open_database` gives it.
        encoder: that the database was built with; None: only rows and embeddings can be asked with.
        model: for samples, with a database and an encoder of its own kind: it is sampled with the
            served database in place of its own. None: no samples.
        limits: of requests.

    Raises:
        ValueError: encoder or model do not fit the database.

    Examples:
        >>> from retrodiff.serving import SearchService
        >>> from retrodiff.testing import small_database
        >>> service = SearchService(small_database())
        >>> searched, hits = service.row(5, k=3)
        >>> searched, len(hits)
        (32, 3)
    """

    def __init__(
        self,
        database: Searchable,
        encoder: Encoder | None = None,
        *,
        model: Model | None = None,
        limits: ServerLimits | None = None,
    ):
        if encoder is None and model is not None:
            encoder = model.encoder
        if encoder is not None:
            what = encoder.fingerprint.disagreement(database.fingerprint)
            if what is not None:
                raise ValueError(f"encoder and database disagree: {what}")
        self.database, self.encoder = database, encoder
        self.limits = limits or ServerLimits()
        self.model = None if model is None else _swapped(model, database)
        self._search, self._sample = Lock(), Lock()
        self._filtered: OrderedDict[str, Subset] = OrderedDict()

    # --- searches: how many rows were searched, and the nearest of them --------------------------

    def text(self, text: str, k: int = 8, where: str | None = None) -> tuple[int, list[Hit]]:
        """The rows nearest to a text: how many were searched, and at most k hits, nearest first.

        Args:
            text: one prompt.
            k: neighbors, at most ``limits.k``; fewer are given where a filter leaves fewer.
            where: condition on the columns, as `Searchable.where` takes it.

        Raises:
            Refused: no encoder of texts is served, or the filter cannot be read.
        """
        encoder: Any = self.encoder
        if not hasattr(encoder, "encode_text"):
            raise Refused(
                "this server has no encoder of texts: search with a row or an embedding"
                + (", or with a picture" if encoder is not None else "")
            )
        with self._search:
            return self._found(encoder.encode_text([text]), k, where)

    def picture(self, data: bytes, k: int = 8, where: str | None = None) -> tuple[int, list[Hit]]:
        """The rows nearest to a picture file's bytes; see `text`.

        Raises:
            Refused: it is no picture, or has more pixels than `read_image` decodes.
        """
        if self.encoder is None:
            raise Refused("this server has no encoder: search with a row or an embedding")
        with self._search:  # one picture is unpacked at a time
            try:
                pixels = read_image(data)
            except UnreadableImage as error:
                raise Refused(f"the picture cannot be read: {error}") from None
            return self._found(self._embedded(pixels), k, where)

    def embedding(
        self, values: Sequence[float], k: int = 8, where: str | None = None
    ) -> tuple[int, list[Hit]]:
        """The rows nearest to an embedding that the client has made; see `text`.

        Raises:
            Refused: it has another width than the database, or no direction.
        """
        dim = self.database.fingerprint.dim
        if len(values) != dim:
            raise Refused(
                f"the embedding has {len(values)} numbers, the database's have {dim}: make it with "
                f"{printable(self.database.fingerprint.encoder)}"
            )
        vector = torch.tensor(values, dtype=torch.float32)
        norm = float(vector.norm())
        if not math.isfinite(norm) or not norm:
            raise Refused("the embedding has no direction: its norm is zero or beyond float32")
        with self._search:
            return self._found(vector[None], k, where)

    def row(self, row: int, k: int = 8, where: str | None = None) -> tuple[int, list[Hit]]:
        """The rows nearest to a row, without itself; see `text`.

        Raises:
            NotFound: there is no such row.
        """
        self._check(row)
        with self._search:
            return self._found(self.database.embeddings([row]), k, where, without=row)

    # --- rows ------------------------------------------------------------------------------------

    def record(self, row: int) -> tuple[str | None, dict[str, Any]]:
        """License and record of a row.

        Raises:
            NotFound: there is no such row.
        """
        self._check(row)
        with self._search:
            record = self.database.records(torch.tensor([row]))[0]
        return license_of(record) or None, plain(record)

    def image(self, row: int, side: int = 256) -> bytes:
        """A small copy of a row's picture, PNG or JPEG, with no side above ``side`` pixels.

        Raises:
            NotFound: there is no such row, or its picture is not at hand.
        """
        self._check(row)
        with self._search:
            try:
                return thumbnail(self.database.image(row), side)
            except (OSError, ValueError) as error:
                raise NotFound(f"the picture of row {row} is not at hand") from error

    def about(self) -> dict[str, Any]:
        """What is served: rows, encoder, columns, and what can be asked."""
        mark = self.database.fingerprint
        can = {
            "text": hasattr(self.encoder, "encode_text"),
            "image": self.encoder is not None,
            "row": True,
            "embedding": True,
            "sample": self.model is not None,
        }
        return {
            "rows": len(self.database),
            "encoder": printable(mark.encoder),
            "preprocessing": printable(mark.preprocessing),
            "dim": mark.dim,
            "rows_hash": mark.rows,
            "columns": [printable(name) for name in self.database.columns],
            "queries": [name for name, possible in can.items() if possible],
            "limits": dict(vars(self.limits)),
        }

    # --- samples ---------------------------------------------------------------------------------

    def sample(
        self,
        prompt: str | None = None,
        *,
        n: int = 1,
        k: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
    ) -> list[tuple[bytes, list[Hit]]]:
        """Generated images as PNG bytes, each with the rows that conditioned it.

        Args:
            prompt: a text; None: the model draws rows as queries (unconditional).
            n: images.
            k: tokens that condition each; None: the model's.
            steps: of the sampler; None: the model's.
            guidance: classifier-free scale; None: the model's.
            seed: of everything random.

        Raises:
            Refused: no model is served, or it cannot be asked this.
        """
        if self.model is None:
            raise Refused("this server has no model: it searches only")
        asked: dict[str, Any] = {"n": n} if prompt is None else {"prompts": [prompt] * n}
        with self._sample:
            try:
                out = self.model.sample(**asked, k=k, steps=steps, guidance=guidance, seed=seed)
            except (ValueError, FloatingPointError) as error:
                raise Refused(printable(str(error))) from None
        made: list[tuple[bytes, list[Hit]]] = []
        for i, picture in enumerate(out.pil()):
            file = io.BytesIO()
            picture.save(file, "PNG")
            rows = out.neighbors.indices[i].flatten().tolist()
            similarity = out.neighbors.similarity[i].flatten().tolist()
            records = out.neighbors.records[i] if out.neighbors.records else [{}] * len(rows)
            made.append((file.getvalue(), _hits(rows, similarity, records)))
        return made

    # --- helpers ---------------------------------------------------------------------------------

    def warm(self) -> None:
        """Loads the encoder's weights and searches once, so that the first client need not wait."""
        encoder: Any = self.encoder
        if encoder is not None:
            self._embedded(torch.full((3, 64, 64), 127, dtype=torch.uint8))
            if hasattr(encoder, "encode_text"):
                encoder.encode_text(["a picture"])
        if len(self.database):
            self.row(0, 1)

    def _embedded(self, pixels: Tensor) -> Tensor:
        """A picture (3, h, w) of bytes -> its embedding (1, d), as builds of databases make it."""
        assert self.encoder is not None
        prepare = self.encoder.preparation
        if prepare is not None:
            return self.encoder.encode_prepared(prepare(pixels[None]))
        return self.encoder.encode_image(to_float(pixels)[None])

    def _found(
        self, embedding: Tensor, k: int, where: str | None, without: int | None = None
    ) -> tuple[int, list[Hit]]:
        if not 1 <= k <= self.limits.k:
            raise Refused(f"k={k}: ask for 1 to {self.limits.k} neighbors")
        database = self._rows_where(where)
        wanted = min(k + (without is not None), len(database))
        if not wanted:
            return len(database), []
        found = database.search(Query(embedding.cpu().float()), wanted)
        rows = found.indices[0].cpu()
        if isinstance(database, Subset) and database is not self.database:
            rows = database.rows[rows]
        kept = [i for i, row in enumerate(rows.tolist()) if row != without][:k]
        records = self.database.records(rows[kept])
        return len(database), _hits(
            rows[kept].tolist(), found.similarity[0, kept].tolist(), records
        )

    def _rows_where(self, condition: str | None) -> Searchable:
        """The database, or its rows that meet a condition; the last conditions are remembered."""
        if condition is None:
            return self.database
        if condition not in self._filtered:
            try:
                self._filtered[condition] = self.database.where(condition)
            except ValueError as error:
                raise Refused(printable(str(error))) from None
            while len(self._filtered) > FILTERS:
                self._filtered.popitem(last=False)
        self._filtered.move_to_end(condition)
        return self._filtered[condition]

    def _check(self, row: int) -> None:
        if not 0 <= row < len(self.database):
            raise NotFound(f"there is no row {row}: the database has {len(self.database)} rows")


def plain(value: Any) -> Any:
    """A value of a record as JSON has it: no NaN, no bytes, no text that UTF-8 cannot hold."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {escaped(str(name)): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        return plain(value.tolist())
    return escaped(str(value))


def _hits(rows: list[int], similarity: list[float], records: Sequence[Record]) -> list[Hit]:
    """Hits of rows; row -1, the prompt itself among a sample's tokens, is left out."""
    return [
        Hit(row, near, license_of(record) or None, plain(record))
        for row, near, record in zip(rows, similarity, records, strict=True)
        if row >= 0
    ]


def _swapped(model: Model, database: Searchable) -> Model:
    """The model on the served database."""
    from retrodiff.retrieval import Uniform

    if model.database is database:
        return model
    proposal = {} if model.proposal is None else {"proposal": Uniform()}
    return model.replace(database=database, **proposal)
