"""The state of a training as one safetensors file, with the hash of all that it holds.

Weights, optimizer, average and losses are tensors; what must be the same when the training is
continued is JSON in the header. The file is written under another name first, so that a kill or a
full disk leaves the last one as it was. Reading compares the hash of every tensor and of the header
before any of it is used: a changed byte is an error, never other weights. That takes about a second
for each gigabyte.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from retrodiff.disk.files import make_folder, plain_json
from retrodiff.disk.tensors import write_tensors
from retrodiff.encoders.fingerprint import weights_hash

FORMAT = 2
KIND = "retrodiff training"
ANEW = "or start anew (overwrite=True)"


@dataclass(frozen=True)
class State:
    """What a checkpoint holds.

    Args:
        done: steps that are done.
        run: what must be the same when the training goes on.
        tensors: by name.
    """

    done: int
    run: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below a name, without that name."""
        start = f"{prefix}."
        return {k.removeprefix(start): t for k, t in self.tensors.items() if k.startswith(start)}


class Checkpoint:
    """One training's file.

    Args:
        path: the file; ``~`` is the home folder.
        resume: continue the training in it, if there is one.
        overwrite: replace another training that is in it.

    Raises:
        FileExistsError: something else is there, or a training that nobody asked to continue.
        OSError: nothing can be written there.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = Path(path).expanduser()
        self.resume = resume
        self.done: int | None = None
        """Steps of the state that the file keeps; None: it keeps none of this training."""
        make_folder(self.path.parent)
        self._seen = self._now()
        if self._seen is None:
            return
        if not stat.S_ISREG(self.path.stat().st_mode):
            raise FileExistsError(
                f"{self.path} is no regular file: give the name of a file for the checkpoint"
            )
        if resume:
            return
        if not is_training(self.path):
            raise FileExistsError(
                f"{self.path} exists and is no training checkpoint: give the checkpoint another "
                "name, or move that file away"
            )
        if not overwrite:
            raise FileExistsError(
                f"{self.path} is an unfinished training: continue it (resume=True) {ANEW}"
            )

    def load(self) -> State | None:
        """The state to continue from; None: the training starts anew."""
        if not self.resume or self._seen is None:
            return None
        state = read_state(self.path)
        self.done = state.done
        return state

    def save(self, state: State) -> None:
        """Replaces the file by a newer state, or makes it again; on any error the last one stays.

        Raises:
            OSError: it cannot be written, or another training has written it meanwhile.
        """
        now = self._now()
        if now is not None and now != self._seen:  # one that was deleted is written anew
            raise FileExistsError(
                f"{self.path} was written by another training meanwhile: give each its own file"
            )
        make_folder(self.path.parent)
        write_state(self.path, state)
        self._seen, self.done = self._now(), state.done

    def _now(self) -> tuple[int, int, int] | None:
        """What tells this file from another one of its name."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def write_state(path: Path, state: State) -> None:
    """Writes a state; the file appears whole or not at all."""
    from safetensors import SafetensorError

    about = {
        "kind": KIND,
        "format": str(FORMAT),
        "done": str(state.done),
        "run": json.dumps(plain_json(state.run), sort_keys=True),
    }
    tensors = {name: tensor.detach() for name, tensor in state.tensors.items()}
    try:
        write_tensors(path, tensors, {**about, "sha256": _digest(about, tensors)})
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(f"{path} could not be written: {error}") from None


def read_state(path: Path) -> State:
    """The state in a file that `write_state` wrote, compared with its hash.

    Raises:
        ValueError: the file is damaged, or no training checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: give the checkpoint of a training")
    damaged = f"{path} is damaged"
    way_out = "take another copy of it, or delete it and start anew"
    try:
        with safe_open(str(path), framework="pt") as file:
            about = dict(file.metadata() or {})
            if not _of_training(about):
                raise ValueError(f"{path} is no training checkpoint, or damaged: {way_out}")
            if about.get("format") != str(FORMAT):
                raise ValueError(
                    f"{path} is a training checkpoint of format {about.get('format')!r:.20}, but "
                    f"this version reads format {FORMAT}: continue it with the version that wrote "
                    "it, or delete it and start anew"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except PermissionError:
        raise PermissionError(f"{path} cannot be read: permission denied") from None
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"{damaged} ({' '.join(str(error).split())[:200]}): {way_out}") from None
    written = about.pop("sha256", "")
    if _digest(about, tensors) != written:
        raise ValueError(f"{damaged} (its content does not match its hash): {way_out}")
    try:
        return State(int(about["done"]), json.loads(about["run"]), tensors)
    except (KeyError, ValueError, RecursionError):
        raise ValueError(f"{damaged} (its header says nothing): {way_out}") from None


def is_training(path: Path) -> bool:
    """Whether a file is a training checkpoint, of any format; only its header is read."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return False
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
    except (SafetensorError, OSError, RuntimeError):
        return False
    return _of_training(about)


def _of_training(about: Mapping[str, str]) -> bool:
    return about.get("kind") == KIND or {"format", "done", "steps", "seed"} <= set(about)


def disagreement(
    before: Mapping[str, Any], now: Mapping[str, Any], inside: tuple[str, ...] = ()
) -> str | None:
    """The first thing that two descriptions of a training do not share, in words; None: nothing."""
    for name in {**now, **before}:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        where = (*inside, name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            return disagreement(old, new, where)
        if where in _WORDS:
            return _WORDS[where]
        if not inside:
            return f"{name}={_shown(old)}, but this one has {name}={_shown(new)}"
        shown = ".".join(part for part in where if part not in ("model", "data", "config"))
        return f"{shown} {_shown(old)}, but this one has {_shown(new)}"
    return None


_WORDS = {
    ("images",): "other training images",
    ("data", "images"): "other training images",
    ("data", "embeddings"): "other embeddings of the training images",
    ("data", "table"): "other neighbors of the training images",
    ("data", "pairing"): "other pairs of images",
    ("data", "captions", "texts"): "other captions of the training images",
    ("data", "captions", "encoder", "weights"): "another encoder of captions (its weights differ)",
    ("data", "groups", "members"): "other groups of images or rows",
    ("data", "ids"): "other rows of the database as its images",
    ("data", "database", "rows"): "another database (its rows differ)",
    ("data", "encoder", "weights"): "another encoder (its weights differ)",
    ("model", "frozen"): "other frozen weights in the network",
    ("model", "first_stage"): "other weights in the first stage",
}


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _digest(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    text = json.dumps(dict(about), sort_keys=True) + weights_hash(tensors)
    return hashlib.sha256(text.encode()).hexdigest()
