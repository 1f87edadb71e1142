"""A user's program of twenty lines; tests/test_packaging.py has pyright check it strictly."""

from collections.abc import Sequence
from dataclasses import dataclass

from retrodiff import Database, Model, Neighbors, Query, Retriever, build_database, presets
from retrodiff.databases import ImageFolder
from retrodiff.encoders import TimmEncoder
from retrodiff.retrieval import NearestNeighbors, Uniform


@dataclass(frozen=True)
class Nearest(Retriever):
    inner: Retriever

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        return self.inner.retrieve(query, database, k)


def draw(folder: str, files: Sequence[str], out: str) -> list[float]:
    encoder = TimmEncoder("resnet18", pretrained=True)
    database = build_database("photos.rdb", ImageFolder(folder), encoder, thumbnails=64)
    model: Model = presets.rdm_small(encoder=encoder, database=database)
    model = model.replace(retriever=Nearest(NearestNeighbors()), proposal=Uniform())
    made = model.sample(images=list(files), guidance=2.0, steps=20, seed=0)
    made.save(out)
    return [float(value) for value in made.neighbors.similarity[:, 0]]
