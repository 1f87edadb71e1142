"""Builds the same pictures locally and on a Ray cluster of two workers: the same rows, how fast.

Times are of whole builds; ``first_ray`` holds what it takes Ray to start the actors and their
imports, ``ray`` is a second build on the same cluster.

    python benchmarks/database_ray.py --out benchmarks/results/database_ray.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from database_build import make_pictures

from retrodiff.databases import EmbeddingDatabase, ImageFolder, build_database
from retrodiff.encoders import encoder_from_string


def same(a: EmbeddingDatabase, b: EmbeddingDatabase) -> dict[str, Any]:
    """Whether two databases hold the same rows."""
    rows = torch.arange(len(a))
    mine, theirs = a.manifest.shards, b.manifest.shards
    files = [
        x.files[name] == y.files[name]
        for x, y in zip(mine, theirs, strict=True)
        for name in x.files
        if not name.startswith("vectors")
    ]
    off = (a.embeddings(rows) - b.embeddings(rows)).norm(dim=1) / b.embeddings(rows).norm(dim=1)
    return {
        "same_rows": len(a) == len(b) and [s.next for s in mine] == [s.next for s in theirs],
        "same_records_and_thumbnails": all(files),
        "largest_relative_difference": float(off.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--encoder", default="timm:mobilenetv3_small_100")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the images")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    import ray

    torch.set_num_threads(1)
    n = options.images // 20 if options.quick else options.images
    encoder = encoder_from_string(options.encoder, pretrained=False)
    figures: dict[str, Any] = {"images": n, "encoder": encoder.fingerprint.encoder}
    built: dict[str, EmbeddingDatabase] = {}
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name) / "photos"
        photos.mkdir()
        make_pictures(photos, n)
        source = ImageFolder(photos)

        def build(what: str, engine: Any, workers: int) -> None:
            began = time.perf_counter()
            built[what] = build_database(
                Path(name) / what, source, encoder, thumbnails=64, shard_rows=256, workers=workers,
                engine=engine, progress=False,
            )  # fmt: skip
            seconds = time.perf_counter() - began
            figures[what] = {"seconds": seconds, "rows_per_s": n / seconds}

        build("local", "local", 0)
        build("local_decoding_beside", "local", 1)
        ray.init(num_cpus=options.workers, include_dashboard=False, log_to_driver=False)
        figures["workers"] = options.workers
        build("first_ray", "ray", options.workers)
        build("ray", "ray", options.workers)
        ray.shutdown()
        figures |= same(built["ray"], built["local"])
    print(json.dumps(figures, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
