"""Files appear whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, sorted by nothing but the order given."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Tensors and a header of strings."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, header)


def check_free(path: Path, marker: str, overwrite: bool) -> None:
    """Refuse to write where something is, unless it is a folder of the same kind to overwrite.

    Args:
        path: the folder to be written.
        marker: a file that only folders of this kind have, so that no other is ever deleted.
        overwrite: whether replacing such a folder was asked for.
    """
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} exists: choose another path, or overwrite it (overwrite=True, --overwrite)"
        )
    if not path.is_dir() or (any(path.iterdir()) and not (path / marker).exists()):
        raise FileExistsError(
            f"{path} has no {marker}, so it is not ours to overwrite: choose another path"
        )


def write_folder(
    path: Path, write: Callable[[Path], None], *, marker: str, overwrite: bool = False
) -> None:
    """A folder that ``write`` fills and that appears whole; see `check_free` for ``marker``."""
    check_free(path, marker, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
