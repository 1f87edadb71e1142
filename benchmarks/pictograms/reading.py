"""What a network of pictograms reads of its neighbors: embeddings, or the cells of their pictures?

    python benchmarks/pictograms/reading.py pictograms runs/pictograms/network

The loss on pictures of the split ``database``, which no network was trained on, with neighbors that
are found for their titles (or, ``--found-by picture``, for the pictures) among all other pictures
of D: as they are; with the cells of another picture's neighbors; with another's embeddings; with
both; and with the null condition. What makes no difference is not read. With ``--itself`` the
pictures are in D: what a network makes of the very thing.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from network import build, encode
from torch import Tensor

from retrodiff.checkpoints.first_stages import load_autoencoder
from retrodiff.diffusion import Folded, PixelUnshuffle
from retrodiff.encoders import load_encoder
from retrodiff.interfaces import Neighbors, Query
from retrodiff.model import Model
from retrodiff.model.neighbor_latents import encoded_pictures
from retrodiff.retrieval import ExcludeSelf, NearestNeighbors

LEVELS = (0.2, 0.8, 3.0, 8.0)
"""Deviations of the noise, beside latents of unit variance."""

CHANGED = {
    "right": (),
    "cells of another": ("latents",),
    "embeddings of another": ("embeddings",),
    "both of another": ("latents", "embeddings"),
    "none": None,
}
"""What is taken from the neighbors of another picture."""


def main() -> None:
    """Prints a line of losses for each network and noise level."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="+", help="saved models, or names of shipped ones")
    parser.add_argument("--data", type=Path, default=Path("runs/pictograms"))
    parser.add_argument("--found-by", choices=("title", "picture"), default="title")
    parser.add_argument("--itself", action="store_true", help="pictures may find themselves")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    latents, query, neighbors, database = pictures(options.data, options.found_by, options.itself)
    for name in options.networks:
        model = Model.load(name, database=database)
        for level in LEVELS:
            found = {
                what: round(loss(model, latents, query, neighbors, parts, level), 4)
                for what, parts in CHANGED.items()
            }
            print(json.dumps({"network": name, "sigma": level, **found}), flush=True)


def pictures(folder: Path, found_by: str, itself: bool) -> tuple[Tensor, Query, Neighbors, Any]:
    """Latents (n, 16, 8, 8) of the split, what they are asked with, and their neighbors."""
    encoder: Any = load_encoder(folder / "encoder")
    first_stage: Any = load_autoencoder(folder / "first_stage")
    database = build(folder, encoder)
    rows = torch.tensor((database.column("split") == "database").nonzero()[0])
    images = torch.stack([database.image(int(row)) for row in rows])
    records = database.records(rows)
    if found_by == "title":
        asked = encoder.encode_text([str(record["title"]) for record in records])
    else:
        asked = database.embeddings(rows)
    query = Query(asked, ids=rows)
    retriever = NearestNeighbors() if itself else ExcludeSelf(NearestNeighbors())
    neighbors = retriever.retrieve(query, database, 4)
    own = [[n["concept"] == mine["concept"] for n in database.records(near)]
           for near, mine in zip(neighbors.indices, records, strict=True)]  # fmt: skip
    print(f"{len(rows)} pictures; {torch.tensor(own).float().mean():.3f} of their neighbors show "
          "the same concept")  # fmt: skip
    found, at = neighbors.indices.unique(return_inverse=True)
    seen = encoded_pictures(found, database, Folded(first_stage, 2), (16, 8, 8))
    neighbors = replace(neighbors, latents=seen[at])
    latents = PixelUnshuffle(2).encode(encode(first_stage, images))
    return latents, query, neighbors, database


@torch.no_grad()
def loss(
    model: Model,
    latents: Tensor,
    query: Query,
    neighbors: Neighbors,
    parts: tuple[str, ...] | None,
    level: float,
) -> float:
    """The mean loss at one noise level, with parts of the neighbors taken from another picture."""
    other = torch.arange(len(latents)).roll(37)
    changed = {part: getattr(neighbors, part)[other] for part in parts or ()}
    neighbors = replace(neighbors, **changed)
    total = 0.0
    for some in torch.arange(len(latents)).split(105):
        noise = torch.randn(
            latents[some].shape, generator=torch.Generator().manual_seed(int(some[0]))
        )
        context = model.conditioner.condition(query.rows(some), neighbors.rows(some))
        if parts is None:
            context = model.conditioner.null(context)
        levels = torch.full((len(some),), level)
        denoiser: Any = model.denoiser
        total += float(denoiser.loss(latents[some], levels, noise, context).sum())
    return total / len(latents)


if __name__ == "__main__":
    main()
