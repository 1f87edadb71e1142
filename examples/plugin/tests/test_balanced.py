"""The contract of a retriever, and what this one adds."""

import torch
from retrodiff_balanced import Balanced

from retrodiff import Query
from retrodiff.databases import ArrayDatabase
from retrodiff.interfaces import Fingerprint
from retrodiff.testing import check_retriever


def test_it_keeps_the_promises_of_a_retriever():
    check_retriever(Balanced("label"))


def test_every_group_has_its_turn():
    embeddings = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    embeddings[:30] += 3 * torch.ones(8)  # the first group is nearest to the query, all of it
    records = [{"style": "a" if i < 30 else "b"} for i in range(40)]
    fingerprint = Fingerprint(encoder="random", weights="0", preprocessing="none", dim=8)
    database = ArrayDatabase(embeddings, fingerprint, records)
    query = Query(torch.ones(1, 8))

    def styles(retriever):
        found = retriever.retrieve(query, database, 4)
        return [record["style"] for record in database.records(found.indices[0])]

    assert sorted(styles(Balanced("style", reach=10))) == ["a", "a", "b", "b"]
