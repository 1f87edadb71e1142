"""Retrievers, proposals and neighbor tables: contracts, brute-force oracles, statistics, errors."""

import numpy as np
import pytest
import torch

from retrodiff.interfaces import Neighbors, Query, Retriever, unit
from retrodiff.retrieval import (
    Diverse,
    ExcludeDuplicates,
    ExcludeGroup,
    ExcludeSelf,
    NearestNeighbors,
    NeighborCounts,
    RandomOfTop,
    TopM,
    Uniform,
    neighbor_table,
)
from retrodiff.testing import check_proposal, check_retriever, small_database

RETRIEVERS = [
    NearestNeighbors(),
    RandomOfTop(NearestNeighbors(), 8),
    Diverse(NearestNeighbors(), 0.5, 10),
    ExcludeSelf(NearestNeighbors()),
    ExcludeGroup(NearestNeighbors(), "label"),
    ExcludeDuplicates(NearestNeighbors(), 0.99),
]


@pytest.mark.parametrize("retriever", RETRIEVERS, ids=repr)
def test_contract(retriever):
    check_retriever(retriever)


def test_contract_catches_a_retriever_that_repeats_a_row():
    class Stuck(Retriever):
        def retrieve(self, query, database, k):
            return database.search(query, 1).take(torch.zeros(k, dtype=torch.int64))

    with pytest.raises(AssertionError, match=r"distinct"):
        check_retriever(Stuck())


def test_contract_catches_neighbors_leaking_between_prompts():
    class Leaking(Retriever):
        def retrieve(self, query, database, k):
            found = database.search(query, k)
            return found.rows(torch.zeros(len(query), dtype=torch.int64))

    with pytest.raises(AssertionError):
        check_retriever(Leaking())


def test_a_subclass_without_its_method_cannot_be_made():
    class Forgetful(Retriever):
        pass

    with pytest.raises(TypeError, match=r"retrieve"):
        Forgetful()


def test_nearest_neighbors_are_those_of_scikit_learn():
    from sklearn.neighbors import NearestNeighbors as Oracle

    database = small_database(rows=200)
    rows = database.embeddings(torch.arange(200))
    queries = torch.randn(10, 8, generator=torch.Generator().manual_seed(3))
    found = NearestNeighbors().retrieve(Query(queries), database, 5)
    oracle = Oracle(n_neighbors=5, metric="cosine").fit(rows.numpy())
    distance, indices = oracle.kneighbors(queries.numpy())
    assert np.array_equal(found.indices.numpy(), indices)
    assert np.allclose(found.similarity.numpy(), 1 - distance, atol=1e-3)


def test_exclude_self_leaves_out_only_ones_own_row():
    database = small_database()
    query = Query(database.embeddings(torch.tensor([3, 5, 9])), ids=torch.tensor([3, -1, 9]))
    plain = NearestNeighbors().retrieve(query, database, 4)
    found = ExcludeSelf(NearestNeighbors()).retrieve(query, database, 3)
    assert torch.equal(found.indices[0], plain.indices[0, 1:])
    assert torch.equal(found.indices[1], plain.indices[1, :3])
    assert int(found.indices[1, 0]) == 5
    assert torch.equal(found.indices[2], plain.indices[2, 1:])


def test_exclude_group_leaves_out_the_whole_group():
    database = small_database()
    query = Query(database.embeddings(torch.tensor([3])), ids=torch.tensor([3]))
    found = ExcludeGroup(NearestNeighbors(), "label").retrieve(query, database, 24)
    assert {record["label"] for record in database.records(found.indices[0])} == {"0", "1", "2"}
    with pytest.raises(ValueError, match=r"k=25.*24 of the database's 32"):
        ExcludeGroup(NearestNeighbors(), "label").retrieve(query, database, 25)
    with pytest.raises(ValueError, match=r"'author'.*file, label"):
        ExcludeGroup(NearestNeighbors(), "author").retrieve(query, database, 2)


def test_diverse_without_diversity_is_nearest_and_with_it_is_spread():
    database = small_database(rows=200)
    query = Query(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    nearest = NearestNeighbors().retrieve(query, database, 5)
    same = Diverse(NearestNeighbors(), 0.0, 30).retrieve(query, database, 5)
    assert torch.equal(same.indices, nearest.indices)
    spread = Diverse(NearestNeighbors(), 0.7, 30).retrieve(query, database, 5)

    def mean_similarity(found):
        rows = unit(found.embeddings)
        return float((rows @ rows.mT).mean())

    assert mean_similarity(spread) < mean_similarity(nearest)
    assert torch.equal(spread.indices[:, 0], nearest.indices[:, 0])


def test_random_of_top_draws_all_top_rows_alike():
    database = small_database()
    embedding = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).expand(3000, -1)
    query = Query(embedding, generator=torch.Generator().manual_seed(1))
    found = RandomOfTop(NearestNeighbors(), 10).retrieve(query, database, 2)
    top = NearestNeighbors().retrieve(query.rows(slice(0, 1)), database, 10).indices[0]
    counts = torch.bincount(found.indices.flatten(), minlength=32)
    assert int(counts.sum()) == int(counts[top].sum()) == 6000
    assert float((counts[top] - 600).abs().max()) < 6 * 600**0.5
    with pytest.raises(ValueError, match=r"top=3 rows are fewer than k=4"):
        RandomOfTop(NearestNeighbors(), 3).retrieve(query, database, 4)


def test_table_is_the_neighbors_whatever_the_batch():
    database = small_database()
    queries = Query(torch.randn(23, 8), source=tuple(map(str, range(23))))
    table = neighbor_table(queries, database, 3, NearestNeighbors(), batch_size=5)
    assert torch.equal(table, database.search(queries, 3).indices)


# --- proposals ---------------------------------------------------------------------------------


def fitted(database, n=300, k=4):
    queries = torch.randn(n, 8, generator=torch.Generator().manual_seed(5))
    return NeighborCounts.fit(Query(queries), database, k)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda p: p,
        lambda p: TopM(p, fraction=0.3),
        lambda p: TopM(p, rows=5),
        lambda p: TopM(p, rows=5, weighted=True),
    ],
)
def test_proposal_contract(wrap):
    database = small_database()
    check_proposal(wrap(fitted(database)), database)
    check_proposal(wrap(Uniform()), database)


def test_counts_are_the_papers_distribution():
    database = small_database()
    proposal = fitted(database)
    table = neighbor_table(
        Query(torch.randn(300, 8, generator=torch.Generator().manual_seed(5))),
        database,
        4,
        NearestNeighbors(),
    )
    rows, weights = proposal.support(database)
    assert float(weights.sum()) == 4 * 300
    for row, weight in zip(rows.tolist(), weights.tolist(), strict=True):
        assert weight == int((table == row).sum())


def test_top_m_keeps_the_heaviest_of_the_support():
    database = small_database(rows=64)
    proposal = fitted(database, n=10)
    rows, weights = proposal.support(database)
    assert len(rows) < 64
    kept, uniform = TopM(proposal, fraction=0.25).support(database)
    assert len(kept) == round(0.25 * len(rows))  # of the support, not of the database
    assert bool((uniform == 1).all())
    lightest = weights[torch.isin(rows, kept)].min()
    assert bool((weights[~torch.isin(rows, kept)] <= lightest).all())


@pytest.mark.parametrize(
    "arguments",
    [{}, {"fraction": 0.1, "rows": 3}, {"fraction": 0.0}, {"fraction": 1.5}, {"rows": 0}],
)
def test_top_m_takes_exactly_one_sensible_bound(arguments):
    with pytest.raises(ValueError, match=r"fraction|rows|row"):
        TopM(Uniform(), **arguments)


def test_a_fitted_proposal_refuses_another_database():
    proposal = fitted(small_database())
    with pytest.raises(ValueError, match=r"another database.*NeighborCounts.fit.*Uniform"):
        proposal.propose(small_database(rows=33), 2, torch.Generator())


def test_a_saved_proposal_is_the_same(tmp_path):
    database = small_database()
    proposal = fitted(database)
    proposal.save(tmp_path / "p.safetensors")
    again = NeighborCounts.load(tmp_path / "p.safetensors")
    assert again.fingerprint == proposal.fingerprint
    assert torch.equal(again.rows, proposal.rows)
    assert torch.equal(again.counts, proposal.counts)
    assert [f.name for f in tmp_path.iterdir()] == ["p.safetensors"]


def test_more_rows_than_torch_multinomial_takes():
    rows = 2**24 + 3

    class Wide:
        fingerprint = small_database().fingerprint

        def __len__(self):
            return rows

        def embeddings(self, indices):
            return torch.zeros(*indices.shape, 8)

    drawn = Uniform().propose(Wide(), 1000, torch.Generator().manual_seed(0)).ids
    assert int(drawn.max()) < rows
    assert abs(float(drawn.double().mean()) / rows - 0.5) < 0.06


# --- values ------------------------------------------------------------------------------------


def test_neighbors_take_rows_and_join():
    database = small_database()
    found = database.search(Query(torch.randn(3, 8)), 5)
    described = Neighbors(
        found.indices,
        found.similarity,
        found.embeddings,
        tuple(tuple({"row": j} for j in row) for row in found.indices.tolist()),
    )
    taken = described.take(torch.tensor([4, 0]))
    assert torch.equal(taken.indices, found.indices[:, [4, 0]])
    assert torch.equal(taken.embeddings, found.embeddings[:, [4, 0]])
    assert taken.records[1][0]["row"] == int(found.indices[1, 4])
    some = described.rows(torch.tensor([2, 0]))
    assert [r[0]["row"] for r in some.records] == found.indices[[2, 0], 0].tolist()
    joined = Neighbors.cat([found.take(torch.tensor([0])), found.take(torch.tensor([1, 2]))])
    assert torch.equal(joined.indices, found.indices[:, :3])
