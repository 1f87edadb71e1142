"""Describes where a saved model's database is, and reopens it only where that is safe.

A model's folder keeps the place of its database, not the database. A stranger's folder could name
any place, so a place is opened without asking only if it lies inside the model's own folder, or if
it bears the seal of this user (`retrodiff.disk.seal`): then this user's own `Model.save` wrote it.
Anything else is opened when the caller says so, ``trust_database=True``.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

from retrodiff.checkpoints.descriptions import EDITED
from retrodiff.disk.seal import is_sealed, seal
from retrodiff.disk.untrusted import inside
from retrodiff.interfaces import Database, Fingerprint
from retrodiff.text import escaped, printable

DATABASE = "database"
"""Folder of a database inside of its model's."""


def shared_address(database: Any) -> str | None:
    """Address of a database on the Hub, with its commit; None if it is not there."""
    address = getattr(database, "address", None)
    return address if isinstance(address, str) and address.startswith("hf:") else None


def described(database: Any, folder: Path) -> Any:
    """The place of a database and its fingerprint, as JSON.

    Args:
        database: of a model.
        folder: where the model is saved.
    """
    from retrodiff.databases import ArrayDatabase

    path = getattr(database, "path", None)
    if path is None:
        kind = type(database)
        if not isinstance(database, ArrayDatabase):  # that one cannot be expected to be anywhere
            warnings.warn(
                f"the model is saved without its database: a {kind.__name__} has no folder to be "
                "opened again from, so hand it in when you load the model, load(..., database=...)",
                stacklevel=4,
            )
        return {"custom": f"{kind.__module__}.{kind.__qualname__}"}
    value: dict[str, Any] = {"fingerprint": dict(vars(database.fingerprint))}
    if (address := shared_address(database)) is not None:
        value["address"] = address
    else:
        found, here = Path(path).expanduser().resolve(), folder.resolve()
        relative = escaped(Path(_relative(found, here)).as_posix())
        value["path"] = relative if found.is_relative_to(here) else escaped(str(found))
        value["relative"] = relative
    return {**value, "seal": seal(value)}


def described_copy(database: Any) -> Any:
    """A database that is copied into the model's folder, as JSON.

    Raises:
        ValueError: there is no folder that could be copied.
    """
    if getattr(database, "path", None) is None or shared_address(database) is not None:
        kind = "no database" if database is None else f"a {type(database).__name__}"
        raise ValueError(
            f"include_database=True, but the model has {kind}, which lies in no folder: build one "
            "with build_database, or leave include_database out"
        )
    fingerprint = dict(vars(database.fingerprint))
    return {"fingerprint": fingerprint, "path": DATABASE, "relative": DATABASE}


def copy_database(database: Any, folder: Path) -> None:
    """Copies the files of a database below a model's folder; its indexes are left out."""
    from retrodiff.databases.build.work import own_files

    source, target = Path(database.path), folder / DATABASE
    for name in sorted(own_files(source)):
        if (source / name).is_file() and not name.startswith(("append.partial", "indexes")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def copied_files(folder: Path) -> set[str]:
    """The files of the database in a model's folder."""
    from retrodiff.databases.build.work import own_files

    place = folder / DATABASE
    return {f"{DATABASE}/{name}" for name in own_files(place)} if place.is_dir() else set()


def reopened(description: Any, folder: Path, *, token: str | None, trust: bool) -> Database | None:
    """The database where it was, or at the same place relative to the model.

    Args:
        description: what `described` returned.
        folder: of the model.
        token: for a database on the Hub.
        trust: open it wherever the file says that it is.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is another one.
        PermissionError: the place is neither inside the folder nor one that this user wrote.
    """
    if description is None or (isinstance(description, dict) and set(description) == {"custom"}):
        return None
    from retrodiff.databases import open_database

    value = _checked(description)
    saved = Fingerprint.from_json(value["fingerprint"], "the database's fingerprint")
    trust = trust or is_sealed({k: v for k, v in value.items() if k != "seal"}, value.get("seal"))
    place = value.get("address") if "address" in value else _place(value, folder, trust)
    shown = printable(str(place)[:300])
    if "address" in value and not trust:
        raise PermissionError(
            f"the model names a database at {shown}, which is not fetched unasked: say "
            "trust_database=True, or database=... to use another, or database=None"
        )
    database = open_database(cast("str", place), token=token)
    if database.fingerprint != saved:
        raise ValueError(
            f"the database at {shown} is not the one the model was saved with "
            f"(rows={database.fingerprint.rows!r} against rows={printable(repr(saved.rows))}): "
            "pass the right one as load(..., database=...)"
        )
    return database


def _place(value: dict[str, Any], folder: Path, trust: bool) -> Path:
    """The folder of a database; nothing outside of the model's folder is touched untrusted."""
    path, relative = value["path"], value["relative"]
    within = ".." not in Path(relative).parts and not Path(relative).is_absolute()
    if within:
        try:
            within = (inside(folder, relative)).is_dir()
        except ValueError:
            within = False
    if within:
        return folder / relative
    if not trust:
        raise PermissionError(
            f"the model names a database at {printable(path[:300])}, outside of its folder, and "
            "you did not save it on this machine, so that is not opened unasked: say "
            "trust_database=True, or database=... to use another, or database=None"
        )
    places = (folder / relative, Path(path))
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"the model's database is neither at {printable(path[:300])} nor at "
            f"{printable(relative[:300])} beside the model: pass it as load(..., database=...)"
        )
    return found


def _checked(description: Any) -> dict[str, Any]:
    kinds: tuple[set[str], ...] = ({"address"}, {"path", "relative"})
    if isinstance(description, dict):
        value = cast("dict[str, Any]", description)
        names = set(value) - {"fingerprint", "seal"}
        if "fingerprint" in value and any(
            names == kind and all(isinstance(value[n], str) for n in kind) for kind in kinds
        ):
            return value
    raise ValueError(
        f"the description of the database says neither where it is nor which: {EDITED}"
    )


def _relative(path: Path, folder: Path) -> str:
    try:
        return os.path.relpath(path, folder)
    except ValueError:  # another drive
        return str(path)
