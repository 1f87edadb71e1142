"""How long choosing the references of a prompt takes, beside the encoder.

Rows are random, pictures are files of one megapixel. The encoder is stood in for by a table, so
that search, filter, choice and reading the pictures are all that is measured. The first call with
a filter reads the records; later ones do not, so it is given on its own.

    python benchmarks/references.py --out benchmarks/results/references.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from retrodiff.bridges import ReferenceDatabase, ReferenceRetriever, caption_database
from retrodiff.databases import Part, import_embeddings, open_database
from retrodiff.interfaces import Fingerprint, TextEncoder

PICTURES = 64
"""Different files; the rows share them."""

BOUND = 0.3
"""Seconds for a prompt at 100,000 rows."""


class Table(TextEncoder):
    """An encoder that costs nothing: a vector for each text, drawn by its hash."""

    def __init__(self, dim: int) -> None:
        self._dim = dim

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(encoder="table", weights="-", preprocessing="-", dim=self.dim)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def encode_text(self, prompts: Sequence[str]) -> torch.Tensor:
        seeds = [sum(map(ord, prompt)) for prompt in prompts]
        rows = [torch.randn(self.dim, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(rows)


def make(folder: Path, rows: int, dim: int, side: int) -> None:
    """A database of random rows whose pictures are files."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(PICTURES):
        small = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        large = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
        large.save(folder / "pictures" / f"{i}.jpg", quality=90)
    records = [
        {
            "file": f"{i % PICTURES}.jpg",
            "license": ("CC0", "CC BY 4.0", "unknown")[i % 3],
            "caption": f"thing {i}",
        }
        for i in range(rows)
    ]
    vectors = rng.normal(size=(rows, dim)).astype(np.float16)
    mark = Table(dim).fingerprint
    import_embeddings(
        folder / "d.rdb", [Part(vectors, records)], mark, root=folder / "pictures", progress=False
    )


def seconds(choose: Any, calls: int) -> dict[str, float]:
    """The first call, and median, 95th percentile and maximum of later ones."""
    took = []
    for i in range(calls + 1):
        began = time.perf_counter()
        choose(f"prompt {i}")
        took.append(time.perf_counter() - began)
    later = np.array(took[1:])
    return {
        "first_s": took[0],
        "median_s": float(np.median(later)),
        "p95_s": float(np.quantile(later, 0.95)),
        "max_s": float(later.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--side", type=int, default=1024, help="of a picture, in pixels")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.rows, options.dim, options.side)
        plain = ReferenceDatabase(open_database(folder / "d.rdb", root=folder / "pictures"))
        encoder = Table(options.dim)
        captioned = ReferenceDatabase(
            plain.database, caption_database(plain.database, encoder, progress=False)
        )
        some = "license in ('CC0', 'CC BY 4.0')"
        cases: dict[str, tuple[ReferenceRetriever, ReferenceDatabase, str | None]] = {
            "nearest": (ReferenceRetriever(encoder, diversity=0), plain, None),
            "diverse": (ReferenceRetriever(encoder), plain, None),
            "filter": (ReferenceRetriever(encoder), plain, some),
            "sizes": (ReferenceRetriever(encoder, min_side=512), plain, None),
            "phrasings": (ReferenceRetriever(encoder, phrasings=["a {}", "old {}"]), plain, None),
            "captions": (ReferenceRetriever(encoder), captioned, None),
        }
        found = {}
        for case, (retriever, database, where) in cases.items():
            found[case] = seconds(
                lambda prompt, r=retriever, d=database, w=where: r.choose(
                    d, prompt, options.k, where=w
                ),
                options.calls,
            )
            print(case, {key: round(value, 4) for key, value in found[case].items()})
    about = {"rows": options.rows, "dim": options.dim, "side": options.side, "k": options.k}
    about |= {"threads": torch.get_num_threads(), "bound_s": BOUND, "cases": found}
    if options.out is not None:
        options.out.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
