"""The search server under load: 200 requests from 16 clients at 100,000 rows.

The server runs as a program of its own (``retrodiff serve``), over a database of drawn embeddings
whose rows have small pictures, with an encoder of random weights: its cost is real, its answers are
known. A quarter of the requests each asks with a row, an embedding, a picture, and a row under a
filter. Every answer is compared with the one that the same rows give without a server; the bound is
no error and no answer that belongs to another request.

    python benchmarks/server.py --out benchmarks/results/server.json
    python benchmarks/server.py --rows 2000 --requests 40       # a short check
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrodiff.databases import (
    EmbeddingDatabase,
    Images,
    append_to_database,
    import_embeddings,
    open_database,
    open_parts,
)
from retrodiff.encoders import encoder_from_string
from retrodiff.serving import SearchService

ENCODER = "timm:test_resnet,image_size=64"
KINDS = ("row", "embedding", "picture", "filtered")
K = 10


def make(folder: Path, rows: int, pictures: int) -> EmbeddingDatabase:
    """Drawn embeddings, the last of them of pictures that exist."""
    encoder = encoder_from_string(ENCODER, pretrained=False)
    rng = np.random.default_rng(0)
    np.save(folder / "x.npy", rng.standard_normal((rows - pictures, encoder.dim), np.float32))
    place = folder / "d.rdb"
    import_embeddings(place, open_parts(folder / "x.npy")[0], encoder.fingerprint)
    images = torch.from_numpy(rng.integers(0, 256, (pictures, 3, 64, 64), dtype=np.uint8))
    append_to_database(place, Images(images), encoder)
    database = open_database(place)
    assert isinstance(database, EmbeddingDatabase)
    np.save(folder / "pictures.npy", images.numpy())
    return database


def png(pixels: np.ndarray) -> bytes:
    """A picture (3, h, w) of bytes as a file."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.moveaxis(pixels, 0, -1)).save(file, "PNG")
    return file.getvalue()


def asked(database: EmbeddingDatabase, folder: Path, n: int) -> list[dict[str, Any]]:
    """Requests: their kind, path and body."""
    images = np.load(folder / "pictures.npy")
    first = len(database) - len(images)
    out: list[dict[str, Any]] = []
    for i in range(n):
        kind, row = KINDS[i % len(KINDS)], 37 * i % first
        one: dict[str, Any] = {"kind": kind, "path": "/search"}
        if kind == "picture":
            one |= {"path": f"/search/image?k={K}", "body": png(images[i % len(images)])}
        else:
            body: dict[str, Any] = {"row": row, "k": K}
            if kind == "embedding":
                body = {"embedding": database.embeddings([row])[0].tolist(), "k": K}
            if kind == "filtered":
                body["where"] = f"number < {len(database) // 2}"
            one |= {"given": body, "body": json.dumps(body).encode()}
        out.append(one)
    return out


def expected(service: SearchService, one: dict[str, Any]) -> list[tuple[int, float]]:
    """What the rows answer without a server."""
    if one["kind"] == "picture":
        hits = service.picture(one["body"], K)[1]
    elif one["kind"] == "embedding":
        hits = service.embedding(one["given"]["embedding"], K)[1]
    else:
        hits = service.row(one["given"]["row"], K, one["given"].get("where"))[1]
    return [(hit.row, hit.similarity) for hit in hits]


def ask(address: str, one: dict[str, Any]) -> tuple[float, list[tuple[int, float]] | str]:
    """Seconds, and what came: rows and similarities, or what went wrong."""
    kind = "image/png" if one["kind"] == "picture" else "application/json"
    request = urllib.request.Request(
        address + one["path"], one["body"], headers={"content-type": kind}
    )
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.load(answer)
    except OSError as error:
        return time.perf_counter() - start, str(error)
    took = time.perf_counter() - start
    return took, [(hit["row"], hit["similarity"]) for hit in found["hits"]]


def measure(address: str, requests: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    """All requests, from so many clients at a time."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda one: ask(address, one), requests))
    seconds = time.perf_counter() - start
    errors = [found for _, found in answers if isinstance(found, str)]
    mixed = sum(
        not isinstance(found, str) and not same(found, one["expected"])
        for (_, found), one in zip(answers, requests, strict=True)
    )
    times = sorted(took for took, _ in answers)
    return {
        "clients": clients,
        "requests": len(requests),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "mixed_up": mixed,
        "requests_per_second": round(len(requests) / seconds, 1),
        "median_ms": round(1e3 * statistics.median(times), 1),
        "p95_ms": round(1e3 * times[min(len(times) - 1, int(0.95 * len(times)))], 1),
        "slowest_ms": round(1e3 * times[-1], 1),
    }


def same(found: list[tuple[int, float]], wanted: list[tuple[int, float]]) -> bool:
    """The same rows, and the same similarities up to the rounding of an encoder's threads."""
    rows = [row for row, _ in found] == [row for row, _ in wanted]
    near = all(abs(a - b) < 1e-4 for (_, a), (_, b) in zip(found, wanted, strict=False))
    return rows and near


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        database = make(folder, options.rows, options.pictures)
        service = SearchService(database, encoder_from_string(ENCODER, pretrained=False))
        requests = asked(database, folder, options.requests)
        for one in requests:
            one["expected"] = expected(service, one)
        command = [sys.executable, "-m", "retrodiff", "serve", str(folder / "d.rdb")]
        command += ["--encoder", ENCODER, "--no-pretrained", "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            runs = [measure(address, requests, clients) for clients in (1, options.clients)]
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(120)
    report = {
        "rows": options.rows,
        "dim": database.fingerprint.dim,
        "encoder": f"{ENCODER}, random weights",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "runs": runs,
    }
    print(json.dumps(report, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if any(run["errors"] or run["mixed_up"] for run in runs):
        sys.exit("errors, or answers that belong to other requests")


if __name__ == "__main__":
    main()
