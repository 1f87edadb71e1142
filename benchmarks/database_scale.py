"""How a database behaves at twenty million rows: opening, and searching.

The twenty million rows are one shard linked many times, so they take little disk; every link is
mapped and read on its own. Memory is RssAnon of a process of its own, over what it was after
``import torch``.

    python benchmarks/database_scale.py --out benchmarks/results/database_scale.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from memory import Peak, anonymous_mb

SHARD = 32_768


def make_rows(folder: Path, rows: int, dim: int) -> None:
    """A database of so many rows: one shard, linked."""
    import numpy as np

    from retrodiff.databases import Part, import_embeddings
    from retrodiff.databases.manifest import Manifest
    from retrodiff.interfaces import Fingerprint

    mark = Fingerprint(encoder="synthetic", weights="-", preprocessing="-", dim=dim)
    one = np.random.default_rng(0).normal(size=(SHARD, dim)).astype(np.float16)
    database = import_embeddings(folder, [Part(one)], mark, progress=False)
    shard = database.manifest.shards[0]
    shards = [shard]
    for number in range(1, -(-rows // SHARD)):
        names = {name: name.replace("000000", f"{number:06d}") for name in shard.files}
        for name, link in names.items():
            os.link(folder / name, folder / link)
        files = {link: shard.files[name] for name, link in names.items()}
        shards.append(replace(shard, files=files))
    Manifest.write(replace(database.manifest, shards=tuple(shards)), folder / "manifest.json")


def measure_open(folder: Path) -> dict[str, float]:
    """In a process of its own: open, then search 64 queries."""
    import torch

    start = anonymous_mb()
    from retrodiff.databases import open_database
    from retrodiff.interfaces import Query

    began = time.perf_counter()
    database = open_database(folder)
    opened = time.perf_counter() - began
    after_open = anonymous_mb()
    began = time.perf_counter()
    with Peak() as peak:
        database.search(Query(torch.randn(64, database.fingerprint.dim)), 20)
    return {
        "rows": len(database),
        "open_s": opened,
        "open_anon_mb": after_open - start,
        "search_64_s": time.perf_counter() - began,
        "search_peak_anon_mb": peak.mb - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the rows")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--job", choices=["open"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job == "open":
        print(json.dumps(measure_open(options.folder)))
        return
    rows = options.rows // 100 if options.quick else options.rows
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name) / "large.rdb"
        make_rows(folder, rows, options.dim)
        words = [sys.executable, __file__, "--job", "open", "--folder", str(folder)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout)
    print(json.dumps(figures, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
