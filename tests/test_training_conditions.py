"""What conditions a training image: captions, groups, neighbors asked at each step, how many."""

import warnings
from collections import Counter

import pytest
import torch
from parts import HashingEncoder
from trainings import run

from retrodiff.databases import ArrayDatabase
from retrodiff.diffusion import Dropped, NeighborEmbeddings, PromptAndNeighbors, QueryAndNeighbors
from retrodiff.interfaces import Neighbors, Query
from retrodiff.retrieval import (
    ExcludeDuplicates,
    ExcludeGroup,
    ExcludeSelf,
    NearestNeighbors,
    RandomOfTop,
)
from retrodiff.testing import check_conditioner
from retrodiff.training import Moved, Pairing, TrainingSet
from retrodiff.training.captions import Captions
from retrodiff.training.occasion import Order

N, K = 40, 4
QUIET = {"progress": False}
STYLES = ["flat", "line", "oil"]
MODES = {"neighbors": 0.5, "text+neighbors": 0.3, "text": 0.2}


@pytest.fixture(scope="module")
def encoder():
    return HashingEncoder()


@pytest.fixture(scope="module")
def images():
    return torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def database(images, encoder):
    """The images themselves, of three styles by turns; two rows are of a style of their own."""
    records = [{"style": STYLES[i % 3], "concept": f"c{i // 3}"} for i in range(N)]
    records[1] = records[2] = {"style": "rare", "concept": "none"}
    return ArrayDatabase(encoder.encode_image(images), encoder.fingerprint, records)


def data_of(images, encoder, database, retriever=None, k=K, **options):
    retriever = retriever or ExcludeSelf(NearestNeighbors())
    return TrainingSet.of(images, encoder, database, retriever, k, **QUIET, **options)


@pytest.fixture(scope="module")
def data(images, encoder, database):
    return data_of(images, encoder, database)


@pytest.fixture(scope="module")
def texts():
    """None, one or two captions for an image."""
    return [None if i % 5 == 0 else [f"a {i}", f"b {i}"] if i % 2 else f"a {i}" for i in range(N)]


@pytest.fixture(scope="module")
def captioned(data, texts, encoder):
    with pytest.warns(UserWarning, match="8 of 40 training images have no caption"):
        return data.captioned(texts, encoder, modes=MODES, **QUIET)


def seen(data, steps=50, batch_size=8, seed=3, **options):
    """Rows, images, queries and neighbors of a training, each joined over its steps."""
    rows = torch.cat([data.rows_at(step, batch_size, seed) for step in range(steps)])
    batches = list(data.batches(0, steps, batch_size=batch_size, seed=seed, **options))
    found = [found for _, _, found in batches]
    mask = None if found[0].mask is None else torch.cat([one.mask for one in found])
    neighbors = Neighbors(
        torch.cat([one.indices for one in found]),
        torch.cat([one.similarity for one in found]),
        torch.cat([one.embeddings for one in found]),
        mask=mask,
    )
    embedding = torch.cat([query.embedding for _, query, _ in batches])
    return rows, torch.cat([images for images, _, _ in batches]), embedding, neighbors


def mode_of(neighbors, i):
    """The mode that a training image was in, read off its tokens."""
    alive = neighbors.indices[i][neighbors.mask[i]].tolist()
    if alive == [-1]:
        return "text"
    assert -1 not in alive[1:]
    return "text+neighbors" if alive[0] == -1 else "neighbors"


# --- captions ------------------------------------------------------------------------------------


def test_every_image_is_in_one_mode_by_its_share(captioned):
    rows, _, _, found = seen(captioned)
    has = [row for i, row in enumerate(rows.tolist()) if row % 5]
    modes = Counter(mode_of(found, i) for i, row in enumerate(rows.tolist()) if row % 5)
    for mode, share in MODES.items():
        # 320 draws: three standard deviations are at most 0.084
        assert abs(modes[mode] / len(has) - share) < 0.085
    assert {mode_of(found, i) for i, row in enumerate(rows.tolist()) if not row % 5} == {
        "neighbors"
    }


def test_the_tokens_are_those_of_sampling(captioned, data, texts, encoder, database):
    rows, _, query, found = seen(captioned)
    for i, row in enumerate(rows.tolist()):
        mode, table = mode_of(found, i), data.table[row].long()
        if mode == "neighbors":
            assert torch.equal(query[i], data.embeddings[row])
            assert torch.equal(found.indices[i], table)
            continue
        own = [texts[row]] if isinstance(texts[row], str) else texts[row]
        choices = [bool((encoder.encode_text([text])[0] == query[i]).all()) for text in own]
        assert any(choices)
        assert torch.equal(found.embeddings[i, 0], query[i])
        assert float(found.similarity[i, 0]) == 1
        rest = slice(1, None)
        if mode == "text":
            assert not bool(found.mask[i, rest].any())
            assert not bool(found.embeddings[i, rest].any())
        else:
            assert torch.equal(found.indices[i, rest], table[: K - 1])
            assert torch.equal(found.embeddings[i, rest], database.embeddings(table[: K - 1]))


def test_all_captions_of_an_image_are_used(captioned, encoder, texts):
    rows, _, query, found = seen(captioned)
    used = Counter()
    for i, row in enumerate(rows.tolist()):
        if row % 2 and row % 5 and mode_of(found, i) != "neighbors":
            used[bool((encoder.encode_text([texts[row][0]])[0] == query[i]).all())] += 1
    assert min(used.values()) > sum(used.values()) / 3


def test_a_batch_without_an_occasion_is_plain(captioned, data):
    rows = torch.arange(8)
    for one, other in zip(captioned.batch(rows), data.batch(rows), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_fewer_neighbors_are_asked_of_the_same_draws(captioned):
    _, _, query, found = seen(captioned, steps=6)
    _, _, few_query, few = seen(captioned, steps=6, k=2)
    assert torch.equal(query, few_query)
    assert few.k == 2
    assert torch.equal(few.indices, found.indices[:, :2])


def test_the_rows_of_a_caption_are_those_that_sampling_finds(data, texts, encoder, database):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_text = data.captioned(
            texts, encoder, modes={"text+neighbors": 1.0}, searched_by="caption", **QUIET
        )
    rows, _, query, found = seen(by_text, steps=10)
    for i, row in enumerate(rows.tolist()):
        if row % 5:
            asked = Query(query[i : i + 1], ids=torch.tensor([row]))
            nearest = ExcludeSelf(NearestNeighbors()).retrieve(asked, database, K).indices[0]
            assert torch.equal(found.indices[i, 1:], nearest[: K - 1])


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_neighbors_alone_are_found_for_a_caption_by_a_share(data, encoder, share):
    texts = [[f"a {i}", f"b {i}"] for i in range(N)]
    options = {"modes": MODES, "searched_by": "caption", **QUIET}
    usual = data.captioned(texts, encoder, **options)
    by_text = data.captioned(texts, encoder, neighbors_by_caption=share, **options)
    rows, _, query, found = seen(by_text)
    _, _, usual_query, usually = seen(usual)
    by_caption = 0
    alone = [i for i in range(len(rows)) if mode_of(found, i) == "neighbors"]
    for i in alone:
        row = int(rows[i])
        ids = torch.tensor([row])
        nearest = ExcludeSelf(NearestNeighbors()).retrieve(
            Query(query[i : i + 1], ids=ids), data.database, K
        )
        assert torch.equal(found.indices[i], nearest.indices[0])
        asked = [bool((encoder.encode_text([t])[0] == query[i]).all()) for t in texts[row]]
        assert any(asked) or torch.equal(query[i], data.embeddings[row])
        by_caption += any(asked)
    assert abs(by_caption / len(alone) - share) < (0.11 if 0 < share < 1 else 1e-9)  # 200 draws
    others = torch.tensor([i for i in range(len(rows)) if i not in set(alone)])
    assert torch.equal(query[others], usual_query[others])
    assert torch.equal(found.indices[others], usually.indices[others])


def test_a_caption_that_finds_neighbors_must_be_searched_by(data, encoder):
    with pytest.raises(ValueError, match=r"neighbors_by_caption=0.5, but searched_by='image'"):
        data.captioned(["a"] * N, encoder, modes=MODES, neighbors_by_caption=0.5, **QUIET)
    options = {"searched_by": "caption", "neighbors_by_caption": 1.5}
    with pytest.raises(ValueError, match=r"neighbors_by_caption=1.5"):
        data.captioned(["a"] * N, encoder, modes=MODES, **options, **QUIET)


@pytest.mark.parametrize(
    ("captions", "modes", "message"),
    [
        (["a"] * 3, MODES, "40 training images, but captions of 3 images"),
        ("a cat", MODES, "40 training images, but one text"),
        ([None] * N, MODES, "none of the 40 training images has a caption"),
        (["a"] * (N - 1) + [7], MODES, "caption of training image 39 is"),
        (["a"] * N, {"neighbors": 0.5}, "sum to 0.5"),
        (["a"] * N, {"image": 1.0}, "modes has 'image', but images are trained with neighbors"),
        (["a"] * N, {"text": 1.5, "neighbors": -0.5}, r"modes\['text'\]=1.5"),
    ],
)
def test_wrong_captions_are_one_line(data, encoder, captions, modes, message):
    with pytest.raises(ValueError, match=message) as refused:
        data.captioned(captions, encoder, modes=modes, **QUIET)
    assert "\n" not in str(refused.value)


def test_captions_need_an_encoder_of_text_and_the_databases(data, eyes_only, encoder):
    with pytest.raises(ValueError, match="no text tower"):
        data.captioned(["a"] * N, eyes_only, modes=MODES, **QUIET)
    with pytest.raises(ValueError, match="encoder and database disagree"):
        data.captioned(["a"] * N, HashingEncoder(seed=4), modes=MODES, **QUIET)
    with pytest.raises(ValueError, match="searched_by='both'"):
        data.captioned(["a"] * N, encoder, modes=MODES, searched_by="both", **QUIET)


@pytest.fixture
def eyes_only():
    class Eyes:
        dim, fingerprint = 8, HashingEncoder().fingerprint

    return Eyes()


def test_captions_are_kept_in_a_folder(data, encoder, tmp_path):
    texts = [f"a {i}" for i in range(N)]
    options = {"modes": {"text": 1.0}, "cache": tmp_path, **QUIET}
    first = data.captioned(texts, encoder, **options).captions
    assert (tmp_path / "captions.safetensors").is_file()
    again = data.captioned(texts, encoder, **options).captions
    assert torch.equal(first.embeddings, again.embeddings)
    with pytest.raises(ValueError, match=r"captions\.safetensors"):
        data.captioned([*texts[:-1], "b"], encoder, **options)


def test_shares_are_met_to_the_last_draw():
    made = Captions(torch.zeros(2, 3), torch.tensor([2, 0]), {"text": 0.1, "neighbors": 0.9})
    caption, modes = made.chosen(
        torch.tensor([0, 0, 0, 1]),
        torch.tensor([0.0, 0.9999999, 0.5, 0.5]),
        torch.tensor([0.0, 0.0999999, 0.9999999, 0.0]),
    )
    assert caption.tolist() == [0, 1, -1, -1]
    assert modes == ["text", "text", "neighbors", "neighbors"]


# --- groups --------------------------------------------------------------------------------------


def styles(database, indices):
    return [record["style"] for record in database.records(indices)]


def own_style(n=N):
    return [None if i in (1, 2) else STYLES[i % 3] for i in range(n)]


def test_half_of_the_images_have_neighbors_of_their_own_style(data, database):
    grouped = data.grouped("style", 0.5, groups=own_style(), **QUIET)
    rows, _, query, found = seen(grouped)
    assert torch.equal(query, data.embeddings[rows])
    own = mixed = 0
    for i, row in enumerate(rows.tolist()):
        assert row not in found.indices[i].tolist()  # ExcludeSelf holds in a group, too
        if torch.equal(found.indices[i], data.table[row].long()):
            mixed += 1
            continue
        assert row not in (1, 2)
        assert set(styles(database, found.indices[i])) == {STYLES[row % 3]}
        part = [r for r in range(N) if STYLES[r % 3] == STYLES[row % 3] and r not in (1, 2, row)]
        similarity = torch.cosine_similarity(
            data.embeddings[row], database.embeddings(torch.tensor(part)), dim=-1
        )
        nearest = torch.tensor(part)[similarity.argsort(descending=True)[:K]]
        assert torch.equal(found.indices[i], nearest)
        own += 1
    # 400 draws, of which one in twenty is of an image of no group
    assert abs(own / (own + mixed) - 0.475) < 0.075


def test_the_groups_of_images_that_are_rows_are_known(images, encoder, database, data):
    rare = {"style": "rare", "concept": "none"}
    records = [
        dict(r) if r["style"] != "rare" else {**rare, "style": STYLES[i % 3]}
        for i, r in enumerate(database.records(torch.arange(N)))
    ]
    complete = ArrayDatabase(encoder.encode_image(images), encoder.fingerprint, records)
    known = data_of(images, encoder, complete).grouped("style", 1.0, **QUIET)
    given = data_of(images, encoder, complete).grouped(
        "style", 1.0, groups=[STYLES[i % 3] for i in range(N)], **QUIET
    )
    assert torch.equal(known.tables.own, given.tables.own)
    assert known.describe() == given.describe()


def test_captions_are_searched_in_the_group_of_their_image(data, database, encoder):
    texts = [f"a {i}" for i in range(N)]
    options = {"modes": {"text+neighbors": 1.0}, "searched_by": "caption", **QUIET}
    for made in (
        data.grouped("style", 1.0, groups=own_style(), **QUIET).captioned(
            texts, encoder, **options
        ),
        data.captioned(texts, encoder, **options).grouped(
            "style", 1.0, groups=own_style(), **QUIET
        ),
    ):
        rows, _, _, found = seen(made, steps=10)
        for i, row in enumerate(rows.tolist()):
            if row not in (1, 2):
                assert set(styles(database, found.indices[i, 1:])) == {STYLES[row % 3]}
                assert row not in found.indices[i].tolist()


@pytest.mark.parametrize(
    ("by", "groups", "message"),
    [
        ("style", None, "style='rare' has 2 rows in the database, but k=4"),
        ("style", ["oil"] * (N - 1) + ["gone"], "style='gone' has 0 rows"),
        ("style", ["oil"] * 3, "40 training images, but groups is 3"),
        ("style", "oil", "40 training images, but groups is one text"),
        ("artist", own_style(), "unknown column 'artist'"),
    ],
)
def test_wrong_groups_are_one_line(data, by, groups, message):
    with pytest.raises(ValueError, match=message) as refused:
        data.grouped(by, 0.5, groups=groups, **QUIET)
    assert "\n" not in str(refused.value)


def test_a_group_that_is_too_small_without_the_image_itself(images, encoder, database):
    data = data_of(images, encoder, database, k=2)
    with pytest.raises(ValueError, match="style='rare': k=2 neighbors were asked for, but after"):
        data.grouped("style", 0.5, **QUIET)


def test_groups_of_images_that_are_no_rows_must_be_given(encoder, database):
    others = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(7)) * 2 - 1
    data = data_of(others, encoder, database, NearestNeighbors())
    with pytest.raises(ValueError, match="the style of the training images is not known"):
        data.grouped("style", 0.5, **QUIET)
    by_hand = TrainingSet(others, data.embeddings, data.table, database)
    with pytest.raises(ValueError, match="knows no retriever"):
        by_hand.grouped("style", 0.5, groups=["oil"] * 6, **QUIET)


# --- neighbors of each step ----------------------------------------------------------------------


def test_a_retriever_that_does_not_draw_gives_the_table_at_each_step(
    data, images, encoder, database
):
    live = data_of(images, encoder, database, per_step=True)
    assert live.table.shape == (N, 0)
    assert live.k == K
    for one, other in zip(seen(data, steps=6), seen(live, steps=6), strict=True):
        if isinstance(one, Neighbors):
            assert torch.equal(one.indices, other.indices)
        else:
            assert torch.equal(one, other)
    texts = [f"a {i}" for i in range(N)]
    for searched_by in ("image", "caption"):
        both = [
            made.captioned(texts, encoder, modes=MODES, searched_by=searched_by, **QUIET).grouped(
                "style", 0.5, groups=own_style(), **QUIET
            )
            for made in (data, live)
        ]
        found = [seen(made, steps=20)[3] for made in both]
        assert torch.equal(found[0].indices, found[1].indices)
        assert torch.equal(found[0].mask, found[1].mask)


def test_a_retriever_that_draws_gives_other_rows_each_time(images, encoder, database):
    draws = RandomOfTop(ExcludeSelf(NearestNeighbors()), 12)
    live = data_of(images, encoder, database, draws, per_step=True)
    rows, _, _, found = seen(live)
    sets = {tuple(found.indices[i].tolist()) for i, row in enumerate(rows.tolist()) if row == 7}
    assert len(sets) > 5
    assert not bool((found.indices == rows.unsqueeze(1)).any())
    later = list(live.batches(20, 22, batch_size=8, seed=3))
    assert torch.equal(later[0][2].indices, found.indices[160:168])
    half = [next(live.batches(0, 1, batch_size=8, seed=3, part=(i, 2)))[2] for i in (0, 1)]
    assert torch.equal(torch.cat([part.indices for part in half]), found.indices[:8])
    assert torch.equal(
        live.batch(torch.arange(3))[2].indices, live.batch(torch.arange(3))[2].indices
    )


@pytest.mark.parametrize(
    "retriever",
    [
        ExcludeGroup(NearestNeighbors(), "concept"),
        ExcludeDuplicates(NearestNeighbors(), 0.999),
        ExcludeSelf(NearestNeighbors()),
    ],
    ids=lambda r: type(r).__name__,
)
def test_what_leaves_rows_out_does_so_at_each_step_and_in_groups(
    images, encoder, database, retriever
):
    for per_step in (False, True):
        data = data_of(images, encoder, database, retriever, per_step=per_step)
        data = data.grouped("style", 0.5, groups=own_style(), **QUIET)
        rows, _, _, found = seen(data, steps=20)
        assert not bool((found.indices == rows.unsqueeze(1)).any())
        if isinstance(retriever, ExcludeGroup):
            for i, row in enumerate(rows.tolist()):
                concepts = {r["concept"] for r in database.records(found.indices[i])}
                assert database.records([row])[0]["concept"] not in concepts


# --- how many ------------------------------------------------------------------------------------


def test_each_image_sees_a_number_of_neighbors_from_1_to_k(data):
    _, _, _, plain = seen(data)
    _, _, _, found = seen(data.jittered())
    counts = Counter(found.mask.sum(1).tolist())
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 70  # of 400, 100 expected
    assert torch.equal(found.indices, torch.where(found.mask, plain.indices, -1))
    assert not bool(found.embeddings[~found.mask].any())
    assert bool((found.mask.int().diff(dim=1) <= 0).all())  # the nearest ones


def test_regions_share_their_number(data, database):
    embeddings = torch.stack([data.embeddings, data.embeddings.flip(0)], 1)
    table = torch.stack([data.table, data.table.flip(0)], 1)
    regions = TrainingSet(data.images, embeddings, table, database)
    _, _, _, found = seen(regions.jittered(), steps=4)
    assert found.mask.shape == (32, 2, K)
    assert torch.equal(found.mask[:, 0], found.mask[:, 1])
    with pytest.raises(ValueError, match="have 2 regions each, but a caption"):
        regions.captioned(["a"] * N, HashingEncoder(), modes=MODES, **QUIET)


# --- conditioners --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["raw", "unit"])
def test_prompt_and_neighbors_keeps_the_contract(scale):
    check_conditioner(PromptAndNeighbors(scale))
    check_conditioner(Dropped(PromptAndNeighbors(scale), 0.5))


def test_prompt_and_neighbors_shows_what_a_mode_makes_tokens_of(captioned):
    _, _, query, found = seen(captioned, steps=10)
    context = PromptAndNeighbors("raw").condition(Query(query), found)
    prompt, rows = context.streams["query"], context.streams["neighbors"]
    for i in range(len(query)):
        mode = mode_of(found, i)
        assert bool(prompt.mask[i, 0]) == (mode != "neighbors")
        assert torch.equal(prompt.values[i, 0], query[i] * (mode != "neighbors"))
        assert int(rows.mask[i].sum()) == {"neighbors": K, "text+neighbors": K - 1, "text": 0}[mode]
        assert torch.equal(rows.values[i][rows.mask[i]], found.embeddings[i][rows.mask[i]])


def test_conditioners_pass_the_mask_on(data):
    _, _, query, found = seen(data.jittered(), steps=2)
    for conditioner in (NeighborEmbeddings("raw"), QueryAndNeighbors("raw")):
        tokens = conditioner.condition(Query(query), found).streams["neighbors"]
        assert torch.equal(tokens.mask, found.mask)


def test_what_is_hidden_is_the_null_condition_without_its_mask(captioned):
    _, _, query, found = seen(captioned, steps=10)
    conditioner = Dropped(PromptAndNeighbors("raw"), 0.4)
    context = conditioner.condition(Query(query), found)
    hidden = conditioner.drop(context, torch.Generator().manual_seed(0))
    for name, tokens in hidden.streams.items():
        gone = (tokens.values == 0).flatten(1).all(1) & tokens.mask.flatten(1).all(1)
        share = float(gone.float().mean())
        assert 0.2 < share < 0.6
        before = context.streams[name]
        assert torch.equal(tokens.mask[~gone], before.mask[~gone])
        assert torch.equal(tokens.values[~gone], before.values[~gone])


def test_streams_are_hidden_separately_and_jointly_each_by_its_share():
    """Hidden are: query 1 - 0.9 * 0.8, neighbors 1 - 0.7 * 0.8, both 0.2 + 0.8 * 0.1 * 0.3."""
    inner = Dropped(QueryAndNeighbors("raw"), 0.1, stream="query")
    conditioner = Dropped(Dropped(inner, 0.3, stream="neighbors"), 0.2)
    n = 20_000
    query = Query(torch.ones(n, 2))
    found = Neighbors(torch.zeros(n, 3).long(), torch.ones(n, 3), torch.ones(n, 3, 2))
    context = conditioner.drop(
        conditioner.condition(query, found), torch.Generator().manual_seed(0)
    )
    gone = {name: (t.values == 0).flatten(1).all(1) for name, t in context.streams.items()}
    both = gone["query"] & gone["neighbors"]
    for hidden, share in ((gone["query"], 0.28), (gone["neighbors"], 0.44), (both, 0.224)):
        assert abs(float(hidden.float().mean()) - share) < 0.012


def test_a_stream_that_is_not_there_is_not_hidden_in_silence(data):
    query = Query(data.embeddings[:2])
    conditioner = Dropped(NeighborEmbeddings("raw"), 0.1, stream="neighbours")
    context = conditioner.condition(query, data.batch(torch.arange(2))[2])
    with pytest.raises(ValueError, match="hides nothing: the context has neighbors"):
        conditioner.drop(context)


def test_values_of_neighbors_keep_their_mask():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    one = Neighbors(torch.arange(6).view(2, 3), torch.rand(2, 3), torch.rand(2, 3, 4), mask=mask)
    assert torch.equal(one.rows([1]).mask, mask[1:])
    assert torch.equal(one.take(torch.tensor([2, 0])).mask, mask[:, [2, 0]])
    other = Neighbors(torch.arange(2).view(2, 1), torch.rand(2, 1), torch.rand(2, 1, 4))
    joined = Neighbors.cat([other, one]).mask
    assert torch.equal(joined, torch.cat([torch.ones(2, 1, dtype=torch.bool), mask], 1))
    assert Neighbors.cat([other, other]).mask is None
    assert one != one.take(torch.arange(3)).rows([0, 0])
    assert torch.equal(one.to("cpu").mask, mask)


# --- continued -----------------------------------------------------------------------------------


def variants(data, encoder):
    texts = [f"a {i}" for i in range(len(data.images))]
    captioned = data.captioned(texts, encoder, modes=MODES, **QUIET)
    return {
        "captions": captioned,
        "modes": data.captioned(texts, encoder, modes={"text": 1.0}, **QUIET),
        "texts": data.captioned([*texts[:-1], "b"], encoder, modes=MODES, **QUIET),
        "searched_by": data.captioned(texts, encoder, modes=MODES, searched_by="caption", **QUIET),
        "by_caption": data.captioned(
            texts,
            encoder,
            modes=MODES,
            searched_by="caption",
            neighbors_by_caption=0.5,
            **QUIET,
        ),
        "groups": data.grouped("style", 0.5, groups=own_style(len(texts)), **QUIET),
        "share": data.grouped("style", 0.25, groups=own_style(len(texts)), **QUIET),
        "members": data.grouped("style", 0.5, groups=["oil"] * len(texts), **QUIET),
        "jitter": data.jittered(),
    }


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        ("captions", "modes", "captions.modes"),
        ("captions", "texts", "other captions of the training images"),
        ("captions", "searched_by", "captions.searched_by image, but this one has caption"),
        ("searched_by", "by_caption", "captions.neighbors_by_caption None, but this one has 0.5"),
        ("captions", None, "captions"),
        ("groups", "share", "groups.share 0.5, but this one has 0.25"),
        ("groups", "members", "other groups of images or rows"),
        (None, "groups", "groups None, but this one has"),
        ("jitter", None, "jitter True, but this one has None"),
    ],
)
def test_a_training_is_not_continued_with_other_conditions(
    recipe, data, encoder, tmp_path, first, then, words
):
    made = {None: data, **variants(data, encoder)}
    recipe = recipe.database(data.database)
    run(recipe, made[first], steps=1, checkpoint=tmp_path / "state")
    with pytest.raises(ValueError, match=words):
        run(recipe, made[then], steps=2, checkpoint=tmp_path / "state", resume=True)


def test_any_number_of_workers_and_any_start_give_the_same(data, encoder):
    texts = [f"a {i}" for i in range(N)]
    made = (
        data.captioned(texts, encoder, modes=MODES, **QUIET)
        .grouped("style", 0.5, groups=own_style(), **QUIET)
        .jittered()
        .paired(Pairing(torch.arange(N), torch.arange(N).flip(0)))
    )
    whole = list(made.batches(0, 6, batch_size=8, seed=3))
    for start, workers in ((0, 2), (4, 0), (4, 1)):
        again = list(made.batches(start, 6, batch_size=8, seed=3, workers=workers))
        for (x, q, f), (y, r, g) in zip(whole[start:], again, strict=True):
            assert torch.equal(x, y)
            assert q.embedding.equal(r.embedding)
            assert f == g
    order = Order(N, 8, 3)
    rows = made.rows_at(5, 8, 3)
    assert made.batch(rows, occasion=order.occasion(5))[2] == whole[5][2]


def test_images_of_no_known_group_are_counted(images, encoder, database):
    others = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(7)) * 2 - 1
    data = data_of(torch.cat([images[3:], others]), encoder, database)
    with pytest.warns(UserWarning, match="3 of 40 training images are no rows of the database"):
        grouped = data.grouped("style", 1.0, **QUIET)
    assert grouped.groups.own[-3:].tolist() == [-1] * 3


def test_tables_of_captions_and_groups_are_kept_in_the_folder(
    images, encoder, database, tmp_path, monkeypatch
):
    texts = [f"a {i}" for i in range(N)]

    def made(share=0.5, groups=None):
        data = data_of(images, encoder, database, cache=tmp_path)
        data = data.captioned(texts, encoder, modes=MODES, searched_by="caption", **QUIET)
        return data.grouped("style", share, groups=groups or own_style(), **QUIET).tables

    first = made()
    assert len(list(tmp_path.glob("neighbors-*.safetensors"))) == 1 + 2 * len(STYLES)
    with monkeypatch.context() as patch:
        patch.setattr(ExcludeSelf, "retrieve", None)  # nothing is asked again
        again = made(share=0.25)
    for name in ("captions", "own", "captions_own"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    made(groups=["oil"] * N)  # other groups have other files


def test_a_training_set_is_shown_on_a_line(data, encoder):
    made = data.captioned([f"a {i}" for i in range(N)], encoder, modes=MODES, **QUIET)
    made = made.grouped("style", 0.5, groups=own_style(), **QUIET).jittered().augmented(Moved(2))
    assert repr(made) == (
        "TrainingSet(40 images, k=4 of ArrayDatabase(40 rows, random), captions in modes "
        "{'neighbors': 0.5, 'text+neighbors': 0.3, 'text': 0.2}, 0.5 of one style, jittered, "
        "Moved(shift=2, smallest=1.0, background=1.0))"
    )
