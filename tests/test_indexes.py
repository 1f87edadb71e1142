"""Indexes: the exact one against float64 brute force and faiss, the others against it."""

import sys
import types

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodiff.indexes import (
    Annoy,
    Exact,
    Faiss,
    USearch,
    Vectors,
    load_index,
    recall_of,
    recipe_from_string,
    save_index,
)
from retrodiff.indexes import annoy as annoy_module
from retrodiff.interfaces import Index

APPROXIMATE = [Annoy(trees=20, components=16), USearch(), Faiss("HNSW16"), Faiss("IVF8,Flat")]


def clustered(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(rows // 50 + 1, dim, generator=g)
    which = torch.randint(len(centers), (rows,), generator=g)
    return (centers[which] + 0.5 * torch.randn(rows, dim, generator=g)).half()


def brute_force(stored: torch.Tensor, queries: torch.Tensor, k: int, hidden=()):
    """Cosine in float64; ties (equal in float32) to the lowest row."""
    x, q = stored.double(), queries.double()
    x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    q = q / q.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosine = (q @ x.T).numpy().astype(np.float32)
    cosine[:, list(hidden)] = -np.inf
    rows = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosine, rows, 1), rows


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 400),
    dim=st.integers(1, 24),
    b=st.integers(1, 9),
    k=st.integers(1, 400),
    block=st.sampled_from([1, 7, 64, 100, 1024]),
    parts=st.integers(1, 4),
    coarse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_exact_is_brute_force(rows, dim, b, k, block, parts, coarse, seed):
    k = min(k, rows)
    g = torch.Generator().manual_seed(seed)
    stored = torch.randn(rows, dim, generator=g)
    if coarse:  # many rows are the same, many are zero
        stored = stored.round()
    stored = stored.half()
    queries = torch.randn(b, dim, generator=g) * 7
    if coarse:
        queries = queries.round()
    index = Exact(block=block).build(Vectors([p for p in stored.chunk(parts) if len(p)]))
    similarity, found = index.search(queries, k)
    expected, expected_rows = brute_force(stored, queries, k)
    np.testing.assert_allclose(similarity.numpy(), expected, atol=2e-7)
    same = found.numpy() == expected_rows
    # Where they differ, both rows have the same cosine to the last bit or two of float32.
    gaps = np.abs(brute_force(stored, queries, rows)[0][:, :k] - similarity.numpy())
    assert (same | (gaps < 2e-7)).all()
    assert all(len(set(row)) == k for row in found.tolist())


def test_exact_gives_ties_to_the_lowest_row():
    stored = torch.tensor([[0.0, 1], [1, 0], [2, 0], [0.5, 0], [0, 3], [1, 0]]).half()
    for block in (1, 2, 4, 6):
        _, found = Exact(block=block).build(Vectors([stored])).search(torch.tensor([[4.0, 0]]), 4)
        assert found.tolist() == [[1, 2, 3, 5]]


def test_exact_survives_a_database_of_one_repeated_row():
    stored = torch.ones(5000, 8).half()
    similarity, found = Exact(block=512).build(Vectors([stored])).search(torch.ones(3, 8), 7)
    assert found.tolist() == [list(range(7))] * 3
    torch.testing.assert_close(similarity, torch.ones(3, 7))


def test_exact_agrees_with_faiss():
    stored, queries = clustered(3000, 64), torch.randn(40, 64)
    unit = stored.float() / stored.float().norm(dim=1, keepdim=True)
    flat = faiss.IndexFlatIP(64)
    flat.add(unit.numpy())
    query = queries / queries.norm(dim=1, keepdim=True)
    scores, rows = flat.search(query.numpy(), 20)
    similarity, found = Exact().build(Vectors([stored])).search(queries, 20)
    np.testing.assert_allclose(similarity.numpy(), scores, atol=1e-6)
    assert (found.numpy() == rows).mean() > 0.999


def test_exact_does_not_depend_on_batch_block_or_parts():
    stored, queries = clustered(2000, 32), torch.randn(50, 32)
    similarity, found = Exact().build(Vectors([stored])).search(queries, 10)
    for block, parts in ((64, 1), (300, 7), (8192, 3)):
        index = Exact(block).build(Vectors(list(stored.chunk(parts))))
        one = [index.search(q[None], 10) for q in queries]
        assert torch.equal(torch.cat([o[1] for o in one]), found)
        assert torch.equal(torch.cat([o[0] for o in one]), similarity)


def test_exact_passes_over_hidden_rows():
    stored, queries = clustered(500, 16), torch.randn(6, 16)
    hidden = torch.tensor([0, 3, 64, 65, 66, 499])
    _, found = Exact(block=64).build(Vectors([stored])).search(queries, 494, hidden)
    assert (found.numpy() == brute_force(stored, queries, 494, hidden.tolist())[1]).mean() > 0.99
    assert not set(found.flatten().tolist()) & set(hidden.tolist())
    with pytest.raises(ValueError, match=r"k=495 .* 494 rows"):
        Exact().build(Vectors([stored])).search(queries, 495, hidden)


def test_view_is_searched_like_a_copy():
    stored, queries = clustered(800, 16), torch.randn(5, 16)
    rows = torch.randperm(800)[:300]
    view = Vectors(list(stored.chunk(3))).select(rows)
    got = Exact(block=70).build(view).search(queries, 9)
    expected = Exact().build(Vectors([stored[rows]])).search(queries, 9)
    assert torch.equal(got[1], expected[1])
    assert torch.equal(view.rows(torch.tensor([5, 2])), stored[rows[[5, 2]]].float())


@pytest.mark.parametrize("recipe", [Exact(), *APPROXIMATE], ids=lambda r: str(r)[:24])
def test_refusals(recipe):
    index = recipe.build(Vectors([clustered(400, 16)]))
    with pytest.raises(ValueError, match="k=401 neighbors asked of 400 rows"):
        index.search(torch.randn(2, 16), 401)
    with pytest.raises(ValueError, match="width 16"):
        index.search(torch.randn(2, 17), 3)
    with pytest.raises(ValueError, match="k=0"):
        index.search(torch.randn(2, 16), 0)
    with pytest.raises(ValueError, match="NaN"):
        index.search(torch.full((1, 16), torch.nan), 1)


@pytest.mark.parametrize("recipe", APPROXIMATE, ids=lambda r: str(r)[:24])
def test_approximate_indexes(recipe, tmp_path):
    vectors = Vectors(list(clustered(2000, 32).chunk(3)))
    index = recipe.build(vectors)
    assert isinstance(index, Index)
    recall = recall_of(index, vectors, k=10, queries=100)
    assert recall.value >= 0.95
    queries = torch.randn(20, 32)
    similarity, found = index.search(queries, 10)
    truth = Exact().build(vectors).search(queries, 2000)
    # What is found has its exact cosine, and comes nearest first.
    true = torch.empty(20, 2000).scatter(1, truth[1], truth[0])
    torch.testing.assert_close(true.gather(1, found), similarity, atol=1e-6, rtol=0)
    assert (similarity.diff(dim=1) <= 0).all()

    save_index(index, recipe, tmp_path / "index", "abc", recall)
    again, recipe_again, recall_again = load_index(tmp_path / "index", vectors, "abc")
    assert (recipe_again, recall_again) == (recipe, recall)
    assert torch.equal(again.search(queries, 10)[1], found)
    with pytest.raises(ValueError, match="built from rows abc"):
        load_index(tmp_path / "index", vectors, "other")


def test_recall_sees_a_bad_index():
    vectors = Vectors([clustered(1000, 16)])

    class Blind(Index):
        def search(self, queries, k):
            return torch.zeros(len(queries), k), torch.arange(k).expand(len(queries), k)

    assert recall_of(Blind(), vectors).value < 0.2
    assert recall_of(Exact().build(vectors), vectors).value == 1


@pytest.fixture
def untested_annoy(monkeypatch):
    monkeypatch.setattr(annoy_module, "_works", None)


def test_broken_annoy_is_refused(monkeypatch, untested_annoy):
    from annoy import AnnoyIndex

    class OneNeighbor:
        def __init__(self, dim, metric):
            self.trees = AnnoyIndex(dim, metric)

        def __getattr__(self, name):
            return getattr(self.trees, name)

        def get_nns_by_vector(self, vector, n, search_k=-1):
            return self.trees.get_nns_by_vector(vector, 1, search_k)

    fake = types.ModuleType("annoy")
    fake.AnnoyIndex = OneNeighbor
    monkeypatch.setitem(sys.modules, "annoy", fake)
    with pytest.raises(ValueError, match=r"Exact\(\)"):
        Annoy().build(Vectors([clustered(100, 8)]))


@pytest.mark.parametrize(
    ("module", "recipe"), [("annoy", Annoy()), ("usearch.index", USearch()), ("faiss", Faiss())]
)
def test_missing_library_is_named(module, recipe, monkeypatch, untested_annoy):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"not installed.*Exact\(\)"):
        recipe.build(Vectors([clustered(100, 8)]))


def test_recipes_on_the_command_line():
    assert recipe_from_string("exact") == Exact()
    assert recipe_from_string("annoy:trees=7,rerank=99") == Annoy(trees=7, rerank=99)
    assert recipe_from_string("faiss:factory=IVF8,SQ8") == Faiss("IVF8,SQ8")
    with pytest.raises(ValueError, match="unknown index 'scan'"):
        recipe_from_string("scan")
    with pytest.raises(ValueError, match="no option 'leaves'"):
        recipe_from_string("annoy:leaves=3")
    with pytest.raises(ValueError, match="factory 'nonsense'"):
        Faiss("nonsense").build(Vectors([clustered(100, 8)]))
