"""Weights as safetensors files of limited size with an index: written whole, read memory-mapped.

The layout of the Hugging Face Hub: ``name.safetensors``, or ``name-00001-of-00003.safetensors`` and
so on with ``name.safetensors.index.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from retrodiff.disk.files import write_json
from retrodiff.disk.tensors import map_tensors, write_tensors
from retrodiff.disk.untrusted import inside, read_json
from retrodiff.text import printable

AGAIN = "copy or fetch it again"


def save_sharded(
    state: Mapping[str, Tensor],
    folder: str | Path,
    name: str = "model",
    *,
    max_bytes: int = 2 * 1024**3,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes tensors to ``folder``, copying one at a time.

    Each file appears whole or not at all, the index last.

    Args:
        state: tensors by name.
        folder: made where it is missing.
        name: of the files.
        max_bytes: of one file's tensors; a larger tensor gets a file of its own.
        metadata: strings for the header of every file.

    Returns:
        The files, the index (if there is one) last.
    """
    folder = Path(folder)
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in state.items():
        size += tensor.nbytes
        if groups[-1] and size > max_bytes:
            groups.append({})
            size = tensor.nbytes
        groups[-1][key] = tensor
    total = len(groups)
    endings = [f"-{i:05}-of-{total:05}" for i in range(1, total + 1)] if total > 1 else [""]
    files = [folder / f"{name}{ending}.safetensors" for ending in endings]
    for file, group in zip(files, groups, strict=True):
        write_tensors(file, group, metadata)
    index = folder / f"{name}.safetensors.index.json"
    if total == 1:
        index.unlink(missing_ok=True)
        return files
    places = {key: file.name for file, group in zip(files, groups, strict=True) for key in group}
    bytes_ = sum(tensor.nbytes for tensor in state.values())
    write_json(index, {"metadata": {"total_size": bytes_}, "weight_map": places})
    return [*files, index]


def load_shards(path: str | Path, name: str = "model") -> dict[str, Tensor]:
    """Tensors of a file, of an index, or of a folder that holds either; memory-mapped.

    Raises:
        FileNotFoundError: there is none, or a shard is missing.
        ValueError: a file is damaged, or lacks a tensor that the index promises.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        single, index = f"{name}.safetensors", f"{name}.safetensors.index.json"
        path = inside(path, index if (path / index).is_file() else single)
    if not path.is_file():
        raise FileNotFoundError(f"{printable(path)} is not a file: check the path of the weights")
    if path.suffix != ".json":
        return map_tensors(path, again=AGAIN, hashed=False)
    places = _places(path)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if not (path.parent / file).is_file():
            raise FileNotFoundError(
                f"{printable(path.parent / file)} is missing, {path.name} names it"
            )
        found = map_tensors(inside(path.parent, file), again=AGAIN, hashed=False)
        if twice := found.keys() & tensors.keys():
            raise ValueError(
                f"{printable(path.parent / file)} holds {printable(min(twice)[:200])} once more, "
                "which another shard holds already: fetch the files again"
            )
        tensors |= found
    absent = places.keys() - tensors.keys()
    if absent:
        raise ValueError(
            f"{printable(path)} promises {len(absent)} tensors that its files lack: "
            f"{printable(', '.join(sorted(absent)[:10])[:500])}"
        )
    return tensors


def _places(index: Path) -> dict[str, str]:
    """The shard of each tensor, all of them beside their index."""
    places: Any = read_json(index)
    places = places.get("weight_map") if isinstance(places, dict) else None
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise ValueError(
            f"{printable(index)} is no index of safetensors files: it has no weight_map of names"
        )
    for file in cast("set[str]", set(places.values())):
        if "/" in file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{printable(index)} names {printable(file[:200])!r}: shards are safetensors files "
                "beside their index"
            )
    return cast("dict[str, str]", places)
