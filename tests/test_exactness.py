"""Exact search among rows that are hard to tell apart, of any norm, and under autocast."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodiff.indexes import Annoy, Exact, Faiss, USearch, Vectors, recipe_from_string
from retrodiff.indexes import exact as exact_module
from retrodiff.indexes import products as products_module
from retrodiff.indexes.axes import principal_axes
from retrodiff.indexes.products import HalfProducts
from retrodiff.indexes.resident import ResidentIndex
from retrodiff.indexes.vectors import row_norms, unit64
from retrodiff.precision import full_precision

STORAGE = [None, "float16", "bfloat16", "int8"]


def gaps(stored: torch.Tensor, queries: torch.Tensor) -> np.ndarray:
    """1 - cosine (b, m) to 64 binary digits: half the squared distance of unit vectors."""

    def unit(x: torch.Tensor) -> np.ndarray:
        wide = x.double().numpy().astype(np.longdouble)
        norm = np.sqrt((wide * wide).sum(1, keepdims=True))
        return wide / np.where(norm > 0, norm, 1)

    x, q = unit(stored), unit(queries)
    apart = np.stack([((x - one) ** 2).sum(1) / 2 for one in q])
    apart[:, ~x.any(1)] = 1
    apart[~q.any(1)] = 1
    return apart


def check(search, stored: torch.Tensor, queries: torch.Tensor, k: int, hidden=(), found=1.0):
    """The k nearest, in order, up to what float64 cannot tell apart; twins by row number.

    ``found`` is the share that must be there: a graph built by several threads may lack an edge, so
    that one build in some hundreds does not reach a row.
    """
    rows = torch.tensor(hidden) if len(hidden) else None
    similarity, at = search(queries, k, rows) if rows is not None else search(queries, k)
    assert similarity.dtype == torch.float32
    apart = gaps(stored, queries)
    apart[:, list(hidden)] = np.inf
    order = np.argsort(apart, axis=1, kind="stable")[:, :k]
    best, got = np.take_along_axis(apart, order, 1), np.take_along_axis(apart, at.numpy(), 1)
    slack = 4e-16 * np.sqrt(best) + 1e-30
    if found == 1:
        assert (np.abs(got - best) <= slack).all()
    assert (got <= best[:, -1:] + slack[:, -1:]).mean() >= found
    np.testing.assert_allclose(similarity.numpy(), 1 - got.astype(np.float64), atol=1e-7)
    assert (similarity.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == k for row in at.tolist())
    _, kind = np.unique(stored.float().numpy(), axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    allowed = ~np.isin(np.arange(len(stored)), list(hidden))
    for row in at.numpy():
        for twins in set(kind[row].tolist()):  # the first of them, in rising order
            mine = row[kind[row] == twins]
            assert mine.tolist() == np.flatnonzero((kind == twins) & allowed)[: len(mine)].tolist()


def one_rounding_away(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Every row with one of its values moved to the next number of its type."""
    kind = {2: torch.int16, 4: torch.int32}[x.itemsize]
    bits = x.clone().view(kind)
    at = torch.randint(x.shape[1], (len(x), 1), generator=g)
    return bits.scatter_add(1, at, torch.ones_like(at, dtype=kind)).view(x.dtype)


def adversarial(dtype: torch.dtype, dim: int, seed: int = 0, rows: int = 900) -> torch.Tensor:
    """Twins, rows a rounding apart, scaled copies, zeros, and norms from 1e-6 to 1e4."""
    g = torch.Generator().manual_seed(seed)
    some = torch.randn(rows // 6, dim, generator=g)
    spread = 10 ** (torch.rand(len(some), 1, generator=g) * 10 - 6)
    if dtype == torch.float16:
        spread = spread.clamp(1e-3, 1e3)
    scaled = (some * spread).to(dtype)
    near = one_rounding_away(scaled, g)
    parts = [scaled, near, one_rounding_away(near, g), scaled, (2 * some).to(dtype), near]
    every = torch.cat(parts)
    every[7] = every[500] = 0
    return every[torch.randperm(len(every), generator=g)]


def asked(stored: torch.Tensor, b: int) -> torch.Tensor:
    """Rows of the database, also scaled; others; zero."""
    g = torch.Generator().manual_seed(5)
    queries = stored[torch.randint(len(stored), (b,), generator=g)].float()
    queries[::4] *= 3e-5
    queries[1::4] = torch.randn(queries[1::4].shape, generator=g)
    queries[-1] = 0
    return queries


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("dim", [5, 48])
def test_hard_rows_are_told_apart(dtype, storage, dim):
    stored = adversarial(dtype, dim)
    queries = asked(stored, 24)
    vectors = Vectors(list(stored.chunk(3)))
    for block, k in ((32_768, 1), (100, 11)):
        check(Exact(block, storage=storage).build(vectors).search, stored, queries, k)
    index = Exact(storage=storage).build(vectors)
    check(index.search, stored, queries, 60, hidden=[0, 3, 64, 65, 899])
    check(index.search, stored, queries[:1], 900)
    if storage is not None:
        index = ResidentIndex.on(vectors, storage, torch.device("cpu"))
        check(index.search, stored, queries, 11, hidden=[5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("storage", [None, "float16"])
def test_bounds_from_principal_axes_tell_them_apart_too(dtype, storage, monkeypatch):
    monkeypatch.setattr(exact_module, "_PROJECTED", (8, 500))
    monkeypatch.setattr(exact_module, "_SAMPLE", 300)
    stored = adversarial(dtype, 80)
    index = Exact(block=128, storage=storage).build(Vectors([stored]))
    check(index.search, stored, asked(stored, 40), 9)


def test_a_row_comes_before_its_near_copies():
    """Their cosines are 1 to all digits of float32, and mostly of float64."""
    g = torch.Generator().manual_seed(0)
    row = torch.randn(512, generator=g)
    stored = row.repeat(200, 1)
    stored = one_rounding_away(stored, g)
    stored[150] = row
    for recipe in (Exact(), Exact(storage="int8"), Faiss("HNSW16", rerank=400)):
        similarity, found = recipe.build(Vectors([stored])).search(2 * row[None], 5)
        assert found[0, 0] == 150, recipe
        torch.testing.assert_close(similarity, torch.ones(1, 5))


@pytest.mark.parametrize("recipe", [Exact(), Exact(storage="int8"), USearch(), Faiss("HNSW16")])
def test_norms_beyond_what_float32_squares(recipe):
    """A norm of 1e-25 or 1e25 has a square of zero or infinity in float32."""
    g = torch.Generator().manual_seed(1)
    stored = torch.randn(300, 24, generator=g)
    stored *= torch.tensor([1e-38, 1e-25, 1e-13, 1.0, 1e20, 1e37]).repeat(50)[:, None]
    queries = stored[:40].clone()
    queries[20:] = torch.randn(20, 24, generator=g) * 1e-30
    vectors = Vectors([stored])
    found = 1.0 if isinstance(recipe, Exact) else 0.98
    check(recipe.build(vectors).search, stored, queries, 7, found=found)
    # Norms as a database may hold them that was written with a square of zero.
    held = Vectors([stored], [stored.norm(dim=1)])
    check(Exact().build(held).search, stored, queries, 7)


def test_queries_of_any_float_type_and_range():
    stored = adversarial(torch.float32, 16)
    index = Exact().build(Vectors([stored]))
    for queries in (
        asked(stored, 9).double() * 1e-200,
        asked(stored, 9).double() * 1e200,
        asked(stored, 9).half(),
        asked(stored, 9).bfloat16(),
        (asked(stored, 9) * 5).long(),
    ):
        similarity, found = index.search(queries, np.int64(6))
        expected = gaps(stored, queries.double() / queries.double().abs().max().clamp_min(1e-300))
        got = np.take_along_axis(expected, found.numpy(), 1)
        assert (got[:, -1] <= np.sort(expected, 1)[:, 5] + 1e-15).all()
        np.testing.assert_allclose(similarity, 1 - got.astype(np.float64), atol=1e-7)


@pytest.mark.parametrize("recipe", [Exact(), Exact(storage="float16"), Annoy(trees=5), USearch()])
def test_queries_and_numbers_that_mean_nothing(recipe):
    index = recipe.build(Vectors([torch.randn(200, 8)]))
    queries = torch.randn(4, 8)
    queries[2, 1] = torch.inf
    cases = [
        (queries, 3, r"NaN or infinity, first in row 2 \(1 of 4 rows\)"),
        (torch.randn(2, 8), 2.5, "k=2.5: give a whole number"),
        (torch.randn(2, 8), True, "k=True: give a whole number"),
        (torch.randn(2, 8), -1, "k=-1: give a whole number, at least 1"),
        (torch.randn(8), 3, "width 8"),
        (torch.randn(2, 8).to(torch.complex64), 3, "complex64"),
    ]
    for asked_for, k, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            index.search(asked_for, k)
        assert "\n" not in str(error.value)
    assert index.search(torch.randn(2, 8), np.int32(3))[1].shape == (2, 3)
    assert index.search(torch.randn(2, 8), torch.tensor(3))[1].shape == (2, 3)


# --- first passes in half precision ------------------------------------------------------------


HALVES = ["bfloat16", "stored"]


def among_others(dtype: torch.dtype, dim: int, rows: int = 6000) -> torch.Tensor:
    """Hard rows, in a crowd that a bound can rule out."""
    g = torch.Generator().manual_seed(3)
    crowd = torch.randn(rows, dim, generator=g) * torch.arange(1, dim + 1).rsqrt()
    crowd[:, 0] -= 2
    hard = adversarial(dtype, dim)[:300]
    if dtype == torch.float16:  # rows of zeros are multiplied in float32, with their block
        hard = hard[hard.any(1)]
    every = torch.cat([crowd.to(dtype), hard])
    return every[torch.randperm(len(every), generator=g)]


@pytest.fixture
def passes(monkeypatch):
    """What becomes of the blocks: scored in halves or not, ruled out by that or not."""
    counts = {"scored": 0, "refused": 0, "ruled out": 0, "left": 0}
    of, ruled_out = HalfProducts.of, exact_module._Pass._ruled_out

    def counted_of(self, rows, scale, at=0):
        found = of(self, rows, scale, at)
        counts["refused" if found is None else "scored"] += 1
        return found

    def counted_out(self, *rest):
        done = ruled_out(self, *rest)
        counts["ruled out" if done else "left"] += 1
        return done

    monkeypatch.setattr(HalfProducts, "of", counted_of)
    monkeypatch.setattr(exact_module._Pass, "_ruled_out", counted_out)
    return counts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("products", HALVES)
@pytest.mark.parametrize("dim", [16, 131])
def test_halves_tell_hard_rows_apart(dtype, products, dim, passes):
    stored = among_others(dtype, dim)
    index = Exact(1500, products=products).build(Vectors(list(stored.chunk(2))))
    for b, k in ((1, 1), (1, 30), (3, 11), (24, 11)):
        queries = stored[torch.arange(b) * 211 % len(stored)].float() * 3e-4
        queries[::2] = adversarial(dtype, dim)[: len(queries[::2])].float()
        check(index.search, stored, queries, k)
    hidden = torch.arange(0, len(stored), 3).tolist()
    check(index.search, stored, queries, 9, hidden=hidden)
    if products == "bfloat16" or dtype != torch.float32:
        assert passes["ruled out"] > 0


@pytest.mark.parametrize("products", HALVES)
@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8"])
def test_halves_of_copies(products, storage):
    stored = among_others(torch.float32, 48, rows=2000)
    index = Exact(700, storage=storage, products=products).build(Vectors([stored]))
    check(index.search, stored, stored[100:103].float(), 12, hidden=[100])


@settings(max_examples=60, deadline=None)
@given(
    way=st.sampled_from(HALVES),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    dim=st.integers(1, 90),
    b=st.integers(1, 4),
    spread=st.floats(0, 4),
    signs=st.booleans(),
    seed=st.integers(0, 999),
)
def test_scores_of_halves_stray_no_further_than_they_say(way, dtype, dim, b, spread, signs, seed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(80, dim, generator=g)
    if not signs:  # every term adds up, and so does its rounding
        rows = rows.abs()
    rows = (rows * 10 ** (spread * torch.rand(80, 1, generator=g) - spread / 2)).to(dtype)
    queries = rows[:b].double() + 0.1 * torch.randn(b, dim, generator=g)
    queries = queries / queries.norm(dim=1, keepdim=True)
    norms = rows.double().norm(dim=1)
    rows, norms = rows[norms > 0], norms[norms > 0]
    half = HalfProducts(way, queries, 128)
    slack = half.of(rows, norms.float().reciprocal(), 5)
    assert slack is not None
    assert slack.max() < 2.0**-6
    cosine = rows.double() @ queries.T / norms[:, None]
    assert ((half.scores[5 : 5 + len(rows)].double() - cosine).abs() <= slack).all()


@pytest.mark.parametrize("least", [1e-5, 1e-2])
def test_halves_keep_to_their_range(least, passes):
    """Norms of a million would leave float16 as sums; tiny ones beside them need float32."""
    g = torch.Generator().manual_seed(0)
    stored = torch.randn(3000, 300, generator=g)
    stored = (stored / stored.abs().amax(1, keepdim=True) * 60_000).half()
    stored[::9] = (stored[::9].float() / 60_000 * least).half()
    check(Exact(products="stored").build(Vectors([stored])).search, stored, stored[:2].float(), 5)
    assert passes["refused"] == (least == 1e-5)


def test_a_library_that_adds_in_halves_is_found_out(monkeypatch):
    """A test double that rounds every partial sum, in several orders."""

    def narrow_sum(terms: torch.Tensor, lanes: int) -> torch.Tensor:
        total = torch.zeros(*terms.shape[:-1], lanes, dtype=terms.dtype)
        terms = torch.nn.functional.pad(terms, (0, -terms.shape[-1] % lanes))
        for part in terms.split(lanes, -1):
            total += part
        return total.sum(-1)

    for lanes in (1, 8, 32):

        def mv(rows, query, lanes=lanes):
            return narrow_sum(rows * query, lanes)

        def mm(rows, queries, out, lanes=lanes):
            return out.copy_(narrow_sum(rows[:, None] * queries.T[None], lanes))

        with monkeypatch.context() as patched:
            patched.setattr(torch, "mv", mv)
            patched.setattr(torch, "mm", mm)
            for dtype in (torch.float16, torch.bfloat16):
                assert not products_module.keeps_its_bound.__wrapped__("stored", dtype, 512, 2)
            patched.setattr(torch, "mm", mm)
            assert not products_module.keeps_its_bound.__wrapped__("bfloat16", dtype, 512, 2)
    for way in HALVES:  # and this build of torch is not
        for dtype in (torch.float16, torch.bfloat16):
            for dim in (1, 5, 48, 512, 768):
                assert products_module.keeps_its_bound(way, dtype, dim, 3)


def test_a_way_that_strays_is_not_taken(monkeypatch):
    """Whatever it is that is wrong with it, and also where it is asked for by name."""
    stored, queries = torch.randn(4000, 32).half(), torch.randn(2, 32)
    expected = Exact().build(Vectors([stored])).search(queries, 5)
    of = HalfProducts.of

    def wrong(self, rows, scale, at=0):
        slack = of(self, rows, scale, at)
        self.scores[at + len(rows) // 2 :] *= 0.9
        return slack

    monkeypatch.setattr(HalfProducts, "of", wrong)
    monkeypatch.setattr(exact_module, "_MEASURED", 100)
    monkeypatch.setattr(exact_module, "_TIMES", {})
    products_module.keeps_its_bound.cache_clear()
    for products in (None, "stored", "bfloat16"):
        index = Exact(products=products).build(Vectors([stored]))
        assert "products in float32" in index.explain(2)
        assert torch.equal(index.search(queries, 5)[1], expected[1])
    products_module.keeps_its_bound.cache_clear()


def test_the_way_is_measured_once_and_explained(monkeypatch):
    seen = []

    def measured(rows, scale, queries):
        seen.append((rows.dtype, len(queries)))
        return {"bfloat16": 1e-8, "float32": 2e-8}

    monkeypatch.setattr(exact_module, "measured", measured)
    monkeypatch.setattr(exact_module, "_MEASURED", 2000)
    monkeypatch.setattr(exact_module, "_TIMES", {})
    stored = torch.randn(3000, 8).half()
    for _ in range(2):
        index = Exact().build(Vectors([stored]))
        assert index.explain(5) == (
            "5 queries over 3,000 rows of width 8: products in bfloat16 (nanoseconds a row on "
            f"{torch.get_num_threads()} threads: bfloat16 10, float32 20)"
        )
        index.search(torch.randn(7, 8), 3)
        index.search(torch.randn(9, 8), 3)
    assert seen == [(torch.float16, 5), (torch.float16, 9)]
    few = Exact().build(Vectors([stored[:1500]]))
    assert few.explain() == (
        "1 queries over 1,500 rows of width 8: products in float32 "
        "(1,500 rows are too few to measure others)"
    )
    assert "(as asked for)" in Exact(products="stored").build(Vectors([stored])).explain()
    assert recipe_from_string("exact:products=bfloat16") == Exact(products="bfloat16")
    with pytest.raises(ValueError, match="unknown products 'int4'; known: float32, bfloat16"):
        Exact(products="int4").build(Vectors([stored]))


def test_ways_are_measured_where_they_may_be_taken():
    rows, queries = torch.randn(2000, 64), unit64(torch.randn(3, 64))
    for dtype, ways in (
        (torch.float16, {"float32", "bfloat16", "stored"}),
        (torch.float32, {"float32", "bfloat16"}),
    ):
        scale = row_norms(rows.to(dtype)).reciprocal()
        found = products_module.measured(rows.to(dtype), scale, queries)
        assert set(found) == ways
        assert list(found.values()) == sorted(found.values())


# --- some of the rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("products", [None, *HALVES])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.95, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_some_rows_are_searched_as_a_copy_of_them_is(products, share, dtype):
    stored = among_others(dtype, 24, rows=4000)
    g = torch.Generator().manual_seed(1)
    chosen = (torch.rand(len(stored), generator=g) < share).nonzero().flatten()
    vectors = Vectors(list(stored.chunk(3)))
    twice = vectors.select(chosen).select(torch.arange(0, len(chosen), 2))
    for rows, view in (
        (chosen, vectors.select(chosen)),
        (chosen[::2], twice),
        (chosen.flip(0), vectors.select(chosen.flip(0))),
        (chosen.repeat(2), vectors.select(chosen.repeat(2))),
        (torch.arange(700, 1900), vectors.select(torch.arange(700, 1900))),
    ):
        index = Exact(500, products=products).build(view)
        for b in (1, 9):
            queries = stored[50 : 50 + b].float()
            check(index.search, stored[rows], queries, 7)
            check(index.search, stored[rows], queries, 7, hidden=[0, 1, 5, len(rows) - 1])


def test_blocks_of_a_view_that_hold_nothing_are_passed_over():
    stored = torch.randn(4000, 8).half()
    chosen = torch.cat([torch.arange(10, 1010, 2), torch.arange(3000, 3300)])
    view = Vectors(list(stored.chunk(2))).select(chosen)
    whole = list(view.searched(100, 0.25))
    assert sum(len(block.rows) for block in whole) == 89 + 9 * 99 + 9 + 300
    assert all(block.rows.dtype == torch.float16 for block in whole)
    gathered = list(view.searched(100, 0.75))
    assert sum(len(block.rows) for block in gathered) == len(chosen)
    assert torch.equal(torch.cat([block.rows for block in gathered]), stored[chosen])


# --- autocast, and other settings of the process ------------------------------------------------


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_search(narrow, monkeypatch):
    monkeypatch.setattr(exact_module, "_SAMPLE", 300)
    stored = torch.randn(3000, 64) * torch.arange(1, 65).rsqrt()
    queries = torch.randn(300, 64)
    vectors = Vectors([stored])
    recipes = [Exact(), Exact(storage="float16"), Exact(storage="bfloat16"), Exact(storage="int8")]
    recipes += [Annoy(trees=5, components=16), USearch(), Faiss("HNSW16")]
    for few in ((256, 65_536), (256, 1000)):  # without bounds from principal axes, and with them
        monkeypatch.setattr(exact_module, "_PROJECTED", few)
        for recipe in recipes if few[1] == 65_536 else recipes[:2]:
            asked_for = queries if isinstance(recipe, Exact) else queries[:20]
            index = recipe.build(vectors)
            expected = index.search(asked_for, 10)
            with torch.autocast("cpu", narrow):
                if not isinstance(recipe, USearch):  # whose graphs are never twice the same
                    index = recipe.build(vectors)
                found = index.search(asked_for, 10)
            for mine, theirs in zip(found, expected, strict=True):
                assert torch.equal(mine, theirs), recipe
    resident = ResidentIndex.on(vectors, "float16", torch.device("cpu"))
    expected = resident.search(queries, 10)
    axes = principal_axes(vectors, 8)
    with torch.autocast("cpu", narrow):
        assert torch.equal(resident.search(queries, 10)[1], expected[1])
        assert torch.equal(principal_axes(vectors, 8), axes)


def test_many_queries_and_rows_under_autocast():
    """256 queries over 65,536 rows: the size from which bounds are tried by themselves."""
    stored, queries = torch.randn(65_536, 16).half(), torch.randn(256, 16)
    expected = Exact().build(Vectors([stored])).search(queries, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = Exact().build(Vectors([stored])).search(queries, 4)
    assert torch.equal(found[1], expected[1])


def test_defaults_of_the_process_change_no_search(monkeypatch):
    stored, queries = torch.randn(3000, 40), torch.randn(300, 40)
    monkeypatch.setattr(exact_module, "_PROJECTED", (256, 1000))
    recipes = [Exact(), Exact(storage="int8"), Annoy(trees=5, components=16)]
    expected = [recipe.build(Vectors([stored])).search(queries, 5) for recipe in recipes]
    torch.set_default_dtype(torch.float64)
    try:
        found = [recipe.build(Vectors([stored])).search(queries, 5) for recipe in recipes]
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        found += [recipe.build(Vectors([stored])).search(queries, 5) for recipe in recipes]
    for mine, theirs in zip(found, 2 * expected, strict=True):
        assert mine[0].dtype == torch.float32
        assert torch.equal(mine[1], theirs[1])


def test_full_precision_turns_off_and_back_on():
    matmul = torch.backends.mkldnn.matmul
    torch.set_float32_matmul_precision("medium")
    try:
        allowed = matmul.fp32_precision
        with torch.autocast("cpu", torch.bfloat16):
            with full_precision():
                assert not torch.is_autocast_enabled("cpu")
                assert matmul.fp32_precision != "bf16"
                assert (torch.ones(4, 4) @ torch.ones(4, 4)).dtype == torch.float32
            assert torch.is_autocast_enabled("cpu")
        assert matmul.fp32_precision == allowed
    finally:
        torch.set_float32_matmul_precision("highest")
