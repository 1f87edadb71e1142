"""Kills builds and imports at random moments, resumes them, and compares every byte.

Each work is done once without a disturbance. Then a child process does it again, gets SIGKILL at a
random moment of that time, and another one resumes it.

    python benchmarks/database_kill.py --kills 20
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from retrodiff.databases import ImageFolder, Patchify, build_database, import_embeddings, npy_parts
from retrodiff.encoders import encoder_from_string
from retrodiff.interfaces import Encoder, Fingerprint

OPTIONS = {"resume": True, "progress": False}


def make_sources(folder: Path) -> None:
    """Photographs, and embeddings in three files."""
    from skimage import data

    (folder / "photos").mkdir()
    for photo in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(data, photo)()).save(folder / "photos" / f"{photo}.png")
    draw = np.random.default_rng(0)
    for i in range(3):
        np.save(folder / f"{i}.npy", draw.normal(size=(70_000, 128)).astype(np.float32))


def build(sources: Path, out: Path, encoder: Encoder) -> None:
    """Encodes patches of the photographs."""
    photos = Patchify(size=48, stride=16).over(ImageFolder(sources / "photos"))
    build_database(out, photos, encoder, shard_rows=256, batch_size=32, thumbnails=32, **OPTIONS)


def take(sources: Path, out: Path, encoder: Encoder) -> None:
    """Imports the embeddings."""
    del encoder
    mark = Fingerprint(encoder="e", weights="w", preprocessing="p", dim=128)
    parts = npy_parts([sources / f"{i}.npy" for i in range(3)])
    import_embeddings(out, parts, mark, shard_rows=8_192, **OPTIONS)


def in_child(work: Callable[[], None], seconds: float | None = None) -> bool:
    """Does the work in a child process; whether that was killed after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    began, status = time.perf_counter(), 0
    while seconds is not None and time.perf_counter() - began < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.002)
    else:
        if seconds is not None:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if status:
        sys.exit("a build failed")
    return False


def digest(folder: Path) -> dict[str, str]:
    """Hash of every file."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="4 kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kills, draw = 4 if options.quick else options.kills, random.Random(options.seed)
    torch.set_num_threads(1)
    encoder = encoder_from_string("timm:resnet10t", pretrained=False, image_size=32)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_sources(folder)
        for work in (build, take):
            whole, out = folder / "whole", folder / "killed"
            began = time.perf_counter()
            in_child(lambda work=work, out=whole: work(folder, out, encoder))
            seconds = time.perf_counter() - began
            expected, same = digest(whole), 0
            for _ in range(kills // 2):

                def again(work: Callable[..., None] = work, out: Path = out) -> None:
                    work(folder, out, encoder)

                while not in_child(again, seconds * draw.random()):
                    shutil.rmtree(out)  # it was quicker than the kill
                in_child(again)
                left = [f.name for f in folder.iterdir() if "partial" in f.name]
                same += digest(out) == expected and not left
                shutil.rmtree(out)
            shutil.rmtree(whole)
            figures[work.__name__] = {
                "killed": kills // 2, "identical": same, "seconds_whole": seconds,
                "files": len(expected),
            }  # fmt: skip
    print(json.dumps(figures, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(any(f["identical"] != f["killed"] for f in figures.values()))


if __name__ == "__main__":
    main()
