"""Kills a build at random moments, resumes it, and compares every byte with an undisturbed one.

python benchmarks/database_kill.py --kills 20
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def build(photos: str, out: str) -> None:
    """A build of some seconds, continued if it was begun."""
    import torch

    from retrodiff.databases import ImageFolder, Patchify, build_database
    from retrodiff.encoders import encoder_from_string

    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = encoder_from_string("timm:resnet10t", pretrained=False, image_size=32)
    source = Patchify(size=48, stride=16).over(ImageFolder(photos))
    build_database(
        out, source, encoder, shard_rows=256, batch_size=32, thumbnails=32, resume=True,
        progress=False,
    )  # fmt: skip


def digest(folder: Path) -> dict[str, str]:
    """Hash of every file."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="2 kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        build(*options.job)
        return
    from PIL import Image
    from skimage import data

    kills, draw = 2 if options.quick else options.kills, random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = folder / "photos"
        photos.mkdir()
        for photo in ("astronaut", "chelsea", "coffee", "rocket"):
            Image.fromarray(getattr(data, photo)()).save(photos / f"{photo}.png")
        words = [sys.executable, __file__, "--job", str(photos)]
        began = time.perf_counter()
        subprocess.run([*words, str(folder / "whole")], check=True)
        seconds = time.perf_counter() - began
        expected, same, killed = digest(folder / "whole"), 0, 0
        for _ in range(kills):
            out = folder / "killed"
            process = subprocess.Popen([*words, str(out)])
            try:
                process.wait(seconds * draw.uniform(0.2, 1.0))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
            subprocess.run([*words, str(out)], check=True)
            same += digest(out) == expected
            shutil.rmtree(out)
    figures = {"builds": kills, "killed": killed, "identical": same, "seconds_whole": seconds}
    print(json.dumps(figures, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(0 if same == kills else 1)


if __name__ == "__main__":
    main()
