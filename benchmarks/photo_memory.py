"""Peak of memory while databases are built from large pictures, with the defaults of a build.

64 photographs of 24 megapixels (JPEG, 6000 x 4000) are built with CLIP ViT-B/32 of random weights,
which take the room of trained ones: with the defaults, with thumbnails, and with two processes that
decode ahead. Beside them single pictures: an animation's first frame of 9000 x 9000 pixels in a GIF
of some kilobytes, and a spacer of 1 x 10,000 pixels, which is refused. Each build runs in a process
of its own; its memory is the highest sum of what its processes hold alone and their share of the
rest (PSS), looked at every 20 ms, and the kernel's own peak of the main process.

    python benchmarks/photo_memory.py --out benchmarks/results/photo_memory.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "import and encoder only": ("none", {}),
    "photographs, defaults": ("photographs", {}),
    "photographs, thumbnails of 256": ("photographs", {"thumbnails": 256}),
    "photographs, 2 workers": ("photographs", {"workers": 2}),
    "GIF of 9000 x 9000": ("gif", {}),
    "spacer of 1 x 10,000": ("spacer", {}),
}


def photograph(seed: int, w: int, h: int) -> Any:
    """A picture with structure of every size, as photographs have."""
    from PIL import Image

    draw = np.random.default_rng(seed)
    out = np.zeros((h, w, 3), np.float32)
    for cells, weight in ((6, 0.5), (60, 0.3), (600, 0.2)):
        small = draw.integers(0, 256, (max(cells * h // w, 1), cells, 3), np.uint8)
        large = Image.fromarray(small).resize((w, h), Image.Resampling.BICUBIC)
        out += weight * np.asarray(large)
    return Image.fromarray(out.clip(0, 255).astype(np.uint8))


def make(folder: Path, count: int, w: int, h: int) -> None:
    """The pictures of all cases; photographs beyond the eighth are copies of the first eight."""
    from PIL import Image

    (folder / "photographs").mkdir(parents=True)
    for i in range(count):
        data = folder / f"photographs/{i % 8:03}.jpg"
        if i < 8:
            photograph(i, w, h).save(data, quality=90)
        else:
            (folder / f"photographs/{i:03}.jpg").write_bytes(data.read_bytes())
    (folder / "gif").mkdir()
    Image.new("P", (9000, 9000)).save(folder / "gif/a.gif")
    (folder / "spacer").mkdir()
    Image.new("RGB", (1, 10_000)).save(folder / "spacer/a.gif")
    Image.new("RGB", (32, 32)).save(folder / "spacer/b.gif")


def build(folder: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One build in this process, its peak watched beside it."""
    from retrodiff.databases import ImageFolder, build_database
    from retrodiff.encoders import encoder_from_string

    encoder = encoder_from_string("open_clip:ViT-B-32-quickgelu", pretrained=False)
    encoder.fingerprint  # noqa: B018 (makes the weights)
    found: dict[str, Any] = {"rows": 0}
    done, peak = threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], tree_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if folder.name != "none":
            database = build_database(out, ImageFolder(folder), encoder, progress=False, **options)
            found = {"rows": len(database), "skipped": len(database.manifest.skipped)}
    done.wait(0.05)
    done.set()
    watcher.join()
    main = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**found, "peak_pss_mb": round(peak[0]), "main_process_peak_rss_mb": round(main)}


def tree_mb() -> float:
    """PSS of this process and those below it, in MB."""
    import psutil

    total = 0
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except (OSError, psutil.Error):
            continue
        total += next(int(line.split()[1]) for line in text.splitlines() if line[:4] == "Pss:")
    return total / 1024


def main() -> None:
    """Makes the pictures, builds each case in a process of its own, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--size", type=int, nargs=2, default=(6000, 4000))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        name, settings = CASES[options.case]
        with tempfile.TemporaryDirectory() as room:
            print(json.dumps(build(options.folder / name, Path(room) / "d", settings)))
        return
    with tempfile.TemporaryDirectory() as room:
        make(Path(room) / "pictures", options.count, *options.size)
        found = {}
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--folder", f"{room}/pictures"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[case] = json.loads(done.stdout.splitlines()[-1])
            print(case, found[case], flush=True)
    table = {"count": options.count, "size": list(options.size), "cases": found}
    if options.out:
        options.out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
