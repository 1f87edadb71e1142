"""Approximate indexes on pictures' embeddings and on clustered vectors: recall, time, build.

Bounds, for the default approximate index (annoy): recall@20 of at least 0.95, and faster than
exact search for a single query. Exact search is the truth, over the same stored float16 values.

``cifar10`` embeds the 50,000 training pictures of CIFAR-10 (a parquet with a column ``image`` or
``img`` of encoded pictures) with a convolutional network of random weights: 128 random filters on
normalized 7 x 7 patches, both signs of the answer, averaged over 2 x 2 quarters, 1,024 numbers,
of which the 512 leading principal axes are kept. No training; such features follow color, edges and
layout. Queries are held-out pictures.
``clustered`` is 200,000 x 512 of intrinsic width 48, as in `exact_search.py`.

    python benchmarks/index_recall.py --out benchmarks/results/index_recall.json
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exact_search import drawn
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from retrodiff.indexes import Vectors, recipe_from_string

K = 20
HELD_OUT = 1000
CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10-train.parquet"


def pictures(file: Path, rows: int) -> Tensor:
    """The first pictures of a parquet (rows, 3, 32, 32) in [-1, 1]."""
    import pyarrow.parquet as pq
    from PIL import Image

    found = pq.ParquetFile(file)
    name = next(n for n in ("image", "img") if n in found.schema_arrow.names)
    out: list[np.ndarray] = []
    for batch in found.iter_batches(columns=[name]):
        for cell in batch.column(name).to_pylist()[: rows - len(out)]:
            data = cell["bytes"] if isinstance(cell, dict) else cell
            out.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((32, 32))))
        if len(out) == rows:
            break
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 127.5 - 1


def embedded(images: Tensor, filters: int = 128) -> Tensor:
    """Embeddings (n, 8 * filters) by random filters on normalized patches."""
    weights = torch.randn(filters, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    weights -= weights.mean((1, 2, 3), keepdim=True)
    ones = torch.ones(1, 3, 7, 7) / 147
    parts = []
    for batch in images.split(250):
        mean = conv2d(batch, ones, stride=2)
        spread = (conv2d(batch.square(), ones, stride=2) - mean.square()).clamp_min(0).sqrt()
        answer = conv2d(batch, weights, stride=2) / (spread + 0.05)
        both = torch.cat([answer.relu(), (-answer).relu()], 1)
        parts.append(avg_pool2d(both, 6, 6, ceil_mode=True).flatten(1))
    return torch.cat(parts)


def cifar10(file: Path, rows: int) -> tuple[Tensor, Tensor]:
    """Stored embeddings (rows, 512) float16, and those of held-out pictures."""
    held = min(HELD_OUT, rows // 10)
    features = embedded(pictures(file, rows))
    kept = features[held:]
    values = torch.linalg.eigh((kept.T @ kept).double()).eigenvectors[:, -512:].flip(1).float()
    features = features @ values
    return features[held:].half(), features[:held]


def clustered(rows: int) -> tuple[Tensor, Tensor]:
    """Stored vectors (rows, 512) float16, and queries drawn as they are."""
    draw = drawn("clustered", rows, 512)
    stored = np.concatenate([draw(min(50_000, rows - i)) for i in range(0, rows, 50_000)])
    return torch.from_numpy(stored).half(), torch.from_numpy(draw(HELD_OUT))


def measured(stored: Tensor, queries: Tensor, recipes: list[str]) -> dict[str, Any]:
    """Each index: build, recall against exact search, and single queries one after the other."""
    vectors = Vectors([stored])
    exact = recipe_from_string("exact").build(vectors)
    truth = exact.search(queries, K)[1]
    report: dict[str, Any] = {"rows": len(stored), "width": stored.shape[1]}
    singles = queries[:100].split(1)
    for text in ["exact", *recipes]:
        recipe = recipe_from_string(text)
        began = time.perf_counter()
        index = recipe.build(vectors)
        figures = {"build_s": time.perf_counter() - began}
        found = index.search(queries, K)[1]
        hits = (found.unsqueeze(2) == truth.unsqueeze(1)).any(2)
        figures["recall"] = hits.float().mean().item()
        times = []
        for query in singles:
            began = time.perf_counter()
            index.search(query, K)
            times.append(time.perf_counter() - began)
        figures["ms_per_query"] = 1e3 * statistics.median(times)
        report[text] = figures
        print(text, json.dumps(figures), flush=True)
    for text in recipes:
        report[text]["over_exact"] = report[text]["ms_per_query"] / report["exact"]["ms_per_query"]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", type=Path, default=CIFAR, help="parquet of CIFAR-10")
    parser.add_argument("--rows", type=int, default=200_000, help="of the clustered vectors")
    parser.add_argument("--indexes", nargs="+", default=["annoy", "usearch", "faiss"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="4,000 pictures, 10,000 vectors")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count, rows = (4_000, 10_000) if options.quick else (50_000, options.rows)
    report: dict[str, Any] = {"k": K, "threads": options.threads, "quick": options.quick}
    if options.cifar.is_file():
        report["cifar10"] = measured(*cifar10(options.cifar, count), options.indexes)
    else:
        report["cifar10"] = f"not measured: no file {options.cifar.name}; give --cifar"
    report["clustered"] = measured(*clustered(rows), options.indexes)
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
