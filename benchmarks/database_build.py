"""How fast a database is built from pictures, and where the time goes: decoding, encoder, the rest.

Crops of scikit-image's photographs, saved as JPEG of 512 x 384. Two measurements:

- ``speed``: pictures per second of a build, with and without thumbnails, beside a plain torch
  DataLoader that decodes with Pillow, prepares pictures as the encoder does and hands batches to
  the same encoder. As many worker processes on both sides; all take turns, medians.
- ``shares``: one process and one thread, so that the times of the parts add up.

Encoders have random weights, which cost what trained ones do: none at all (a null encoder, which
takes what MobileNetV3 takes), MobileNetV3-small, about the cheapest that is of any use, and CLIP
ViT-B/32, the paper's.

    python benchmarks/database_build.py --out benchmarks/results/database_build.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from retrodiff.databases import ImageFolder, Images, Source, build_database
from retrodiff.databases.build import encoding
from retrodiff.encoders import encoder_from_string

SIDE = 64
"""Of thumbnails."""

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
    """Another encoder, its work timed, resizing apart."""

    def __init__(self, encoder: Any):
        self.encoder = encoder

    @property
    def dim(self) -> int:
        return self.encoder.dim

    @property
    def fingerprint(self) -> Any:
        return self.encoder.fingerprint

    @property
    def preparation(self) -> Any:
        def prepare(images: torch.Tensor) -> torch.Tensor:
            with counted("resizing"):
                return self.encoder.preparation(images)

        return prepare

    def encode_prepared(self, prepared: torch.Tensor) -> torch.Tensor:
        with counted("encoder"):
            return self.encoder.encode_prepared(prepared)


class Null:
    """An encoder that does nothing with what another one would be given."""

    dim = 64

    def __init__(self, encoder: Any):
        self.encoder = encoder
        self.fingerprint = replace(encoder.fingerprint, encoder="null", weights="", dim=64)

    @property
    def preparation(self) -> Any:
        return self.encoder.preparation

    def encode_prepared(self, prepared: torch.Tensor) -> torch.Tensor:
        return prepared.flatten(1)[:, :64].clone()


class Plain(Dataset[Any]):
    """What a plain loader does: Pillow, a tensor, the encoder's own preparation."""

    def __init__(self, files: list[Path], encoder: Any):
        self.files, self.encoder = files, encoder

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.files[i]) as opened:
            pixels = np.array(opened.convert("RGB"))
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        return self.encoder.preparation(image[None])[0]


def make_pictures(folder: Path, n: int) -> None:
    """JPEG files cut from photographs."""
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


def shares(photos: Path, out: Path, encoder: Any) -> dict[str, Any]:
    """One build with thumbnails in this process, its parts in seconds."""
    warm = Images([torch.zeros(3, 384, 512, dtype=torch.uint8)] * 2)
    build_database(out, warm, encoder, thumbnails=SIDE, progress=False)  # imports, first calls
    shutil.rmtree(out)
    SECONDS.clear()
    thumbnail = encoding.thumbnail

    def timed(*arguments: Any) -> bytes:
        with counted("thumbnails"):
            return thumbnail(*arguments)

    encoding.thumbnail = timed
    source = TimedSource(ImageFolder(photos), "decoding")
    began = time.perf_counter()
    database = build_database(out, source, TimedEncoder(encoder), thumbnails=SIDE, progress=False)  # type: ignore[arg-type]
    total = time.perf_counter() - began
    encoding.thumbnail = thumbnail
    shutil.rmtree(out)
    parts = dict(SECONDS)
    rest = total - sum(parts.values())
    return {
        "encoder": encoder.fingerprint.encoder,
        "rows": len(database),
        "seconds": {**parts, "rest": rest, "total": total},
        "share_of_rest": rest / total,
        "share_of_rest_and_thumbnails": (rest + parts["thumbnails"]) / total,
    }


def speed(
    photos: Path, out: Path, encoder: Any, n: int, workers: int, rounds: int
) -> dict[str, Any]:
    """Pictures per second of the plain loader, of a build, and of one with thumbnails."""
    files = sorted(photos.iterdir())[:n]

    def plain() -> None:
        loader = DataLoader(Plain(files, encoder), batch_size=64, num_workers=workers)
        for batch in loader:
            encoder.encode_prepared(batch)

    def build(side: int | None) -> None:
        options: dict[str, Any] = {"thumbnails": side, "workers": workers, "progress": False}
        build_database(out, Images([str(file) for file in files]), encoder, **options)
        shutil.rmtree(out)

    ways = {
        "plain": plain,
        "build": lambda: build(None),
        "build with thumbnails": lambda: build(SIDE),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first turn pays for first calls
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                times[name].append(time.perf_counter() - began)
    rates = {name: n / statistics.median(seconds) for name, seconds in times.items()}
    cores = max(workers, torch.get_num_threads())
    return {
        "encoder": encoder.fingerprint.encoder,
        "pictures": n,
        "pictures_per_s": rates,
        "pictures_per_s_and_core": {name: rate / cores for name, rate in rates.items()},
        "against_plain": rates["build"] / rates["plain"],
        "with_thumbnails": rates["build with thumbnails"] / rates["plain"],
    }


def about() -> dict[str, Any]:
    """Processor and versions."""
    import PIL

    known = torch.backends.cpu.get_cpu_capability()
    bf16 = ", bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{known}{bf16}",
        "torch": torch.__version__,
        "pillow": PIL.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of the images, one round")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    n = options.images // 10 if options.quick else options.images
    rounds = 1 if options.quick else options.rounds
    figures: dict[str, Any] = {**about(), "workers": options.workers, "speed": [], "shares": []}
    mobile = encoder_from_string("timm:mobilenetv3_small_100", pretrained=False)
    clip = encoder_from_string("open_clip:ViT-B-32-quickgelu", pretrained=False)
    for encoder in (mobile, clip):
        for module in (encoder, getattr(encoder, "network", None)):
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False)  # frozen weights are hashed once
    with tempfile.TemporaryDirectory() as name:
        photos, out = Path(name) / "photos", Path(name) / "d.rdb"
        photos.mkdir()
        make_pictures(photos, n)
        for encoder, some in ((Null(mobile), n), (mobile, n), (clip, max(n // 8, 16))):
            found = speed(photos, out, encoder, some, options.workers, rounds)
            figures["speed"].append(found)
            print(json.dumps(found), flush=True)
        torch.set_num_threads(1)
        figures["shares"].append(shares(photos, out, mobile))
        print(json.dumps(figures["shares"]), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
