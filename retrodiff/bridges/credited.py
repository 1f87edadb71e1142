"""Pictures that carry what they were made from: in the PNG file, and in a JSON file beside it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from retrodiff.bridges.chosen import Chosen
from retrodiff.disk.files import atomic_write, plain_json, write_folder, write_json
from retrodiff.disk.untrusted import parse_json, read_json
from retrodiff.text import printable

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
KEY = "retrodiff"
"""Keyword of the PNG text chunk."""

SIDECAR = ".json"
"""What the name of the file beside a picture ends with: ``00000.png.json``."""

MARKER = "pictures.json"
GENERATION = "generation.json"
"""What `Generation.save` writes beside its pictures."""

LONGEST = 2_000
"""Characters of a value in a record; longer ones are cut, since a text chunk must stay small."""

LARGEST = 1 << 20
"""Bytes of a text chunk or a sidecar that is read; Pillow refuses longer chunks."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of another library's pipeline, with the references of each.

    Args:
        images: made by the pipeline, PIL.
        chosen: the references of each image.
        made_by: name of the pipeline, and the settings it was called with.

    Examples:
        >>> import torch
        >>> from PIL import Image
        >>> from retrodiff.bridges import Chosen, Pictures, Reference
        >>> door = Reference(
        ...     row=3, similarity=0.31, record={"file": "door.png", "license": "CC0"}, rank=1
        ... )
        >>> image = Image.new("RGB", (64, 64))
        >>> chosen = Chosen("a red door", (door,), [image], torch.ones(1, 8), (9, 9, 5))
        >>> folder = Pictures([image], [chosen], {"pipeline": "mine"}).save("pictures")
        >>> sorted(file.suffix for file in folder.iterdir())
        ['.json', '.json', '.png']
    """

    images: list[Image] = field(repr=False)
    chosen: list[Chosen]
    made_by: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.images)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes PNG files that carry their references, each with a JSON file beside it.

        Args:
            folder: appears whole or not at all.
            overwrite: replace earlier pictures there.
        """
        names = [f"{i:05d}.png" for i in range(len(self))]

        def write(temporary: Path) -> None:
            for name, image, chosen in zip(names, self.images, self.chosen, strict=True):
                save_credited(image, temporary / name, chosen, self.made_by)
            write_json(temporary / MARKER, {"format": FORMAT, "images": names})

        return write_folder(folder, write, marker=MARKER, own=own_files, overwrite=overwrite)


def own_files(folder: Path) -> set[str]:
    """The files of a folder that `Pictures.save` wrote."""
    try:
        names = read_json(folder / MARKER)["images"]
        images = {name for name in names if isinstance(name, str) and name[:-4].isdecimal()}
    except (OSError, ValueError, KeyError, TypeError):
        images = set[str]()
    return {MARKER} | images | {name + SIDECAR for name in images}


def save_credited(
    image: Image, path: str | Path, chosen: Chosen, made_by: Mapping[str, Any] | None = None
) -> Path:
    """Saves a picture as PNG with its references in it, and in a JSON file beside it.

    Rows, similarities and records (file, license, credit, ...) are kept; no folder of this machine
    is, unless a record names one.

    Args:
        image: of any pipeline.
        path: ends with ``.png``; what is there is replaced.
        chosen: what it was made from.
        made_by: what made it: a name, settings.

    Returns:
        The path.

    Raises:
        ValueError: the path does not end with ``.png``.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: a picture that carries its references is a PNG file: name.png")
    data, credit = credited_png(image, chosen.prompt, chosen.credit(), made_by)
    with atomic_write(path) as partial:
        partial.write_bytes(data)
    write_json(path.with_name(path.name + SIDECAR), credit)
    return path


def credited_png(
    image: Image,
    prompt: str | None,
    references: Sequence[Mapping[str, Any]],
    made_by: Mapping[str, Any] | None = None,
) -> tuple[bytes, dict[str, Any]]:
    """A picture as the bytes of a PNG file that carries its references, and these as JSON.

    Args:
        image: of any pipeline.
        prompt: what was asked.
        references: ``row``, ``similarity`` and ``record`` of each.
        made_by: what made it: a name, settings.
    """
    from PIL.PngImagePlugin import PngInfo

    credit = {
        "format": FORMAT,
        "prompt": prompt,
        "made_by": made_by or {},
        "pixels": pixels_hash(image),
        "references": list(references),
    }
    credit = _short(plain_json(credit))
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(credit, ensure_ascii=False), zip=True)
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    return data.getvalue(), credit


def read_credit(path: str | Path) -> dict[str, Any]:
    """What a picture was made from, from its text chunk, else from the file beside it.

    Pictures of ``retrodiff sample`` are known from their folder's ``generation.json``.

    Args:
        path: the picture; any format, if a file lies beside it.

    Returns:
        ``prompt``, ``made_by``, ``references`` (``row``, ``similarity``, ``record``), ``source``:
        where that was read, and ``same_pixels``: whether it was saved of these very pixels (None:
        nothing tells).

    Raises:
        FileNotFoundError: there is no such picture.
        ValueError: it carries no references, or damaged ones.
    """
    from PIL import Image

    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{printable(path)} is not a file: give a picture")
    beside = path.with_name(path.name + SIDECAR)
    pixels = None
    try:
        with Image.open(path) as opened:
            chunk = getattr(opened, "text", {}).get(KEY)
            pixels = pixels_hash(opened)
    except Exception as error:  # whatever a damaged file makes the decoder raise
        raise ValueError(f"{printable(path)} is no picture ({error!r:.200})") from None
    if chunk is not None:
        found, source = parse_json(chunk, f"the text of {printable(path)}"), "the picture"
    elif beside.is_file():
        found, source = read_json(beside, largest=LARGEST), printable(beside.name)
    elif (found := _generated(path)) is not None:
        source = GENERATION
    else:
        raise ValueError(
            f"{printable(path)} carries no references, and neither {printable(beside.name)} nor "
            f"{GENERATION} beside it knows any: was it made by retrodiff, and saved by it?"
        )
    credit = _checked(found, f"{source} of {printable(path)}")
    saved = credit.pop("pixels", None)
    same = None if saved is None else saved == pixels
    return {**credit, "source": source, "same_pixels": same}


def pixels_hash(image: Image) -> str:
    """SHA-256 of size and RGB pixels, whatever the file format."""
    plain = image.convert("RGB")
    digest = hashlib.sha256(f"{plain.width} {plain.height}".encode())
    digest.update(plain.tobytes())
    return digest.hexdigest()


def _generated(path: Path) -> dict[str, Any] | None:
    """What `Generation.save` wrote about a picture of its folder, in the same form."""
    if not (path.parent / GENERATION).is_file():
        return None
    about = read_json(path.parent / GENERATION)
    rows = cast("Any", about).get("images", []) if isinstance(about, dict) else []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and row.get("file") == path.name:
            return {
                "prompt": row.get("source"),
                "made_by": {"name": "retrodiff", **about.get("settings", {})},
                "references": row.get("neighbors", []),
            }
    return None


def _checked(found: Any, what: str) -> dict[str, Any]:
    """The parts of a credit, each of its type; a stranger may have written it."""
    credit: dict[str, Any] = found if isinstance(found, dict) else {}
    references = credit.get("references")
    whole = isinstance(references, list) and all(
        isinstance(one, dict)
        and isinstance(one.get("row"), int)
        and isinstance(one.get("similarity"), int | float)
        and isinstance(one.get("record"), dict)
        for one in cast("Iterable[Any]", references)
    )
    if not whole:
        raise ValueError(f"{what} holds no list of references: it is damaged")
    if isinstance(number := credit.get("format", FORMAT), int) and number > FORMAT:
        raise ValueError(f"{what} has format {number}, newer than {FORMAT}: upgrade retrodiff")
    made_by = credit.get("made_by")
    pixels = credit.get("pixels")
    return {
        "prompt": credit.get("prompt"),
        "made_by": made_by if isinstance(made_by, dict) else {},
        "references": references,
        **({"pixels": pixels} if isinstance(pixels, str) else {}),
    }


def _short(value: Any) -> Any:
    """The same JSON with long texts cut."""
    if isinstance(value, str):
        return value if len(value) <= LONGEST else value[: LONGEST - 1] + "…"
    if isinstance(value, Mapping):
        return {key: _short(entry) for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [_short(entry) for entry in value]
    return value
