"""The databases that a page has open, by name, and those of them that are chosen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

from retrodiff.databases import Searchable, Union
from retrodiff.interfaces import Fingerprint
from retrodiff.text import printable

REMEMBERED = 16
"""Choices whose database is kept, with the rows that its filter has found."""


@dataclass(frozen=True, eq=False)
class Shelf:
    """A database with the name that the page shows.

    Args:
        name: unlike all others.
        database: its rows.
        chosen: whether it is among those that are asked at first.

    Examples:
        >>> from retrodiff.testing import small_database
        >>> from retrodiff.ui import Shelf
        >>> database = small_database()
        >>> Shelf("art", database).label == f"art ({len(database)})"
        True
    """

    name: str
    database: Searchable
    chosen: bool = True

    @property
    def label(self) -> str:
        """Name and size."""
        return f"{self.name} ({len(self.database):,})"


class Shelves:
    """Named databases of one encoder, any of which are searched as one.

    Args:
        shelves: at least one.
        whole: a database that those chosen at first are the parts of, in place of their union.

    Raises:
        ValueError: there is none, two have one name, or their encoders differ.

    Examples:
        >>> from retrodiff.testing import small_database
        >>> from retrodiff.ui import Shelf, Shelves
        >>> art, photos = Shelf("art", small_database()), Shelf("photos", small_database(), False)
        >>> Shelves([art, photos]).first
        ('art',)
    """

    def __init__(self, shelves: Sequence[Shelf], whole: Searchable | None = None):
        if not shelves:
            raise ValueError("no database is open: give at least one")
        names = [shelf.name for shelf in shelves]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two databases are called {printable(twice[0])}: rename one folder")
        mark = shelves[0].database.fingerprint
        for shelf in shelves[1:]:
            if (what := mark.disagreement(shelf.database.fingerprint)) is not None:
                raise ValueError(
                    f"the databases {printable(names[0])} and {printable(shelf.name)} disagree: "
                    f"{what}: build both with the same encoder"
                )
        self.shelves = {shelf.name: shelf for shelf in shelves}
        self.whole = whole
        self._kept: OrderedDict[tuple[object, ...], Searchable] = OrderedDict()
        self._turn = Lock()

    @property
    def first(self) -> tuple[str, ...]:
        """Names of those that are chosen at first."""
        return tuple(name for name, shelf in self.shelves.items() if shelf.chosen)

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the first; all are of its encoder."""
        return next(iter(self.shelves.values())).database.fingerprint

    def open(
        self, names: Sequence[str], shares: Sequence[float] | None = None, where: str = ""
    ) -> Searchable:
        """The chosen databases as one, or those of their rows that meet a condition.

        Args:
            names: in any order.
            shares: one number per name, in the order in which the page lists them; see `Union`.
            where: condition on the columns; empty: none.

        Raises:
            ValueError: none is chosen, one is unknown, shares do not fit, or the condition cannot
                be read or leaves no row.
        """
        unknown = [name for name in names if name not in self.shelves]
        if unknown:
            known = ", ".join(self.shelves)
            raise ValueError(f"there is no database {printable(unknown[0])!r:.60}, only {known}")
        chosen = tuple(name for name in self.shelves if name in names)
        if not chosen:
            raise ValueError("no database is chosen: choose at least one")
        where = where.strip()
        key = (chosen, None if shares is None else tuple(shares), where)
        with self._turn:
            if key not in self._kept:
                self._kept[key] = self._opened(chosen, shares, where)
                while len(self._kept) > REMEMBERED:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]

    def _opened(
        self, chosen: tuple[str, ...], shares: Sequence[float] | None, where: str
    ) -> Searchable:
        databases = [self.shelves[name].database for name in chosen]
        if shares is not None and len(shares) != len(chosen):
            raise ValueError(
                f"{len(chosen)} databases are chosen ({', '.join(chosen)}), but {len(shares)} "
                "shares are given: give one for each, or none"
            )
        if where:
            rows = Union(*databases).where(where).rows  # a column may be known to some of them only
            parts = list[Searchable]()
            weights = list[float]()
            start = 0
            for i, database in enumerate(databases):
                own = rows[(rows >= start) & (rows < start + len(database))] - start
                start += len(database)
                if len(own):
                    parts.append(database.subset(own))
                    weights += [] if shares is None else [shares[i]]
            if not parts:
                raise ValueError(f"no row of {', '.join(chosen)} meets {printable(where)}")
            databases, shares = parts, weights or None
        elif shares is None and self.whole is not None and chosen == self.first:
            return self.whole
        if len(databases) == 1:
            return databases[0]
        return Union(*databases, weights=shares)
