"""Neighbors of many queries at once, computed before training and kept as row numbers only."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import torch
from torch import Tensor

from retrodiff.interfaces import Database, Query, Retriever
from retrodiff.progress import progress_bar


def neighbor_table(
    queries: Query,
    database: Database,
    k: int,
    retriever: Retriever,
    *,
    batch_size: int = 1024,
    progress: bool = False,
) -> Tensor:
    """Row numbers (n, k) int64 of every query's neighbors.

    Args:
        queries: n embeddings (n, d), with ids where they are rows of the database themselves.
        database: where to look.
        k: neighbors per query.
        retriever: which ones.
        batch_size: queries per search.
        progress: show a bar.
    """
    table = torch.empty(len(queries), k, dtype=torch.int64)
    with progress_bar(len(queries), "neighbors", progress) as bar:
        for start in range(0, len(queries), batch_size):
            part = slice(start, start + batch_size)
            query = queries.rows(part)
            table[part] = retriever.retrieve(query, database, k).indices
            bar.update(len(query))
    return table
