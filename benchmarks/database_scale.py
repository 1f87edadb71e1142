"""How a database behaves at twenty million rows: opening, searching, importing, storage.

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

SHARD = 32_768


def anonymous_mb() -> float:
    """Anonymous memory of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1e3
    return float("nan")


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
    database.search(Query(torch.randn(64, database.fingerprint.dim)), 20)
    return {
        "rows": len(database),
        "open_s": opened,
        "open_anon_mb": after_open - start,
        "search_64_s": time.perf_counter() - began,
        "search_anon_mb": anonymous_mb() - start,
    }


def measure_import(folder: Path, rows: int, dim: int) -> dict[str, float]:
    """In a process of its own: rows of an npy file into a database, and the disk's own speed."""
    import numpy as np
    import torch

    part = 131_072
    names = []
    for i in range(-(-rows // part)):
        names.append(folder / f"part_{i}.npy")
        values = torch.randn(min(part, rows - i * part), dim).half().numpy()
        np.save(names[-1], values)
    del values

    raw = folder / "raw"
    chunk = np.random.default_rng(0).bytes(1 << 25)
    count = rows * dim * 2 // len(chunk)
    began = time.perf_counter()
    with raw.open("wb") as file:
        for _ in range(count):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    disk = count * len(chunk) / (time.perf_counter() - began) / 1e6
    raw.unlink()

    from retrodiff.databases import import_embeddings, npy_parts
    from retrodiff.interfaces import Fingerprint

    mark = Fingerprint(encoder="synthetic", weights="-", preprocessing="-", dim=dim)
    start = anonymous_mb()
    began = time.perf_counter()
    database = import_embeddings(folder / "d.rdb", npy_parts(names), mark, progress=False)
    seconds = time.perf_counter() - began
    files = {n: a["bytes"] for s in database.manifest.shards for n, a in s.files.items()}
    vectors = sum(size for name, size in files.items() if name.startswith("vectors"))
    return {
        "rows": rows,
        "seconds": seconds,
        "mb_per_s": vectors / seconds / 1e6,
        "disk_mb_per_s": disk,
        "share_of_disk": vectors / seconds / 1e6 / disk,
        "anon_mb": anonymous_mb() - start,
        "vectors_gb_per_million": vectors / rows * 1e6 / 1e9,
        "records_mb_per_million": sum(
            size for name, size in files.items() if name.startswith("records")
        )
        / rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--import-rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the rows")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--job", choices=["open", "import"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job == "open":
        print(json.dumps(measure_open(options.folder)))
        return
    if options.job == "import":
        print(json.dumps(measure_import(options.folder, options.import_rows, options.dim)))
        return
    if options.quick:
        options.rows, options.import_rows = options.rows // 100, options.import_rows // 10
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        make_rows(Path(folder) / "large.rdb", options.rows, options.dim)
        figures = {
            "open": run("open", Path(folder) / "large.rdb", options),
            "import": run("import", Path(folder), options),
        }
    print(json.dumps(figures, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


def run(job: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """One measurement in a fresh process."""
    words = ["--folder", str(folder), "--import-rows", str(options.import_rows)]
    done = subprocess.run(
        [sys.executable, __file__, "--job", job, *words, "--dim", str(options.dim)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
