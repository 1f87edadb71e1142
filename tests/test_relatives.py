"""The systems around the paper: their parts against formulas, and what does not fit together."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from parts import HashingEncoder

from retrodiff import presets
from retrodiff.builder import Builder
from retrodiff.databases import ArrayDatabase
from retrodiff.diffusion import (
    ClassifierFree,
    DiffusionPrior,
    Dropped,
    EDMDenoiser,
    Mixture,
    Noised,
    QueryAndNeighbors,
    QueryOnly,
    QueryVector,
    Unconditional,
    VectorTokens,
)
from retrodiff.encoders import ClassNames
from retrodiff.interfaces import Neighbors, Query, Randomness, unit
from retrodiff.model import Model
from retrodiff.networks.dit import DiT
from retrodiff.presets import relatives
from retrodiff.retrieval import (
    ExcludeSelf,
    Instances,
    NearestNeighbors,
    interpolated,
    neighbor_table,
)
from retrodiff.testing import check_conditioner, check_proposal
from retrodiff.training import Pairing, TrainingSet, fit

NAMES = (
    "instance_conditioned",
    "knn_diffusion",
    "ldm",
    "region_retrieval",
    "unclip",
    "unclip_prior",
)


@pytest.fixture(scope="module")
def encoder():
    return HashingEncoder()


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def embeddings(encoder, pictures):
    return encoder.encode_image(pictures)


@pytest.fixture(scope="module")
def database(encoder, embeddings):
    return ArrayDatabase(embeddings, encoder.fingerprint)


def alive(model):
    """With weights that are not zero at the end, so that results differ."""
    torch.manual_seed(0)
    for parameter in model.denoiser.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def learned(model, data):
    return fit(model, data, steps=2, batch_size=8, lr=1e-3, progress=False).model


# --- presets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_fits_on_a_page(name):
    assert len(inspect.getsource(getattr(presets, name).recipe).splitlines()) <= 60


def test_nothing_asks_which_preset_it_is():
    for path in Path(relatives.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.If, ast.IfExp)):
                said = {n.value for n in ast.walk(node.test) if isinstance(n, ast.Constant)}
                assert not said & {*NAMES, *presets.__all__}, f"{path}:{node.lineno}"


def test_streams_of_different_widths_are_refused(encoder):
    line = r"streams have widths \{'query': 8, 'neighbors': 4\}"
    with pytest.raises(ValueError, match=line):
        relatives._small({"query": 8, "neighbors": 4}, None, {})
    recipe = Builder.from_preset(presets.knn_diffusion, encoder=encoder)
    with pytest.raises(ValueError, match=r"dim=16.*'query': 16.*takes.*'query': 8"):
        recipe.encoder(HashingEncoder(16)).build()


# --- latent diffusion ----------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [ClassifierFree(3.0), Mixture({"cond": 3.0})])
def test_guidance_of_a_model_without_conditions_changes_nothing(guidance):
    model = alive(presets.ldm())
    guided = model.sample(n=2, steps=2, seed=0, guidance=guidance).images
    assert torch.equal(guided, model.sample(n=2, steps=2, seed=0).images)


def test_the_baseline_retrieves_nothing(pictures):
    model = learned(presets.ldm(), TrainingSet.alone(pictures))
    out = model.sample(n=3, steps=2)
    assert out.images.shape == (3, 1, 8, 8)
    assert (out.neighbors.indices == -1).all()
    assert model.database is None


def test_a_class_is_a_token(pictures):
    names = ClassNames(("cat", "dog", "owl"))
    model = alive(presets.ldm(encoder=names))
    out = model.sample(classes=["dog", "owl", "dog"], steps=2, guidance=1)
    assert out.query.embedding.tolist() == [[0, 1, 0], [0, 0, 1], [0, 1, 0]]
    context = model.conditioner.condition(out.query, out.neighbors)
    assert torch.equal(context.streams["query"].values, out.query.embedding.unsqueeze(1))
    data = TrainingSet.alone(pictures, names.encode_text(["cat", "dog"] * 20))
    assert learned(model, data).sample(classes=["owl"], steps=2).images.shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="no class is called 'cow': the classes are cat, dog, owl"):
        model.sample(classes=["cow"])
    with pytest.raises(ValueError, match="ClassNames knows names only"):
        model.sample(images=pictures[:1])
    with pytest.raises(ValueError, match="3 classes, 2 of them different"):
        ClassNames(("a", "b", "a"))


def test_images_alone_train_no_model_that_retrieves(encoder, database, pictures):
    with pytest.raises(ValueError, match=r"k=10, but the training set keeps 0 neighbors"):
        learned(
            presets.knn_diffusion(encoder=encoder, database=database),
            TrainingSet.alone(pictures, torch.zeros(40, 8)),
        )


# --- kNN-Diffusion -------------------------------------------------------------------------------


def test_query_and_neighbors_stay_apart_in_every_mode(encoder, database):
    model = presets.knn_diffusion(encoder=encoder, database=database)
    query = Query(encoder.encode_text(["a", "b"]))
    streams = {
        mode: model.conditioner.condition(query, model.neighbors(query, mode, 10)).streams
        for mode in ("neighbors", "text+neighbors", "text")
    }
    near = database.search(query, 10)
    for parts in streams.values():
        assert torch.equal(parts["query"].values, unit(query.embedding).unsqueeze(1))
    assert torch.equal(streams["neighbors"]["neighbors"].values, unit(near.embeddings))
    assert streams["neighbors"]["neighbors"].mask.all()
    mixed = streams["text+neighbors"]["neighbors"]
    assert mixed.mask.tolist() == [[False, *[True] * 9]] * 2
    torch.testing.assert_close(mixed.values[:, 1:], unit(near.embeddings[:, :9]))
    alone = streams["text"]["neighbors"]  # as a dropped stream: tokens of zeros that take part
    assert not alone.values.any()
    assert alone.mask.all()


def test_two_streams_learn_and_are_asked_in_every_mode(encoder, database, pictures):
    data = TrainingSet.of(
        pictures, encoder, database, ExcludeSelf(NearestNeighbors()), 10, progress=False
    )
    model = learned(presets.knn_diffusion(encoder=encoder, database=database), data)
    modes = ("neighbors", "text+neighbors", "text")
    out = model.sample(prompts=["a", "b", "c"], mode=modes, steps=2)
    assert out.images.isfinite().all()
    edited = model.sample(prompts=["a"], start=pictures[0], strength=0.5, steps=4)
    assert edited.images.shape == (1, 1, 8, 8)


# --- instances -----------------------------------------------------------------------------------


def test_a_target_is_a_neighbor_of_its_condition_and_never_itself(database, embeddings):
    query = Query(embeddings, ids=torch.arange(40))
    pairs = Pairing.from_table(
        neighbor_table(query, database, 5, ExcludeSelf(NearestNeighbors()), progress=False)
    )
    assert len(pairs) == 200
    assert (pairs.condition != pairs.target).all()
    cosine = unit(embeddings.double()) @ unit(embeddings.double()).T
    cosine.fill_diagonal_(-2)
    for i in range(40):
        mine = pairs.target[pairs.condition == i]
        assert set(mine.tolist()) == set(cosine[i].topk(5).indices.tolist())


def test_instances_stand_for_every_cluster(encoder):
    """Against scikit-learn: of well separated clusters, one instance each."""
    from sklearn.cluster import KMeans

    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(8)[:6]
    rows = centers.repeat_interleave(20, 0) + 0.05 * torch.randn(120, 8, generator=generator)
    database = ArrayDatabase(rows, encoder.fingerprint)
    best = 0
    labels = KMeans(6, n_init=10, random_state=0).fit_predict(unit(rows).numpy())
    for seed in range(5):
        found = Instances.fit(database, 6, seed=seed)
        best = max(best, len({labels[row] for row in found.rows.tolist()}))
        check_proposal(found, database)
    assert best == 6
    assert torch.equal(Instances.fit(database, 6, 1).rows, Instances.fit(database, 6, 1).rows)
    assert len(Instances.fit(database, 120).rows) == 120
    with pytest.raises(ValueError, match="count=121 instances of a database of 120 rows"):
        Instances.fit(database, 121)
    other = ArrayDatabase(rows.flip(0), encoder.fingerprint)
    with pytest.raises(ValueError, match=r"another database.*Instances.fit"):
        found.support(other)


def test_instances_of_the_database_condition_without_neighbors(encoder, database, pictures):
    chosen = Instances.fit(database, 4)
    model = alive(presets.instance_conditioned(encoder=encoder, database=database, proposal=chosen))
    out = model.sample(n=6, steps=2)
    assert set(out.query.ids.tolist()) <= set(chosen.rows.tolist())
    assert torch.equal(out.query.embedding, database.embeddings(out.query.ids))
    asked = model.sample(query=Query(out.query.embedding), steps=2)
    torch.testing.assert_close(asked.images, out.images)
    assert model.sample(images=pictures[:2], steps=2).images.shape == (2, 1, 8, 8)
    assert presets.instance_conditioned(encoder=encoder).database is None


# --- unCLIP --------------------------------------------------------------------------------------

VECTOR = QueryVector(Unconditional(), "unit")


@pytest.mark.parametrize(
    "conditioner",
    [
        Noised(VECTOR, 0.5),
        VectorTokens(VECTOR, dim=8, tokens=4, width=16),
        Dropped(VectorTokens(Noised(VECTOR, 0.5), dim=8, tokens=4, width=16), 0.1),
        VectorTokens(
            QueryVector(QueryAndNeighbors("raw"), "raw"), dim=8, tokens=2, width=4, stream="extra"
        ),
    ],
    ids=["noised", "tokens", "unclip", "beside streams"],
)
def test_they_keep_the_contract(conditioner):
    check_conditioner(conditioner)


def test_an_embedding_enters_twice(encoder, embeddings):
    """Vector and four tokens, against the formula in float64; the null is zero everywhere."""
    model = presets.unclip(encoder=encoder)
    query = Query(embeddings[:3])
    context = model.conditioner.condition(query, Neighbors.of_query(query))
    direction = embeddings[:3].double() / embeddings[:3].double().norm(dim=1, keepdim=True)
    vector = torch.cat([direction, torch.zeros(3, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(context.vector.double(), vector, rtol=0, atol=1e-6)
    (layer,) = [m for m in model.conditioner.conditioner.modules() if type(m) is torch.nn.Linear]
    tokens = (vector @ layer.weight.double().T).reshape(3, 4, -1)
    found = context.streams["query"].values.double()
    torch.testing.assert_close(found, tokens, rtol=0, atol=1e-5)
    null = model.conditioner.null(context)
    assert not null.vector.any()
    assert not null.streams["query"].values.any()


def test_noise_is_as_strong_as_it_says_and_tokens_show_the_same(embeddings):
    inner = Noised(VECTOR, 0.5)
    query = Query(embeddings[:1].expand(4000, -1))
    made = VectorTokens(inner, dim=8, tokens=2, width=3)
    context = made.condition(query, Neighbors.of_query(query))
    noisy = made.drop(context, Randomness.of(0, range(4000), "drop"))
    level = noisy.vector[:, -1]
    assert 0 <= float(level.min()) < 0.01
    assert 0.49 < float(level.max()) <= 0.5
    noise = (noisy.vector - context.vector)[:, :-1] / level.unsqueeze(1)
    # The vector has norm 1: noise of level 1 has the same norm, on average.
    assert float(noise.square().sum(1).mean()) == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(noisy.streams["query"].values.flatten(1), made.project(noisy.vector))
    again = made.drop(context, Randomness.of(0, range(4000), "drop"))
    assert torch.equal(noisy.vector, again.vector)
    told = Noised(VECTOR, 0.5, level=0.2).condition(query, Neighbors.of_query(query))
    assert (told.vector[:, -1] == 0.2).all()
    assert torch.equal(told.vector[:, :-1], context.vector[:, :-1])


def test_noise_and_tokens_need_a_vector():
    with pytest.raises(ValueError, match=r"Noised has no vector.*QueryOnly"):
        Noised(QueryOnly("unit"), 0.1).vector_width(8)
    with pytest.raises(ValueError, match=r"around QueryOnly, which gives no vector"):
        VectorTokens(QueryOnly("unit"), dim=8, tokens=1, width=2)
    with pytest.raises(ValueError, match="has a stream 'query' already"):
        VectorTokens(QueryVector(QueryOnly("unit"), "unit"), dim=8, tokens=1, width=2)
    with pytest.raises(ValueError, match=r"level=0\.9"):
        Noised(VECTOR, 0.5, level=0.9)


def prior_model(encoder, embeddings):
    return presets.unclip_prior(encoder=encoder, embeddings=embeddings, width=16, depth=1)


def test_of_two_draws_the_nearer_is_kept(encoder, embeddings):
    model = alive(prior_model(encoder, embeddings))
    texts = encoder.encode_text(["a", "b", "c", "d"])

    def drawn(draws, steps=3):
        prior = DiffusionPrior(model.diffusion(), steps, draws, norm=2.5)
        return prior.translate(texts, Randomness.of(0, range(4), "prior"))

    one, two = drawn(1), drawn(2)
    torch.testing.assert_close(two.norm(dim=1), torch.full((4,), 2.5))
    near = [torch.cosine_similarity(x, texts) for x in (one, two)]
    assert (near[1] >= near[0] - 1e-6).all()
    assert bool((near[1] > near[0] + 1e-3).any())
    alone = DiffusionPrior(model.diffusion(), 3, 2, norm=2.5).translate(
        texts[2:3], Randomness.of(0, [2], "prior")
    )
    torch.testing.assert_close(alone, two[2:3], rtol=0, atol=1e-4)


def test_a_prior_draws_the_embeddings_it_was_trained_on(encoder):
    """Two texts with one image embedding each: after a short training, those are what it gives."""
    texts = unit(encoder.encode_text(["a", "b"]))
    goal = unit(torch.randn(2, 8, generator=torch.Generator().manual_seed(5)))
    spread = 0.05 * torch.randn(64, 8, generator=torch.Generator().manual_seed(6))
    images = unit(goal.repeat(32, 1) + spread)
    torch.manual_seed(0)
    model = presets.unclip_prior(encoder=encoder, embeddings=images, width=32, depth=2)
    data = TrainingSet.alone(images[:, :, None, None], texts.repeat(32, 1))
    model = fit(model, data, steps=250, batch_size=64, lr=3e-3, ema=0.9, progress=False).model
    drawn = DiffusionPrior(model.diffusion()).translate(texts, torch.Generator().manual_seed(0))
    cosine = drawn @ goal.T
    assert (cosine.diagonal() > 0.9).all()
    assert (cosine.argmax(1) == torch.arange(2)).all()


def test_a_prior_turns_prompts_and_leaves_pictures_alone(encoder, embeddings, pictures, tmp_path):
    prior = DiffusionPrior(alive(prior_model(encoder, embeddings)).diffusion(), steps=2, norm=3.0)
    model = alive(presets.unclip(encoder=encoder, prior=prior))
    out = model.sample(prompts=["a", "b"], steps=2)
    torch.testing.assert_close(out.query.embedding.norm(dim=1), torch.full((2,), 3.0))
    varied = model.sample(images=[pictures[0], pictures[0]], steps=2)
    assert torch.equal(varied.query.embedding[0], varied.query.embedding[1])
    assert not torch.equal(varied.images[0], varied.images[1])
    again = Model.load(model.save(tmp_path / "unclip"), encoder=encoder)
    assert torch.equal(again.sample(prompts=["a", "b"], steps=2).images, out.images)


def test_a_prior_needs_the_encoder_that_it_was_trained_with(encoder, embeddings, pictures):
    prior = DiffusionPrior(prior_model(encoder, embeddings).diffusion())

    class Eyes:
        """An encoder of images without a text tower."""

        dim, fingerprint = encoder.dim, encoder.fingerprint
        encode_image = staticmethod(encoder.encode_image)

    recipe = Builder.from_preset(presets.unclip, encoder=encoder, prior=prior)
    with pytest.raises(ValueError, match=r"prompts need an encoder of text, but Eyes"):
        recipe.encoder(Eyes()).build().sample(prompts=["a"])
    with pytest.raises(ValueError, match="prompts need an encoder and this model has none"):
        recipe.set(encoder=None).build().sample(prompts=["a"])
    wide = Builder.from_preset(presets.unclip, encoder=HashingEncoder(16), prior=prior)
    with pytest.raises(ValueError, match=r"shape \(1, 16\), but the prior.*width of 8"):
        wide.build().sample(prompts=["a"])
    for wrong in ({"draws": 0}, {"steps": 0}, {"norm": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DiffusionPrior(prior.generator, **wrong)


def test_between_two_embeddings(embeddings):
    """Both ends themselves, equal angles, on the plane of the two: Shoemake's formula."""
    one, other = embeddings[0], embeddings[1]
    query = interpolated(one, other, 5)
    assert len(query) == 5
    torch.testing.assert_close(query.embedding[0], one)
    torch.testing.assert_close(query.embedding[-1], other)
    u = unit(query.embedding.double())
    angles = (u[:-1] * u[1:]).sum(1).acos()
    torch.testing.assert_close(angles, angles[:1].expand(4), rtol=0, atol=1e-5)
    assert int(torch.linalg.matrix_rank(query.embedding.double(), tol=1e-4)) == 2
    same = interpolated(one, one, 3).embedding
    torch.testing.assert_close(same, one.expand(3, -1))
    assert query.ids.tolist() == [-1] * 5
    with pytest.raises(ValueError, match=r"\(8,\) and \(7,\)"):
        interpolated(one, other[:7], 3)
    with pytest.raises(ValueError, match="opposite"):
        interpolated(one, -one, 3)
    with pytest.raises(ValueError, match="n=1"):
        interpolated(one, other, 1)


def test_a_prior_is_any_network_of_one_position():
    network = DiT(shape=(8, 1, 1), patch=1, width=16, depth=1, heads=2, widths={"query": 8})
    assert EDMDenoiser(network).shape == (8, 1, 1)
