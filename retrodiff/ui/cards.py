"""Neighbors and samples as HTML; everything that comes from records or visitors is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from torch import Tensor

from retrodiff.databases import Searchable
from retrodiff.evaluation.sets import license_of
from retrodiff.interfaces import Neighbors, Record
from retrodiff.model.attribution import Attribution
from retrodiff.model.attribution_sheet import SHARPNESS
from retrodiff.model.generated import Generation, to_picture
from retrodiff.pictures.thumbnails import thumbnail
from retrodiff.text import printable
from retrodiff.ui.provenance import CreditedFile, archive
from retrodiff.ui.studio import Forming, Neighborhood

SIDE = 128
"""Longest side of a neighbor's small copy, in pixels."""

KEPT = 1024
"""Small copies that are remembered."""

HEAT = (255, 140, 0)
"""Color of what a neighbor painted."""

TITLES = ("title", "label", "caption")
FILES = ("file", "id", "key", "url")


class Thumbnails:
    """Small copies of rows as data URIs, the last ones remembered."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._turn = Lock()

    def of(self, database: Searchable, row: int) -> str:
        """A data URI; empty where the picture is not at hand."""
        key = (database.fingerprint.rows, row)
        with self._turn:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            try:
                found = data_uri(thumbnail(database.image(row), SIDE))
            except (OSError, ValueError):
                found = ""
            self._kept[key] = found
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return found


# --- neighbors -----------------------------------------------------------------------------------


def neighbors_html(
    found: Neighborhood,
    thumbnails: Thumbnails,
    *,
    pinned: Sequence[int] = (),
    dropped: Sequence[int] = (),
    title: str = "Neighbors",
    marks: bool = True,
) -> str:
    """A strip of cards: those that condition a sample first, then further ones.

    Args:
        found: what the databases have.
        thumbnails: makes small copies.
        pinned: rows that are marked as pinned.
        dropped: rows that were left out; they can be taken back.
        title: of the strip.
        marks: whether rows can be pinned and left out.
    """
    parts: list[str] = []
    for near, used in ((found.used, True), (found.further, False)):
        if near is None:
            continue
        for row, similarity, record in _each(near):
            uri = thumbnails.of(found.database, row)
            mark = "pinned" if row in pinned else "used" if used else "further"
            parts.append(_card(row, similarity, record, uri, mark, marks))
    used = 0 if found.used is None else found.used.k
    said = found.note or (f"The first {used} are used for every picture." if used > 1 else "")
    if used == 1:
        said = found.note or "The first one is used for every picture."
    if found.used is not None and not used:
        said = said or "Only the prompt is used in this mode; these are near to it."
    if not parts and not said:
        said = "Type a prompt, or give a picture: its neighbors appear here."
    back = ""
    if dropped and marks:
        count = f"{len(dropped)} left out"
        back = f'<button type="button" data-act="back">{count}: take back</button>'
    cards = f'<ul class="rd-cards">{"".join(parts)}</ul>' if parts else ""
    return (
        f'<section class="rd-neighbors"><div class="rd-head"><h2>{_text(title)}</h2>'
        f"<p>{_text(said)}</p>{back}</div>{cards}</section>"
    )


def _card(row: int, similarity: float, record: Record, uri: str, mark: str, marks: bool) -> str:
    name, file = named(record, row)
    license = license_of(record) or "no license given"
    credit = record.get("credit")
    about = file + (f", {credit}" if credit else "")
    pinned = mark == "pinned"
    said = {"pinned": "pinned", "used": "used", "further": ""}[mark]
    badge = f'<span class="rd-badge">{said}</span>' if said else ""
    buttons = ""
    if marks:
        buttons = (
            f'<div class="rd-acts"><button type="button" data-act="pin" data-row="{row}" '
            f'aria-pressed="{str(pinned).lower()}" aria-label="Pin {_text(name)}" '
            f'title="Always use it">{"Pinned" if pinned else "Pin"}</button>'
            f'<button type="button" data-act="drop" data-row="{row}" '
            f'aria-label="Leave out {_text(name)}" title="Never use it">Drop</button></div>'
        )
    width = max(0, min(100, round(100 * similarity)))
    return (
        f'<li class="rd-card {mark}" data-lit="{row}">{_img(uri, name)}{badge}'
        f'<span class="rd-name" title="{_text(name)}">{_text(name)}</span>'
        f'<span class="rd-file" title="{_text(about)}">{_text(file if file != name else "")}</span>'
        f'<span class="rd-similar" title="similarity (cosine)"><i style="width:{width}%"></i>'
        f"<b>similarity {similarity:.2f}</b></span>"
        f'<span class="rd-license" title="{_text(credit or license)}">{_text(license)}</span>'
        f"{buttons}</li>"
    )


# --- samples -------------------------------------------------------------------------------------


def samples_html(
    forming: Forming,
    title: str,
    thumbnails: Thumbnails,
    files: Sequence[CreditedFile] = (),
    database: Searchable | None = None,
) -> str:
    """A grid of samples; finished ones with what painted them, and their files.

    Args:
        forming: the images.
        title: of the grid.
        thumbnails: makes small copies.
        files: of finished samples.
        database: the rows that finished samples were made from.
    """
    count = len(forming.images)
    items: list[str] = []
    for i, image in enumerate(forming.images):
        shown = data_uri(files[i].png) if files else data_uri(_png(image))
        painters = links = ""
        if forming.done is not None and database is not None:
            painters = _painters(forming.done, i, database, thumbnails)
        if files:
            links = _links(files[i], i)
        items.append(
            f'<li class="rd-sample"><div class="rd-frame"><img class="rd-pixel" src="{shown}" '
            f'alt="Sample {i + 1} of {count}"><img class="rd-heat" src="{BLANK}" alt=""></div>'
            f"{painters}{links}</li>"
        )
    state, every = "", ""
    if forming.done is None:
        state = (
            f'<progress value="{forming.step}" max="{forming.steps}" '
            f'aria-label="Steps made"></progress>'
        )
    elif files:
        packed = data_uri(archive(files), "application/zip")
        every = (
            f'<a class="rd-all" download="{_text(files[0].name[:-6])}.zip" href="{packed}">'
            "Download all with their origin (zip)</a>"
        )
    hint = ""
    if forming.done is not None and forming.done.attribution is not None:
        hint = "<p>Point at or tap a neighbor below a sample to see what it painted.</p>"
    return (
        f'<section class="rd-samples"><div class="rd-head"><h2>{_text(title)}</h2>{hint}{state}'
        f'{every}</div><ul class="rd-grid">{"".join(items)}</ul></section>'
    )


def _painters(out: Generation, i: int, database: Searchable, thumbnails: Thumbnails) -> str:
    """The neighbors of a sample as buttons that show what each painted."""
    near = out.neighbors.rows([i])
    if near.indices.ndim != 2:
        return ""
    heats = {} if out.attribution is None else heat_maps(out.attribution, i)
    buttons: list[str] = []
    for j, (row, _, record) in enumerate(_each(near)):
        if row < 0:
            continue
        name, _ = named(record, row)
        uri = thumbnails.of(database, row)
        if j not in heats:
            buttons.append(f'<span class="rd-by">{_img(uri, name)}</span>')
            continue
        heat, share = heats[j]
        buttons.append(
            f'<button type="button" class="rd-by" data-lit="{row}" data-heat="{heat}" '
            f'aria-label="Show what {_text(name)} painted, {share:.0%}" '
            f'title="{_text(name)}: {share:.0%}">{_img(uri, "")}<b>{share:.0%}</b></button>'
        )
    return f'<div class="rd-painters">{"".join(buttons)}</div>' if buttons else ""


def heat_maps(attribution: Attribution, i: int) -> dict[int, tuple[str, float]]:
    """For each neighbor of an image with a part in it: a small transparent PNG, and its share.

    The higher the share, the less transparent; all neighbors of the image have one scale.
    """
    from PIL import Image

    grid = attribution.grid[i]
    top = float(grid.max())
    found: dict[int, tuple[str, float]] = {}
    for j, share in enumerate(grid):
        mean = float(share.mean())
        if mean <= 0 or top <= 0:
            continue
        alpha = (230 * (share / top) ** SHARPNESS).round().byte().numpy()
        picture = Image.new("RGB", alpha.shape[::-1], HEAT)
        picture.putalpha(Image.fromarray(alpha))
        found[j] = data_uri(_saved(picture)), mean
    return found


def _links(file: CreditedFile, i: int) -> str:
    name, about = file.sidecar
    return (
        f'<div class="rd-links"><a download="{_text(file.name)}" href="{data_uri(file.png)}" '
        f'aria-label="Download sample {i + 1} as PNG">PNG</a>'
        f'<a download="{_text(name)}" href="{data_uri(about, "application/json")}" '
        f'aria-label="Download the origin of sample {i + 1} as JSON">Origin</a></div>'
    )


# --- lines ---------------------------------------------------------------------------------------


def message_html(text: str = "", *, error: bool = False, busy: bool = False) -> str:
    """One line for the visitor; empty: nothing. While busy, the page offers to stop."""
    if not text:
        return '<div class="rd-message" role="status"></div>'
    kind = 'rd-error" role="alert' if error else '" role="status'
    busily = " rd-busy" if busy else ""
    return f'<div class="rd-message{busily} {kind}">{_text(text)}</div>'


def named(record: Mapping[str, Any], row: int) -> tuple[str, str]:
    """What a row shows, and the file or number that it is."""
    file = next((str(record[n]) for n in FILES if record.get(n) is not None), f"row {row}")
    title = next((str(record[n]) for n in TITLES if record.get(n) is not None), file)
    return title, file


def data_uri(data: bytes, kind: str | None = None) -> str:
    """Bytes as an address that holds them."""
    if kind is None:
        kind = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _each(near: Neighbors) -> list[tuple[int, float, Record]]:
    """Row, similarity and record of each neighbor of the first query."""
    rows = near.indices[0].flatten().tolist()
    records = near.records[0] if near.records else ({},) * len(rows)
    return list(zip(rows, near.similarity[0].flatten().tolist(), records, strict=True))


def _img(uri: str, name: str) -> str:
    if not uri:
        return '<span class="rd-none" aria-hidden="true">no picture</span>'
    return f'<img src="{uri}" alt="{_text(name)}">'


def _png(image: Tensor) -> bytes:
    return _saved(to_picture(image))


def _saved(picture: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def _text(text: object) -> str:
    return html.escape(printable(text))


BLANK = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
"""A transparent point."""
