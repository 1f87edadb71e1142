"""Gets openclipart, public-domain drawings with titles and keywords, as a parquet file.

    python benchmarks/pictograms/clipart.py --out runs/pictograms

Many hands and styles and many more things than pictograms have: the encoder learns from them, D
does not hold them. Two Debian packages are fetched with ``apt-get download`` (156 MB) and unpacked
with ``dpkg-deb``. A drawing is left out if its title, keywords or file name hold the words of a
held-out concept. Flags, logos, maps and geometric shapes are left out, too.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from data import NAMES, SIDE, fetched, read_concepts, write

PACKAGES = ("openclipart-png", "openclipart-svg")
LEFT_OUT = ("shapes", "logos", "geography", "special", "signs_and_symbols/flags")
SMALL = {"a", "an", "the", "of", "with", "and", "in", "on", "for", "to", "no", "or", "by"}
# Without a plural's s, as `words` gives them.
TOO_COMMON = set(
    "clip art clipart media public domain externalsource svg png hash theme icon application"
    " appicon color image drawing unsorted".split()
)
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
DC = "{http://purl.org/dc/elements/1.1/}"


def main() -> None:
    """Fetches what is missing and writes ``clipart.parquet``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pictograms"))
    out = parser.parse_args().out
    raw = out / "packages"
    raw.mkdir(parents=True, exist_ok=True)
    png, svg = (unpacked(package, raw) for package in PACKAGES)
    held = held_out_words(read_concepts(fetched(NAMES, raw)))
    rows = list(read(png / "usr/share/openclipart/png", svg / "usr/share/openclipart/svg", held))
    write(out / "clipart.parquet", rows)
    print(f"{len(rows)} drawings, {sum(bool(row['title']) for row in rows)} with a title")


def unpacked(package: str, folder: Path) -> Path:
    """A Debian package's files, downloaded and unpacked where they are not there yet."""
    place = (folder / package).absolute()
    if not place.exists():
        found = list(folder.glob(f"{package}_*.deb"))
        if not found:
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
            found = list(folder.glob(f"{package}_*.deb"))
        partial = place.with_name(place.name + ".partial")
        subprocess.run(["dpkg-deb", "-x", str(found[0].absolute()), str(partial)], check=True)
        partial.rename(place)
    return place


def held_out_words(concepts: dict[str, dict[str, Any]]) -> list[set[str]]:
    """Sets of words; a text that holds all words of one of them may show a held-out concept.

    They are the titles, and those keywords that no other concept has.
    """
    seen: set[str] = set()
    held: list[str] = []
    for concept in concepts.values():
        names = [concept["title"], *concept["keywords"].split(", ")]
        if concept["split"] == "held-out":
            held += names
        else:
            seen.update(names)
    sets = {frozenset(words(name)) for name in held if name and name not in seen}
    return [set(one) for one in sets if one]


def words(text: str) -> set[str]:
    """The words of a text that mean something, in small letters, without a plural's s."""
    found = re.findall(r"[a-z]+", text.lower())
    return {word.rstrip("s") or word for word in found if word not in SMALL}


def read(png: Path, svg: Path, held: list[set[str]]) -> Iterator[dict[str, Any]]:
    """The rows, in the order of file names; links and what cannot be read are left out."""
    for file in sorted(png.rglob("*.png")):
        name = file.relative_to(png).with_suffix("").as_posix()
        if file.is_symlink() or name.startswith(LEFT_OUT):
            continue
        title, keywords, creator = described(svg / f"{name}.svg")
        text = words(" ".join([title, *keywords, name]))
        if any(one <= text for one in held) or not (title or keywords):
            continue
        picture = drawn(file)
        if picture is not None:
            yield {
                "id": f"openclipart/{name}",
                "image": picture,
                "concept": f"openclipart/{name}",
                "title": title,
                "keywords": ", ".join(keywords),
                "group": -1,
                "split": "train",
                "style": "clipart",
                "license": "public domain",
                "credit": f"openclipart, {creator}" if creator else "openclipart",
            }


def described(file: Path) -> tuple[str, list[str], str]:
    """Title, keywords and creator of a drawing, from its metadata; empty where of no use."""
    try:
        root = ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError):
        return "", [], ""
    title = next((t.text or "" for t in root.iter(f"{DC}title")), "")
    title = " ".join(title.lower().replace("_", " ").removesuffix(".svg").split())
    odd = re.search(r"\d|unknown| by |untitled", title)
    if odd or words(title) & TOO_COMMON or len(title) > 60:
        title = ""
    bags = (one.text or "" for bag in root.iter(f"{RDF}Bag") for one in bag.iter(f"{RDF}li"))
    plain = (" ".join(one.lower().replace("_", " ").split()) for one in bags)
    keywords = [one for one in plain if one.isascii() and one and not words(one) & TOO_COMMON]
    creator = ""
    for agent in root.iter(f"{DC}creator"):
        creator = next((t.text or "" for t in agent.iter(f"{DC}title")), "")
    return title, list(dict.fromkeys(keywords))[:8], creator.strip()


def drawn(file: Path) -> bytes | None:
    """A PNG of 64x64 on white; None: the picture cannot be read, or is all of one color."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                picture = opened.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombWarning, Image.DecompressionBombError):
        return None
    if (box := picture.getchannel("A").getbbox()) is None:
        return None
    picture = picture.crop(box)
    picture.thumbnail((SIDE - 4, SIDE - 4), Image.Resampling.LANCZOS, reducing_gap=None)
    page = Image.new("RGBA", (SIDE, SIDE), "white")
    page.alpha_composite(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    plain = page.convert("RGB")
    if all(low == high for low, high in plain.getextrema()):
        return None
    out = io.BytesIO()
    plain.save(out, "PNG")
    return out.getvalue()


if __name__ == "__main__":
    main()
