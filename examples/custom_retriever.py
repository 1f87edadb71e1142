"""A retriever of one's own: k neighbors from k different files.

Patches of one picture tend to fill a query's whole list. This one takes the nearest patch of each
file first, and more of the same files only where there are not enough of them.

    python examples/custom_retriever.py
"""

from dataclasses import dataclass

import torch

from retrodiff import Database, Neighbors, Query, Retriever
from retrodiff.testing import check_retriever


@dataclass(frozen=True)
class OnePerFile(Retriever):
    reach: int = 8  # how many times k rows are looked at

    def retrieve(self, query: Query, database: Database, k: int) -> Neighbors:
        pool = database.search(query, min(self.reach * k, len(database)))
        columns = []
        for rows in pool.indices:
            seen, first, more = set(), [], []
            for column, record in enumerate(database.records(rows)):
                (more if record["file"] in seen else first).append(column)
                seen.add(record["file"])
            columns.append(sorted((first + more)[:k]))
        return pool.take(torch.tensor(columns))


if __name__ == "__main__":
    check_retriever(OnePerFile())
    print("OnePerFile keeps every promise of a retriever")
