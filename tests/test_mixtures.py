"""Guidance over several conditions: streams, other databases, models, and ranges of noise."""

import pytest
import torch
from parts import HashingEncoder, small_network

from retrodiff.builder import Builder
from retrodiff.databases import ArrayDatabase
from retrodiff.diffusion import (
    ByLevel,
    ClassifierFree,
    Composed,
    EDMDenoiser,
    Euler,
    Interval,
    Karras,
    Mixture,
    NeighborEmbeddings,
    QueryAndNeighbors,
    QueryVector,
    Unguided,
)
from retrodiff.interfaces import Context, Query, Tokens
from retrodiff.model import Model
from retrodiff.retrieval import Uniform


class Echo:
    """Denoises to the sum of all token entries: linear in every stream, and zero for the null."""

    shape, takes_float64, untrained = (1, 4, 4), True, False
    device = torch.device("cpu")

    def __init__(self, *streams, factor=1.0, vector_width=None):
        self.streams, self.factor, self.vector_width = streams, factor, vector_width
        self.calls = []

    @property
    def widths(self):
        return dict.fromkeys(self.streams, 8)

    @property
    def schedule(self):
        return Karras(0.01, 10.0)

    def prepare(self, context):
        return context

    def denoise(self, x, sigma, context):
        self.calls.append((float(sigma[0]), len(context)))
        total = sum(t.values.sum((1, 2)) for t in context.streams.values())
        if context.vector is not None:
            total = total + 10 * context.vector.sum(1)
        return (self.factor * total).to(x).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def context(**streams):
    return Context({name: Tokens(torch.full((2, 3, 8), value)) for name, value in streams.items()})


X, SIGMA = torch.zeros(2, 1, 4, 4, dtype=torch.float64), torch.ones(2, dtype=torch.float64)


def guided(guidance, cond, denoiser=None, sigma=SIGMA, **others):
    denoiser = denoiser or Echo(*cond.streams, vector_width=cond.vector is not None or None)
    branches = {"cond": cond, "null": cond.zeros(), **others}
    return float(guidance.guide(denoiser, branches)(X, sigma)[0, 0, 0, 0]), denoiser


def test_each_stream_has_its_weight():
    both = context(query=1.0, neighbors=0.5)  # 24 and 12
    found, denoiser = guided(Mixture({"query": 2.0, "neighbors": 0.5}), both)
    assert found == pytest.approx(2 * 24 + 0.5 * 12)
    assert denoiser.calls == [(1.0, 6)]  # one call with three branches of two rows
    assert guided(Mixture({"query": 1.0}), both)[0] == pytest.approx(24)
    assert guided(Mixture({"neighbors": 1.0}), both)[0] == pytest.approx(12)
    assert guided(Mixture({"cond": 3.0, "neighbors": -1.0}), both)[0] == pytest.approx(96)
    vector = Context(both.streams, torch.full((2, 4), 0.25))
    assert guided(Mixture({"vector": 2.0}), vector)[0] == pytest.approx(20)


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0, 3.0])
def test_the_whole_condition_alone_is_classifier_free(scale):
    cond = context(neighbors=0.3)
    plain, _ = guided(ClassifierFree(scale), cond)
    assert guided(Mixture({"cond": scale}), cond)[0] == pytest.approx(plain)


def test_levels_choose_a_guidance():
    both = context(query=1.0, neighbors=0.5)
    parts = ((2.0, Mixture({"query": 1.0})), (0.5, Unguided()), (0.0, Mixture({"neighbors": 1.0})))
    by_level = ByLevel(parts)
    expected = {5.0: 24, 2.0: 24, 1.9: 36, 0.5: 36, 0.4: 12, 0.0: 12}
    for level, value in expected.items():
        assert guided(by_level, both, sigma=SIGMA * level)[0] == pytest.approx(value)
    inside = Interval(Mixture({"query": 1.0}), 0.5, 2.0)
    assert guided(inside, both, sigma=SIGMA)[0] == pytest.approx(24)
    assert guided(inside, both, sigma=SIGMA * 3)[0] == pytest.approx(36)


@pytest.fixture(scope="module")
def encoder():
    return HashingEncoder()


def database(encoder, direction, count=6):
    rows = direction + 0.01 * torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    return ArrayDatabase(rows, encoder.fingerprint)


@pytest.fixture
def recipe(encoder):
    return (
        Builder()
        .encoder(encoder)
        .database(database(encoder, torch.tensor([1.0] + [0.0] * 7)))
        .conditioner(NeighborEmbeddings("raw"))
        .denoiser(Echo("neighbors"))
        .sampler(Euler())
        .defaults(k=2, steps=4)
    )


def test_a_database_is_led_away_from(encoder, recipe):
    """Two tokens near e1 sum to about 2, two of the other one to about 1: 3 * 2 - 2 * 1 = 4."""
    model = recipe.build()
    other = database(encoder, torch.tensor([0.0, 0.5] + [0.0] * 6))
    asked = {"query": Query(torch.ones(3, 8)), "mode": "neighbors"}
    away = Mixture({"cond": 3.0, "negative": -2.0})
    out = model.sample(**asked, databases={"negative": other}, guidance=away)
    mine = model.database.search(asked["query"], 2).embeddings.sum((1, 2)).double()
    theirs = other.search(asked["query"], 2).embeddings.sum((1, 2)).double()
    expected = (3 * mine - 2 * theirs).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    torch.testing.assert_close(out.latents.double(), expected, rtol=0, atol=1e-4)
    assert out.settings["databases"]["negative"]["rows"] == other.fingerprint.rows
    alone = model.sample(**asked, databases={"negative": other}, guidance=away, batch_size=1)
    torch.testing.assert_close(alone.latents, out.latents)
    both = model.sample(
        **asked, databases={"art": other}, guidance=Mixture({"cond": 0.5, "art": 0.5})
    )
    torch.testing.assert_close(
        both.latents.double()[:, 0, 0, 0], (mine + theirs) / 2, rtol=0, atol=1e-4
    )


def test_databases_that_nothing_weighs_or_that_do_not_fit(encoder, recipe):
    model = recipe.build()
    other = database(encoder, torch.ones(8))
    asked = {"query": Query(torch.ones(1, 8)), "mode": "neighbors"}
    mix = Mixture({"cond": 1.0, "other": -1.0})
    with pytest.raises(ValueError, match=r"databases names 'other', but Unguided\(\) does not"):
        model.sample(**asked, databases={"other": other})
    with pytest.raises(ValueError, match=r"Mixture weighs 'other', but the branches are cond, nei"):
        model.sample(**asked, guidance=mix)
    with pytest.raises(ValueError, match=r"mode 'text'.*retrieves nothing, so databases other"):
        model.sample(prompts=["a"], mode="text", databases={"other": other}, guidance=mix)
    wide = ArrayDatabase(torch.ones(3, 4), HashingEncoder(4).fingerprint)
    with pytest.raises(ValueError, match=r"encoder.dim=8 does not match database.dim=4"):
        model.sample(**asked, databases={"other": wide}, guidance=mix)
    few = database(encoder, torch.ones(8), count=1)
    with pytest.raises(ValueError, match=r"k=2.*the database has 1 rows"):
        model.sample(**asked, databases={"other": few}, guidance=mix)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: ClassifierFree(-1.0), r"scale=-1.0 is negative.*Mixture"),
        (lambda: Mixture({}), "weights is empty"),
        (lambda: Mixture({"cond": float("nan")}), r"weights\['cond'\]=nan"),
        (lambda: ByLevel(()), "at least one, falling"),
        (lambda: ByLevel(((0.0, Unguided()), (1.0, Unguided()))), "at least one, falling"),
        (lambda: Composed((Echo("a"),), (0.5,)), "sum to 0.5"),
        (lambda: Composed((Echo("a"),), (0.5, 0.5)), "1 denoisers and 2 weights"),
        (lambda: Composed((Echo("a"), Echo("b")), (0.5, 0.5)), r"streams \{'b': 8\}.*'a': 8"),
    ],
)
def test_numbers_that_mean_nothing(make, line):
    with pytest.raises(ValueError, match=line):
        make()


def test_zero_neighbors_after_a_filter_are_named(encoder, recipe):
    records = [{"style": "oil"}] * 6
    rows = ArrayDatabase(torch.randn(6, 8), encoder.fingerprint, records)

    def asked():
        empty = rows.where("style == 'ink'")
        recipe.database(empty).build().sample(query=Query(torch.ones(1, 8)), mode="neighbors")

    with pytest.raises(ValueError, match="row") as error:
        asked()
    assert "\n" not in str(error.value)


def test_two_models_are_composed(encoder, recipe, tmp_path):
    one, other = Echo("neighbors"), Echo("neighbors", factor=3.0)
    query = Query(torch.ones(2, 8))
    made = recipe.denoiser(Composed((one, other), (0.25, 0.75))).build()
    out = made.sample(query=query, mode="neighbors", guidance=2.0)
    mine = made.database.search(query, 2).embeddings.sum((1, 2)).double()
    expected = 2 * (0.25 + 0.75 * 3) * mine
    torch.testing.assert_close(out.latents.double()[:, 0, 0, 0], expected, rtol=0, atol=1e-4)


def test_they_are_saved_with_a_model(encoder, tmp_path):
    denoiser = Composed((EDMDenoiser(small_network()), EDMDenoiser(small_network())), (0.5, 0.5))
    guidance = ByLevel(((1.0, Mixture({"cond": 2.0})), (0.0, Unguided())))
    model = (
        Builder()
        .encoder(encoder)
        .conditioner(NeighborEmbeddings("raw"))
        .denoiser(denoiser)
        .guidance(guidance)
        .defaults(k=1, steps=2)
        .build()
    )
    again = Model.load(model.save(tmp_path / "model"), encoder=encoder)
    assert again.guidance == guidance
    asked = {"prompts": ["a"], "mode": "text"}
    assert torch.equal(again.sample(**asked).images, model.sample(**asked).images)


def test_one_api_for_text_database_and_both(encoder, recipe):
    """The streams of kNN-Diffusion, weighed when sampling."""
    model = (
        recipe.conditioner(QueryAndNeighbors("raw"))
        .denoiser(Echo("query", "neighbors"))
        .set(proposal=Uniform())
        .build()
    )
    query = Query(torch.full((1, 8), 0.5))
    near = float(model.database.search(query, 2).embeddings.sum())

    def made(guidance):
        return float(
            model.sample(query=query, mode="neighbors", guidance=guidance).latents[0, 0, 0, 0]
        )

    assert made(Mixture({"query": 1.5})) == pytest.approx(6, abs=1e-3)
    assert made(Mixture({"neighbors": 1.5})) == pytest.approx(1.5 * near, abs=1e-3)
    assert made(Mixture({"query": 1.0, "neighbors": 1.0})) == pytest.approx(4 + near, abs=1e-3)
    assert isinstance(model.conditioner, QueryAndNeighbors)
    assert QueryVector(model.conditioner, "raw").vector_width(8) == 8
