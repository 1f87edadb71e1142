"""A retriever of one's own: k neighbors from k different files, or with k different titles.

    python examples/custom_retriever.py "a crown" "a cat" --out runs/retriever

Patches of one picture tend to fill a query's whole list, and so do sets that show the same things.
This retriever takes the nearest row of each file (or of each value of another column) first, and
more of the same only where there are not enough of them. `neighbors.png` shows it beside the usual
one.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from retrodiff import Database, Neighbors, Query, Retriever, TextEncoder, presets
from retrodiff.pictures.sheet import Line, Section, draw_sheet
from retrodiff.retrieval import NearestNeighbors
from retrodiff.testing import check_retriever


@dataclass(frozen=True)
class OnePerFile(Retriever):
    column: str = "file"
    reach: int = 8  # how many times k rows are looked at

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        pool = database.search(query, min(self.reach * k, len(database)))
        columns = []
        for rows in pool.indices:
            seen, first, more = set(), [], []
            for column, record in enumerate(database.records(rows)):
                (more if record[self.column] in seen else first).append(column)
                seen.add(record[self.column])
            columns.append(sorted((first + more)[:k]))
        return pool.take(torch.tensor(columns))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompts", nargs="*", default=["crown", "cat face", "guitar"])
    parser.add_argument("--out", type=Path, default=Path("runs/retriever"))
    options = parser.parse_args()
    check_retriever(OnePerFile())
    print("OnePerFile keeps every promise of a retriever")

    model = presets.rdm_pictograms(pretrained=True)
    assert isinstance(model.encoder, TextEncoder)
    query, sections = Query(model.encoder.encode_text(options.prompts)), []
    for retriever in (NearestNeighbors(), OnePerFile("title")):
        found = retriever.retrieve(query, model.database, 6).indices
        near = [[model.database.image(row) for row in rows] for rows in found.tolist()]
        lines = [Line(*line) for line in zip(options.prompts, near, strict=True)]
        sections.append(Section(repr(retriever), lines))
    options.out.mkdir(parents=True, exist_ok=True)
    draw_sheet(sections).save(options.out / "neighbors.png")
    print(f"look at {options.out / 'neighbors.png'}")
