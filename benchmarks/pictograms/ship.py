"""Puts the trained pictogram model into its package, in half precision, with its database.

    python benchmarks/pictograms/network.py --report   # of a training that is still going on
    python benchmarks/pictograms/ship.py

Reads runs/pictograms/{network,sharp,encoder,database}. Into
packages/pictograms/retrodiff_pictograms it writes ``model`` (the model with D inside) and
``held_out`` (a database of concepts that were never trained on, for the demo). Prints the size of
every part.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from network import STYLES

from retrodiff.checkpoints.first_stages import load_autoencoder
from retrodiff.databases import ParquetImages, build_database
from retrodiff.diffusion import ClassifierFree, Folded
from retrodiff.encoders import load_encoder, save_encoder
from retrodiff.model import Model

UNSEEN = 16
"""Held-out concepts whose pictures come along."""


def main() -> None:
    """Loads, narrows, saves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/pictograms"))
    package = Path("packages/pictograms/retrodiff_pictograms")
    parser.add_argument("--out", type=Path, default=package)
    parser.add_argument("--steps", type=int, default=16, help="of the sampler")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--decoder", type=Path, help="a first stage of the same latents")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in network.py --threads 1: embeddings of D to the bit
    model = sharper(Model.load(options.data / "network"), options.decoder or options.data / "sharp")
    database = small_pictures(options.data, model.encoder)
    guidance = ClassifierFree(options.guidance)
    more: dict[str, Any] = {"steps": options.steps, "guidance": guidance}
    model = model.replace(database=database, proposal=model.proposal, **more)
    where = options.out / "model"
    model.save(where, overwrite=True, include_database=True, dtype=torch.float16)
    # The encoder's weights are numbers of float16 already, so nothing is rounded here.
    folder = where / "encoder"
    save_encoder(load_encoder(folder), folder, dtype=torch.float16, overwrite=True)
    unseen(options.data, options.out / "held_out", model.encoder)
    for part in ("model", "model/encoder", "model/database", "held_out"):
        files = [f for f in (options.out / part).rglob("*") if f.is_file()]
        print(f"{part}: {sum(f.stat().st_size for f in files) / 1e6:.2f} MB")


@torch.no_grad()
def sharper(model: Model, folder: Path) -> Model:
    """The model with a first stage whose decoder alone was trained further."""
    stage: Any = Folded(load_autoencoder(folder), 2)
    before: Any = model.autoencoder
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    if not torch.equal(stage.encode(picture), before.encode(picture)):
        raise ValueError(
            f"{folder} has other latents than the first stage of the network: train it with "
            "first_stage.py --decoder-of"
        )
    return model.replace(autoencoder=stage)


def small_pictures(data: Path, encoder: Any) -> Any:
    """D as it is, its thumbnails a fifth as large."""
    return build_database(
        data / "shipped_database",
        ParquetImages(data / "database.parquet"),
        encoder,
        thumbnails=64,
        thumbnail_quality=65,
        overwrite=True,
        progress=False,
    )


def unseen(data: Path, out: Path, encoder: Any) -> None:
    """A database of some held-out concepts, in every style that is shipped."""
    table = pa.concat_tables([pq.read_table(data / f"{style}.parquet") for style in STYLES])
    table = table.filter(pc.equal(table["split"], "held-out"))
    concepts = sorted(set(table["concept"].to_pylist()))
    kept = concepts[:: max(1, len(concepts) // UNSEEN)][:UNSEEN]
    table = table.filter(pc.is_in(table["concept"], pa.array(kept)))
    print("held-out concepts:", ", ".join(sorted(set(table["title"].to_pylist()))))
    if out.exists():
        shutil.rmtree(out)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "held_out.parquet"
        pq.write_table(table, file)
        build_database(
            out, ParquetImages(file), encoder, thumbnails=64, thumbnail_quality=65, progress=False
        )


if __name__ == "__main__":
    main()
