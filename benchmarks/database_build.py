"""Where the time goes when a database is built from pictures: decoding, encoder, and the rest.

Crops of scikit-image's photographs, saved as JPEG of 512 x 384, are built in one process and one
thread, so that the times add up. The encoder has random weights, which cost what trained ones do.
Two are measured: CLIP ViT-B/32, the paper's, and a MobileNetV3-small, about the cheapest that is of
any use, beside which the rest weighs most. ``patches`` cuts three patches of 256 from each picture;
cutting is shown apart, since the patches are pixels made before the encoder sees them.

    python benchmarks/database_build.py --out benchmarks/results/database_build.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from retrodiff.databases import ImageFolder, Images, Patchify, Source, build_database
from retrodiff.encoders import encoder_from_string

SECONDS: dict[str, float] = defaultdict(float)
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field")


@contextmanager
def counted(name: str) -> Iterator[None]:
    """Adds the time of a block."""
    began = time.perf_counter()
    yield
    SECONDS[name] += time.perf_counter() - began


class TimedSource(Source):
    """Another source, its reading timed."""

    def __init__(self, source: Source, name: str):
        self.source, self.what = source, name

    def __len__(self) -> int:
        return len(self.source)

    def name(self, i: int) -> str:
        return self.source.name(i)

    def read(self, i: int) -> list[Any]:
        with counted(self.what):
            return self.source.read(i)

    def describe(self) -> dict[str, Any]:
        return self.source.describe()


class TimedEncoder:
    """Another encoder, its work timed; resizing to its own size is part of it."""

    def __init__(self, encoder: Any):
        self.encoder = encoder

    @property
    def dim(self) -> int:
        return self.encoder.dim

    @property
    def fingerprint(self) -> Any:
        return self.encoder.fingerprint

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        with counted("encoder"):
            return self.encoder.encode_image(images)


def make_pictures(folder: Path, n: int) -> None:
    """JPEG files cut from photographs."""
    from PIL import Image
    from skimage import data

    draw = torch.Generator().manual_seed(0)
    photographs = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOGRAPHS]
    for i in range(n):
        photograph = photographs[i % len(photographs)]
        scale = 1 + float(torch.rand(1, generator=draw))
        w, h = (max(round(side / scale), 200) for side in photograph.size)
        x = int(torch.randint(photograph.width - w + 1, (1,), generator=draw))
        y = int(torch.randint(photograph.height - h + 1, (1,), generator=draw))
        crop = photograph.crop((x, y, x + w, y + h)).resize((512, 384))
        crop.save(folder / f"{i}.jpg", quality=90)


def measure(photos: Path, out: Path, encoder: Any, patches: bool) -> dict[str, Any]:
    """One build, its parts in seconds, and the share that is neither decoding nor encoder."""
    # A first build of two pictures pays for imports and first calls.
    few = Images([torch.zeros(3, 384, 512, dtype=torch.uint8)] * 2)
    build_database(out, few, encoder, thumbnails=64, progress=False)
    shutil.rmtree(out)
    SECONDS.clear()
    source: Source = TimedSource(ImageFolder(photos), "decoding")
    if patches:
        source = TimedSource(Patchify(size=256, n=3).over(source), "decoding and cutting")
    began = time.perf_counter()
    database = build_database(out, source, TimedEncoder(encoder), thumbnails=64, progress=False)  # type: ignore[arg-type]
    total = time.perf_counter() - began
    if patches:
        SECONDS["cutting"] = SECONDS.pop("decoding and cutting") - SECONDS["decoding"]
    parts = dict(SECONDS)
    rest = total - sum(parts.values())
    return {
        "encoder": database.fingerprint.encoder,
        "rows": len(database),
        "rows_per_s": len(database) / total,
        "seconds": {**parts, "rest": rest, "total": total},
        "share_of_rest": rest / total,
        "share_of_rest_and_cutting": (rest + parts.get("cutting", 0)) / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--quick", action="store_true", help="a tenth of the images")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n = options.images // 10 if options.quick else options.images
    figures = []
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name) / "photos"
        photos.mkdir()
        make_pictures(photos, n)
        for text in ("open_clip:ViT-B-32-quickgelu", "timm:mobilenetv3_small_100"):
            encoder = encoder_from_string(text, pretrained=False)
            for patches in (False, True):
                out = Path(name) / f"{len(figures)}.rdb"
                figures.append({"patches": patches, **measure(photos, out, encoder, patches)})
                print(json.dumps(figures[-1]))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
