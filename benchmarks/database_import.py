"""Imports embeddings as others have written them: speed against the disk's own, and peak of memory.

Each layout is imported in a process of its own: npy files, the npz parts released with the paper
(ids and boxes, float32), and a folder of clip-retrieval (captions, unit norm). The disk's speed is
that of writing as many bytes as the imported vectors have, flushed to the disk, directly before and
after the import. Memory is the peak of RssAnon over what it was after ``import torch``.

    python benchmarks/database_import.py --out benchmarks/results/database_import.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import Peak, anonymous_mb

LAYOUTS = ("npy", "npz", "clip-retrieval")
PART = 131_072


def make_parts(layout: str, folder: Path, rows: int, dim: int) -> None:
    """The files of a layout."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = np.random.default_rng(0)
    for name in ("img_emb", "metadata") if layout == "clip-retrieval" else (".",):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, start in enumerate(range(0, rows, PART)):
        n = min(PART, rows - start)
        values = draw.standard_normal((n, dim), np.float32)
        if layout == "npz":
            ids = np.array([f"{start + j:016x}" for j in range(n)])
            boxes = draw.integers(0, 1200, (n, 4))
            name = folder / f"{PART}x{dim}-part_{i}.npz"
            np.savez(name, embedding=values, img_id=ids, patch_coords=boxes)
            continue
        if layout == "npy":
            np.save(folder / f"{i}.npy", values.astype(np.float16))
            continue
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        np.save(folder / f"img_emb/img_emb_{i}.npy", values.astype(np.float16))
        captions = [f"caption {start + j} " + "of some length " * 5 for j in range(n)]
        table = pa.table(
            {"image_path": [f"{start + j}.jpg" for j in range(n)], "caption": captions}
        )
        pq.write_table(table, folder / f"metadata/metadata_{i}.parquet")
    os.sync()


def disk_mb_per_s(folder: Path, size: int) -> float:
    """Speed of writing so many bytes to the disk."""
    raw, chunk = folder / "raw", os.urandom(1 << 25)
    count = max(1, size // len(chunk))
    began = time.perf_counter()
    with raw.open("wb") as file:
        for _ in range(count):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    raw.unlink()
    return count * len(chunk) / seconds / 1e6


def measure(layout: str, folder: Path, dim: int) -> dict[str, Any]:
    """One import; in a process of its own."""
    import torch

    start = anonymous_mb()
    from retrodiff.databases import import_embeddings, open_parts
    from retrodiff.interfaces import Fingerprint

    parts, scale = open_parts(folder / layout)
    size = sum(part.embeddings.shape[0] for part in parts) * dim * 2
    before = disk_mb_per_s(folder, size)
    mark = Fingerprint(
        encoder="synthetic", weights="-", preprocessing="-", dim=dim, scale=scale or "raw"
    )
    began = time.perf_counter()
    with Peak() as peak:
        database = import_embeddings(folder / "d.rdb", parts, mark, progress=False)
    seconds = time.perf_counter() - began
    disk = (before + disk_mb_per_s(folder, size)) / 2
    files = {n: a["bytes"] for s in database.manifest.shards for n, a in s.files.items()}
    vectors = sum(n for name, n in files.items() if name.startswith("vectors"))
    records = sum(n for name, n in files.items() if name.startswith("records"))
    speed = vectors / seconds / 1e6
    return {
        "layout": layout,
        "rows": len(database),
        "seconds": seconds,
        "mb_per_s": speed,
        "disk_mb_per_s": disk,
        "share_of_disk": speed / disk,
        "peak_anon_mb": peak.mb - start,
        "vectors_gb_per_million": vectors / len(database) / 1e3,
        "records_gb_per_million": records / len(database) / 1e3,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--job", choices=LAYOUTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(options.job, options.folder, options.dim)))
        return
    rows = options.rows // 10 if options.quick else options.rows
    figures = []
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            make_parts(layout, Path(name) / layout, rows, options.dim)
            words = ["--job", layout, "--folder", name, "--dim", str(options.dim)]
            done = subprocess.run(
                [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True
            )
            figures.append(json.loads(done.stdout))
            print(json.dumps(figures[-1]), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
