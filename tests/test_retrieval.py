"""Retrievers, proposals and neighbor tables: contracts, brute-force oracles, statistics, errors."""

import dataclasses
import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from parts import HashingEncoder
from retrievers import MERGING, PHRASING, RETRIEVERS
from safetensors import safe_open

from retrodiff.interfaces import Neighbors, Query, Retriever, unit
from retrodiff.randomness import Randomness, normal
from retrodiff.retrieval import (
    Diverse,
    ExcludeDuplicates,
    ExcludeGroup,
    ExcludeSelf,
    MaxSimilarity,
    MultiQuery,
    NearestNeighbors,
    NeighborCounts,
    RandomOfTop,
    ReciprocalRankFusion,
    TopM,
    Uniform,
    neighbor_table,
    open_neighbor_table,
)
from retrodiff.testing import check_proposal, check_retriever, small_database


@pytest.mark.parametrize("retriever", [*RETRIEVERS, *MERGING, *PHRASING], ids=repr)
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


def test_exclude_duplicates_leaves_out_what_is_too_near():
    database = small_database()
    query = Query(database.embeddings(torch.tensor([3, 9])))
    plain = NearestNeighbors().retrieve(query, database, 6)
    threshold = float(plain.similarity[:, 1].max()) + 1e-3  # between copies and other rows
    found = ExcludeDuplicates(NearestNeighbors(), threshold).retrieve(query, database, 5)
    assert torch.equal(found.indices, plain.indices[:, 1:])


# --- regions, and several queries for one image ------------------------------------------------


@pytest.mark.parametrize(
    "retriever",
    [
        NearestNeighbors(),
        Diverse(NearestNeighbors(), 0.5, 10),
        ExcludeSelf(NearestNeighbors()),
        ExcludeGroup(NearestNeighbors(), "label"),
        ExcludeDuplicates(NearestNeighbors(), 0.6),
        Diverse(ExcludeSelf(NearestNeighbors()), 0.5, 10),
    ],
    ids=repr,
)
def test_each_region_gets_the_neighbors_of_its_own_query(retriever):
    database = small_database()
    regions = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([5, -1, 9])
    found = retriever.retrieve(Query(regions, ids=ids), database, 3)
    assert found.indices.shape == found.similarity.shape == (3, 4, 3)
    assert torch.equal(found.embeddings, database.embeddings(found.indices))
    for r in range(4):
        alone = retriever.retrieve(Query(regions[:, r], ids=ids), database, 3)
        assert torch.equal(found.indices[:, r], alone.indices)


def test_random_of_top_draws_for_each_region():
    database = small_database()
    regions = torch.randn(1, 1, 8).expand(50, 4, -1)
    query = Query(regions, generator=torch.Generator().manual_seed(0))
    found = RandomOfTop(NearestNeighbors(), 8).retrieve(query, database, 3)
    top = set(database.search(Query(regions[:1, 0]), 8).indices[0].tolist())
    assert set(found.indices.flatten().tolist()) == top
    assert any(len({tuple(row) for row in image}) > 1 for image in found.indices.tolist())


def test_regions_end_to_end(model):
    """Query (b, r, d) -> neighbors (b, r, k) -> tokens (b, r, k, d) -> blocks of the latent."""
    regions = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    ask = {"mode": "neighbors", "k": 2, "progress": False}
    out = model.sample(query=Query(regions), **ask)
    found = model.database.search(Query(regions), 2)
    assert torch.equal(out.neighbors.indices, found.indices)
    assert [len(records) for records in out.neighbors.records] == [8, 8]
    for records, rows in zip(out.neighbors.records, found.indices, strict=True):
        assert [r["file"] for r in records] == [f"{row}.png" for row in rows.flatten().tolist()]
    noise = normal(Randomness.of(0, range(2), "noise"), (2, *model.denoiser.shape))
    by_hand = model.sample_latents(context=found.embeddings, noise=noise)
    torch.testing.assert_close(out.latents, by_hand)
    everywhere = model.sample(query=Query(regions[:, :1].expand(-1, 4, -1)), **ask)
    plain = model.sample(query=Query(regions[:, 0]), **ask)
    torch.testing.assert_close(everywhere.latents, plain.latents)  # the same in every region
    assert not torch.allclose(out.latents, plain.latents)
    # A prompt for every region: each is its own first token.
    words = model.sample(query=Query(regions), mode="text+neighbors", k=3, progress=False)
    assert words.neighbors.indices.shape == (2, 4, 3)
    assert bool((words.neighbors.indices[..., 0] == -1).all())
    assert torch.equal(words.neighbors.indices[..., 1:], found.indices)
    single = model.sample(query=Query(regions), mode="text", progress=False)
    assert torch.equal(single.neighbors.embeddings, regions.unsqueeze(2))


def test_several_queries_end_to_end(model):
    encoder, database = model.encoder, model.database
    merge = ReciprocalRankFusion(NearestNeighbors(), 10)
    several = torch.stack([encoder.encode_text(["a", "b", "c"]), encoder.encode_text(["d"] * 3)])
    ask = {"mode": "neighbors", "progress": False}
    out = model.replace(retriever=merge).sample(query=Query(several), **ask)
    assert torch.equal(out.neighbors.indices, merge.retrieve(Query(several), database, 4).indices)
    wide = MultiQuery(merge, encoder, ["a drawing of {}", "{} in the snow"])
    for mode, own in (("text+neighbors", 1), ("neighbors", 0), ("class", 0)):
        asked = {"classes" if mode == "class" else "prompts": ["dog", "cat"]}
        out = model.replace(retriever=wide).sample(**asked, mode=mode, progress=False)
        assert out.neighbors.indices.shape == (2, 4)
        if own:
            assert torch.equal(out.neighbors.embeddings[:, 0], encoder.encode_text(["dog", "cat"]))
        if mode != "class":
            text = [
                ["dog", "a drawing of dog", "dog in the snow"],
                ["cat", "a drawing of cat", "cat in the snow"],
            ]
            queries = torch.stack([encoder.encode_text(some) for some in text])
            expected = merge.retrieve(Query(queries), database, 4 - own)
            assert torch.equal(out.neighbors.indices[:, own:], expected.indices)


def fused_by_hand(lists, top, constant):
    """Cormack et al. 2009: the sum over lists of 1 / (constant + rank)."""
    scores = Counter()
    for rows in lists:
        for rank, row in enumerate(rows[:top], 1):
            scores[row] += 1 / (constant + rank)
    return scores


def test_reciprocal_rank_fusion_is_the_papers_sum():
    database = small_database(rows=60)
    queries = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(4))
    found = ReciprocalRankFusion(NearestNeighbors(), 12).retrieve(Query(queries), database, 6)
    lists = database.search(Query(queries), 12).indices.tolist()
    assert found.indices.shape == (5, 6)
    for i, rows in enumerate(found.indices.tolist()):
        scores = fused_by_hand(lists[i], 12, 60)
        mine = [scores[row] for row in rows]
        assert len(set(rows)) == 6
        assert mine == pytest.approx(sorted(scores.values(), reverse=True)[:6])
        assert max(scores[row] for row in set(scores) - set(rows)) <= min(mine) + 1e-12
    cosine = unit(queries) @ unit(found.embeddings).mT
    torch.testing.assert_close(found.similarity, cosine.amax(1), rtol=0, atol=5e-3)
    assert torch.equal(found.embeddings, database.embeddings(found.indices))


def test_max_similarity_is_the_nearest_to_any_query():
    database = small_database(rows=60)
    queries = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(4))
    found = MaxSimilarity(NearestNeighbors(), 6).retrieve(Query(queries), database, 6)
    rows = unit(database.embeddings(torch.arange(60)))
    expected = (unit(queries) @ rows.T).amax(1).topk(6)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.similarity, expected.values, rtol=0, atol=5e-3)


@pytest.mark.parametrize("merge", [ReciprocalRankFusion, MaxSimilarity])
def test_merging_one_list_or_the_same_twice_changes_nothing(merge):
    database = small_database()
    query = Query(torch.randn(4, 8, generator=torch.Generator().manual_seed(2)))
    plain = NearestNeighbors().retrieve(query, database, 5)
    for several in (query.embedding, query.embedding[:, None].expand(-1, 3, -1)):
        found = merge(NearestNeighbors(), 9).retrieve(Query(several), database, 5)
        assert torch.equal(found.indices, plain.indices)
    for top in (2, 1000):  # fewer than k, and more than there are
        found = merge(NearestNeighbors(), top).retrieve(Query(several), database, 5)
        assert torch.equal(found.indices, plain.indices)
    with pytest.raises(ValueError, match=r"expected \(b, q, d\)"):
        merge(NearestNeighbors(), 9).retrieve(Query(several[:, None]), database, 5)


def test_several_queries_are_no_tokens_beside_their_neighbors(model):
    model = model.replace(retriever=ReciprocalRankFusion(NearestNeighbors(), 10))
    query = Query(torch.randn(2, 3, 8))
    options = {"query": query, "k": 4, "steps": 1, "progress": False}
    assert model.sample(mode="neighbors", **options).neighbors.indices.shape == (2, 4)
    with pytest.raises(ValueError, match=r"merges the several queries.*mode='neighbors'"):
        model.sample(mode="text+neighbors", **options)


def test_multi_query_asks_with_every_phrasing_and_leaves_other_queries_alone():
    database, encoder = small_database(), HashingEncoder()
    merge = ReciprocalRankFusion(NearestNeighbors(), 10)
    image = torch.randn(8, generator=torch.Generator().manual_seed(7))
    prompts = ("a dog", "image 1", "a cat", "a dog")
    embedding = encoder.encode_text(prompts)
    embedding[1] = image  # as in mode "image": the source is a name, not a text
    templates = ["a painting of {}", "{}, at night"]
    found = MultiQuery(merge, encoder, templates).retrieve(Query(embedding, prompts), database, 4)
    for i in (0, 2, 3):
        texts = [prompts[i], f"a painting of {prompts[i]}", f"{prompts[i]}, at night"]
        expected = merge.retrieve(Query(encoder.encode_text(texts)[None]), database, 4)
        assert torch.equal(found.indices[i], expected.indices[0])
    assert torch.equal(found.indices[1], database.search(Query(image[None]), 4).indices[0])
    by_function = MultiQuery(merge, encoder, lambda prompt: [f"a painting of {prompt}"])
    assert by_function.expand(Query(embedding, prompts)).embedding.shape == (4, 2, 8)


def test_multi_query_rephrases_prompts_only():
    """The user's function is not shown what is no prompt, and may be unable to take it."""
    encoder, shown = HashingEncoder(), []

    def phrasings(prompt):
        assert prompt.startswith("a "), "a name of an image or of a row"
        shown.append(prompt)
        return [f"{prompt} in the snow"]

    wide = MultiQuery(ReciprocalRankFusion(NearestNeighbors(), 10), encoder, phrasings)
    images = torch.randn(2, 8, generator=torch.Generator().manual_seed(7))
    for sources in (("image 0", "image 1"), ("row 5", "row 6"), ("", "")):
        query = Query(images, sources)
        assert wide.expand(query) is query
    assert shown == []
    embedding = torch.cat([images[:1], encoder.encode_text(["a dog", "a cat", "a dog"])])
    several = wide.expand(Query(embedding, ("image 0", "a dog", "a cat", "a dog"))).embedding
    assert shown == ["a dog", "a cat"]
    snow = encoder.encode_text([f"a {animal} in the snow" for animal in ("dog", "cat", "dog")])
    expected = torch.stack([embedding, torch.cat([images[:1], snow])], 1)
    torch.testing.assert_close(several, expected)
    nothing = MultiQuery(wide.retriever, encoder, []).expand(Query(embedding, ("a",) * 4))
    assert nothing.embedding.ndim == 2  # no source is a text here
    empty = Query(torch.zeros(0, 8))
    assert wide.expand(empty) is empty


@pytest.mark.parametrize("merge", [ReciprocalRankFusion, MaxSimilarity])
def test_a_top_that_exclusion_leaves_no_room_for_is_named(merge):
    database = small_database(rows=40)
    several = database.embeddings(torch.tensor([[0, 1], [2, 3]]))
    query = Query(several, ids=torch.tensor([0, 2]))
    assert merge(ExcludeSelf(NearestNeighbors()), 39).retrieve(query, database, 4).k == 4
    with pytest.raises(ValueError, match=r"^top=100: 40 rows .*lower top, to k=4 or more") as error:
        merge(ExcludeSelf(NearestNeighbors()), 100).retrieve(query, database, 4)
    assert "\n" not in str(error.value)
    # What is not about top is not put down to it.
    with pytest.raises(ValueError, match=r"^k=40 neighbors were asked for"):
        merge(ExcludeSelf(NearestNeighbors()), 10).retrieve(query, database, 40)
    with pytest.raises(ValueError, match=r"^k=4 neighbors were asked for"):
        merge(ExcludeDuplicates(NearestNeighbors(), -1.0), 10).retrieve(query, database, 4)


def test_multi_query_says_what_it_cannot_use():
    encoder, merge = HashingEncoder(), ReciprocalRankFusion(NearestNeighbors(), 10)
    for bad in ("a {}", ["a photo"]):
        with pytest.raises(ValueError, match=r"templates is taken, each with \{\}"):
            MultiQuery(merge, encoder, bad)
    ragged = MultiQuery(merge, encoder, lambda prompt: [prompt] * len(prompt))
    with pytest.raises(ValueError, match=r"1 texts for one prompt and 2 for another"):
        ragged.expand(Query(encoder.encode_text(["a", "bb"]), ("a", "bb")))


# --- neighbor tables ---------------------------------------------------------------------------


def test_table_is_the_neighbors_whatever_the_batch():
    database = small_database()
    queries = Query(torch.randn(23, 8), source=tuple(map(str, range(23))))
    table = neighbor_table(queries, database, 3, NearestNeighbors(), batch_size=5)
    assert table.dtype == torch.int32
    assert torch.equal(table.long(), database.search(queries, 3).indices)
    regions = Query(torch.randn(7, 4, 8))
    table = neighbor_table(regions, database, 3, NearestNeighbors(), batch_size=5)
    assert torch.equal(table.long(), database.search(regions, 3).indices)


DRAWN = RandomOfTop(NearestNeighbors(), 8)
ASKED = Query(torch.randn(23, 8, generator=torch.Generator().manual_seed(0)))


def table_in(path, database=None, queries=ASKED, k=3, retriever=DRAWN, **options):
    database = database or small_database()
    return neighbor_table(queries, database, k, retriever, path=path, batch_size=5, **options)


def test_a_table_in_a_file_is_the_one_in_memory(tmp_path):
    path, database = tmp_path / "folder" / "n.safetensors", small_database()
    table = table_in(path)
    assert torch.equal(table, table_in(None))
    assert table.dtype == torch.int32
    assert [p.name for p in path.parent.iterdir()] == ["n.safetensors"]
    assert path.stat().st_size < 23 * 3 * 4 + 1500
    assert torch.equal(open_neighbor_table(path, database), table)
    assert torch.equal(open_neighbor_table(path, database, 2), table[:, :2])
    assert not torch.equal(table, table_in(None, seed=1))


def test_rows_beyond_31_bits_are_kept_whole(tmp_path):
    class Huge:
        fingerprint = small_database().fingerprint

        def __len__(self):
            return 2**31 + 1

        def search(self, query, k):
            rows = torch.full((len(query), k), 2**31)
            return Neighbors(rows, torch.ones(rows.shape), torch.zeros(*rows.shape, 8))

    table = table_in(tmp_path / "n", Huge(), retriever=NearestNeighbors())
    assert table.dtype == torch.int64
    assert bool((table == 2**31).all())


def test_a_table_killed_at_any_moment_is_finished_to_the_same_bytes(tmp_path):
    """What a killed process leaves is a prefix of the file, and of its batches' hashes."""
    table_in(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    blank = whole.replace(
        safe_open(tmp_path / "whole", "pt").metadata()["sha256"].encode(), b"0" * 64
    )
    ends = [header + min(5 * i, 23) * 3 * 4 for i in range(1, 6)]
    hashes = [f"{hashlib.sha256(blank[:end]).hexdigest()}\n" for end in ends]
    asked = []

    class Asked(Retriever):
        def retrieve(self, query, database, k):
            asked.append(len(query))
            return DRAWN.retrieve(query, database, k)

        def __repr__(self):
            return repr(DRAWN)

    data = range(header, len(whole) + 1)
    for length in [0, 4, 8, header - 1, *data[::7], len(whole)]:
        path = tmp_path / "killed"
        logged = sum(end <= length for end in ends)
        (tmp_path / "killed.partial").write_bytes((blank, whole)[length == len(whole)][:length])
        (tmp_path / "killed.batches.partial").write_text("".join(hashes[:logged]))
        asked.clear()
        table_in(path, retriever=Asked(), resume=True)
        assert path.read_bytes() == whole
        assert sum(asked) == 23 - min(5 * logged, 23)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]
        path.unlink()


def test_a_table_after_kill_9_is_finished_to_the_same_bytes(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(__import__("pathlib").Path(__file__).parent)!r})
from test_retrieval import DRAWN, Retriever, table_in
class Killed(Retriever):
    count = 0
    def retrieve(self, query, database, k):
        Killed.count += 1
        if Killed.count == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return DRAWN.retrieve(query, database, k)
    def __repr__(self):
        return repr(DRAWN)
table_in(__import__("pathlib").Path({str(tmp_path / "killed")!r}), retriever=Killed())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "killed.batches.partial",
        "killed.partial",
    ]
    table_in(tmp_path / "killed", resume=True)
    table_in(tmp_path / "whole")
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_table_of_something_else_is_refused(tmp_path):
    path, other = tmp_path / "n", small_database(seed=1)
    with pytest.raises(FileNotFoundError):
        open_neighbor_table(path, small_database())
    table_in(path)
    kept = path.read_bytes()
    with pytest.raises(ValueError, match=r"another database, database\.\w+="):
        open_neighbor_table(path, other)
    with pytest.raises(ValueError, match=r"k=4 neighbors are wanted.*k=3"):
        open_neighbor_table(path, small_database(), 4)
    changes = {
        "k='3', now k='4'": {"k": 4},
        "database": {"database": other},
        "queries": {"queries": Query(ASKED.embedding + 1)},
        "retriever": {"retriever": NearestNeighbors()},
        "seed": {"seed": 1},
    }
    for what, change in changes.items():
        with pytest.raises(ValueError, match=what):
            table_in(path, resume=True, **change)
    (tmp_path / "m.partial").write_bytes(kept[:-20])
    with pytest.raises(ValueError, match=r"m\.partial was made with seed='0', now seed='1'"):
        table_in(tmp_path / "m", resume=True, seed=1)
    with pytest.raises(FileExistsError, match=r"unfinished.*resume=True"):
        table_in(tmp_path / "m")
    with pytest.raises(FileExistsError, match=r"exists.*resume=True.*overwrite=True"):
        table_in(path)
    assert path.read_bytes() == kept
    table_in(path, overwrite=True, seed=1)
    assert path.read_bytes() != kept
    path.write_bytes(kept[:-1])
    with pytest.raises(ValueError, match=r"damaged or no file of tensors"):
        open_neighbor_table(path, small_database())


def test_a_table_is_written_by_one_process_at_a_time(tmp_path):
    class Second(Retriever):
        def retrieve(self, query, database, k):
            with pytest.raises(BlockingIOError, match=r"being written by another process"):
                table_in(tmp_path / "n", resume=True)
            return DRAWN.retrieve(query, database, k)

    table_in(tmp_path / "n", retriever=Second())


def test_a_retriever_of_the_wrong_shape_is_named(tmp_path):
    class Few(Retriever):
        def retrieve(self, query, database, k):
            return database.search(query, k - 1)

    with pytest.raises(ValueError, match=r"shape \(5, 2\), expected \(5, 3\)"):
        table_in(tmp_path / "n", retriever=Few())


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


class Wide:
    """A database of more rows than torch.multinomial takes, all alike."""

    fingerprint = small_database().fingerprint
    rows = 2**24 + 3

    def __len__(self):
        return self.rows

    def embeddings(self, indices):
        return torch.zeros(*indices.shape, 8)


def test_more_rows_than_torch_multinomial_takes():
    database, generator = Wide(), torch.Generator().manual_seed(0)
    rows = len(database)
    drawn = Uniform().propose(database, 1000, generator).ids
    assert int(drawn.max()) < rows
    assert abs(float(drawn.double().mean()) / rows - 0.5) < 0.06
    # Every row once, the last ones twice more: a support of more than 2^24 rows.
    last = torch.arange(rows - 5, rows, dtype=torch.int32)
    table = torch.cat([torch.arange(rows, dtype=torch.int32), last, last, last[:1]]).view(-1, 2)
    counts = NeighborCounts.from_table(table, database)
    assert len(counts.rows) == rows
    assert int(counts.counts.sum()) == table.numel()
    drawn = counts.propose(database, 1000, generator).ids
    assert abs(float(drawn.double().mean()) / rows - 0.5) < 0.06
    kept, weights = TopM(counts, rows=6, weighted=True).support(database)
    assert kept.tolist() == [rows - 5, rows - 4, rows - 3, rows - 2, rows - 1, 0]
    assert weights.tolist() == [4, 3, 3, 3, 3, 1]
    kept, weights = TopM(counts, fraction=0.5).support(database)
    assert len(kept) == round(rows / 2)
    assert int(kept[5:].max()) == len(kept) - 6  # ties go to the lower rows
    assert bool((weights == 1).all())


def test_counts_beyond_float32_are_exact():
    """2^24 + 1 is no float32: as one, the heavier row would tie with the lighter."""
    database = small_database()
    heavy = torch.tensor([2**24, 2**24 + 1, 2**40, 2**40 + 1])
    proposal = NeighborCounts(torch.tensor([2, 5, 7, 11]), heavy, database.fingerprint)
    _, weights = proposal.support(database)
    assert weights.long().tolist() == heavy.tolist()
    kept, weights = TopM(proposal, rows=3, weighted=True).support(database)
    assert kept.tolist() == [11, 7, 5]
    assert weights.long().tolist() == [2**40 + 1, 2**40, 2**24 + 1]


def test_top_m_has_the_order_of_a_stable_sort():
    database = small_database()
    generator = torch.Generator().manual_seed(0)
    for m in range(1, 33):
        counts = torch.randint(1, 6, (32,), generator=generator)
        proposal = NeighborCounts(torch.arange(32), counts, database.fingerprint)
        kept, _ = TopM(proposal, rows=m).support(database)
        assert kept.tolist() == sorted(range(32), key=lambda row: (-int(counts[row]), row))[:m]


def test_a_table_with_rows_that_do_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"row 32 of a database of 32 rows"):
        NeighborCounts.from_table(torch.tensor([[0, 32]]), small_database())
    with pytest.raises(ValueError, match=r"table is empty, \(3, 0\): .* NeighborCounts\.fit"):
        NeighborCounts.from_table(torch.empty(3, 0, dtype=torch.int64), small_database())


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


@pytest.mark.parametrize(
    "retriever",
    [
        ExcludeSelf(NearestNeighbors()),
        ExcludeGroup(NearestNeighbors(), "label"),
        Diverse(ExcludeSelf(NearestNeighbors()), 0.5, 10),
        MaxSimilarity(ExcludeSelf(NearestNeighbors()), 5),
    ],
    ids=repr,
)
def test_queries_without_ids_are_refused_where_ids_matter(retriever, model):
    """They were searched as if nothing were excluded: an image conditioned its own training."""
    database = small_database()
    query = Query(database.embeddings(torch.tensor([0, 1])))
    name = "ExcludeGroup" if "Group" in repr(retriever) else "ExcludeSelf"
    with pytest.raises(ValueError, match=f"{name} leaves out .*has no ids: give Query") as error:
        retriever.retrieve(query, database, 3)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"{name} leaves out"):
        neighbor_table(query, database, 3, retriever)
    new = retriever.retrieve(dataclasses.replace(query, ids=torch.tensor([-1, 1])), database, 3)
    assert 0 in new.indices[0].tolist()
    assert 1 not in new.indices[1].tolist()
    # A prompt or a picture is no row; a drawn row is one.
    asking = model.replace(retriever=retriever, proposal=Uniform())
    assert asking.sample(prompts=["a"], k=3).neighbors.k == 3
    out = asking.sample(n=5, k=3)
    for row, found in zip(out.query.ids.tolist(), out.neighbors.indices.tolist(), strict=True):
        assert row not in found
    with pytest.raises(ValueError, match="has no ids"):
        asking.sample(query=Query(torch.randn(1, 8)))


def test_how_far_one_query_has_to_look_changes_nothing_for_another():
    database = small_database(rows=40, dim=8)
    near = database.embeddings(torch.tensor([3]))
    queries = torch.cat([near, -near, torch.randn(3, 8)])
    for retriever in (
        ExcludeDuplicates(RandomOfTop(NearestNeighbors(), 40), 0.0),
        ExcludeGroup(NearestNeighbors(), "label"),
        ExcludeSelf(RandomOfTop(NearestNeighbors(), 20)),
    ):
        ids = torch.tensor([3, -1, 5, 6, -1])

        def ask(rows, retriever=retriever, ids=ids):
            seeded = Randomness.of(0, rows, "retrieval")
            query = Query(queries[rows], ids=ids[rows], generator=seeded)
            return retriever.retrieve(query, database, 4)

        whole = ask(list(range(5)))
        for row in range(5):
            alone = ask([row])
            assert torch.equal(alone.indices[0], whole.indices[row])
            assert torch.equal(alone.embeddings[0], whole.embeddings[row])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Diverse(NearestNeighbors(), 1.5, 5), "diversity=1.5"),
        (lambda: Diverse(NearestNeighbors(), float("nan"), 5), "diversity=nan"),
        (lambda: Diverse(NearestNeighbors(), 0.5, 0), "top=0"),
        (lambda: RandomOfTop(NearestNeighbors(), 0), "top=0: give a whole number, at least 1"),
        (lambda: RandomOfTop(NearestNeighbors(), 2.5), "top=2.5"),
        (lambda: ExcludeDuplicates(NearestNeighbors(), float("nan")), "threshold=nan"),
        (lambda: ExcludeDuplicates(NearestNeighbors(), 95), "threshold=95: give .*at most 1"),
        (lambda: ReciprocalRankFusion(NearestNeighbors(), 5, -1.0), "constant=-1.0"),
        (lambda: ReciprocalRankFusion(NearestNeighbors(), 0), "top=0"),
        (lambda: MaxSimilarity(NearestNeighbors(), -1), "top=-1"),
        (lambda: TopM(Uniform(), fraction=float("nan")), "fraction=nan"),
        (lambda: neighbor_table(ASKED, small_database(), 0, NearestNeighbors()), "k=0"),
        (
            lambda: neighbor_table(ASKED, small_database(), 2, NearestNeighbors(), batch_size=0),
            "batch_size=0",
        ),
        (
            lambda: neighbor_table(ASKED, small_database(), 2, NearestNeighbors(), seed=-1),
            "seed=-1",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
