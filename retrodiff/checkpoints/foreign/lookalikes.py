"""What is found in place of weights: a web page, a pointer, an archive around the file."""

from __future__ import annotations

import zipfile
from pathlib import Path

BEGINNINGS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the weights: run git lfs pull"),
    (b"<!doctype", "a web page: the download was answered with an error, fetch the file again"),
    (b"<html", "a web page: the download was answered with an error, fetch the file again"),
    (b"<?xml", "an answer in xml, usually of a refused download: fetch the file again"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"Rar!", "a rar archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
)
"""First bytes of a file, in lower case where they are text, and what it is."""


def check_weights_file(path: Path) -> None:
    """Says what a file is that cannot be weights; says nothing about what may be.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else.
    """
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder: hand in the file of the weights inside it")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: check the path of the checkpoint")
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    for beginning, what in BEGINNINGS:
        if start.startswith(beginning) or start.lower().startswith(beginning):
            raise ValueError(f"{path} is {what}")
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            inside = ", ".join(repr(name)[:60] for name in names[:3])
            raise ValueError(
                f"{path} is a zip archive with {inside or 'nothing'} in it, not one that PyTorch "
                "wrote: unpack it first"
            )
