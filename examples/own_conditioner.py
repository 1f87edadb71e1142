"""A conditioner of one's own, with weights: neighbors that are nearer count for more.

    python examples/own_conditioner.py --steps 500 --out runs/conditioner

How much more is learned with the network: a token is multiplied by sigmoid(slope * similarity +
offset). Trains a small model on pictures of the shipped database, each without its own row.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from retrodiff import Builder, Conditioner, Context, Neighbors, Query, Tokens, presets
from retrodiff.databases import Searchable
from retrodiff.diffusion import Dropped
from retrodiff.interfaces import unit
from retrodiff.retrieval import ExcludeSelf, NearestNeighbors
from retrodiff.testing import check_conditioner
from retrodiff.training import TrainingSet, fit


class Weighed(nn.Module, Conditioner):
    """Neighbors times a learned function of their similarity to the query."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Parameter(torch.tensor([4.0, 0.0]))  # slope and offset

    def widths(self, dim: int) -> dict[str, int]:
        return {"neighbors": dim}

    def condition(self, query: Query, neighbors: Neighbors) -> Context:
        weight = torch.sigmoid(self.line[0] * neighbors.similarity + self.line[1])
        values = unit(neighbors.embeddings) * weight.unsqueeze(-1)
        return Context({"neighbors": Tokens(values, neighbors.mask)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/conditioner"))
    options = parser.parse_args()
    check_conditioner(Weighed())

    shipped = presets.rdm_pictograms(pretrained=True)
    assert isinstance(shipped.database, Searchable)
    database = shipped.database.where("style == 'fluent'").subset(range(options.pictures))
    ids = torch.arange(len(database))  # the training images are its rows
    pictures = torch.stack([database.image(row) for row in ids.tolist()])[:, :, ::2, ::2]
    near = ExcludeSelf(NearestNeighbors())
    recipe = Builder.from_preset(presets.rdm_small, encoder=shipped.encoder, database=database)
    model = recipe.conditioner(Dropped(Weighed(), 0.1)).build()
    data = TrainingSet.of(pictures, model.encoder, database, near, model.k, ids=ids)
    model = fit(model, data, steps=options.steps, batch_size=32, lr=1e-3, ema=0.99).model
    print("slope {:.3f}, offset {:.3f}".format(*model.conditioner.conditioner.line))
    titles = [str(title) for title in database.column("title")[:: len(database) // 5]]
    model.sample(prompts=titles, mode="neighbors").save(options.out, overwrite=True)
