"""The paper's models by name: they build offline, say what is missing, and keep their numbers."""

import functools
import inspect

import pytest
import torch

from retrodiff import presets
from retrodiff.builder import Builder
from retrodiff.checkpoints.foreign.load import fresh, load_published
from retrodiff.checkpoints.foreign.published import PUBLISHED
from retrodiff.diffusion import (
    ClassifierFree,
    Dropped,
    NeighborEmbeddings,
    QueryAndNeighbors,
    ScaledLinear,
)
from retrodiff.interfaces import Fingerprint, Query
from retrodiff.model import Model
from retrodiff.retrieval import Uniform

QUIET = {"progress": False}


@pytest.fixture
def tiny(monkeypatch):
    """The published configurations with few channels: the same graph, built in no time."""
    for name, architecture in PUBLISHED.items():
        unet = {**architecture.unet, "channels": 32, "size": 16, "blocks_per_level": 1}
        unet["multipliers"] = unet["multipliers"][:2]
        first = {**architecture.autoencoder, "channels": 32, "multipliers": [1, 1, 2]}
        from dataclasses import replace

        monkeypatch.setitem(PUBLISHED, name, replace(architecture, unet=unet, autoencoder=first))


@pytest.mark.parametrize(
    ("name", "scale", "guidance", "dim"),
    [
        ("rdm_imagenet", "raw", 2.0, 512),
        ("rdm_ffhq", "raw", 2.0, 512),
        ("rdm_768", "unit", 5.0, 768),
    ],
)
def test_they_build_offline_with_the_papers_settings(tiny, name, scale, guidance, dim):
    model = getattr(presets, name)()
    assert model.encoder.dim == dim
    assert not model.encoder.loaded
    assert model.conditioner == NeighborEmbeddings(scale, convert=False)
    assert model.guidance == ClassifierFree(guidance)
    assert model.denoiser.schedule == ScaledLinear(0.0015, 0.015 if name == "rdm_768" else 0.0195)
    assert model.database is None
    with pytest.raises(ValueError, match=r"needs|no database"):
        model.sample(n=1, **QUIET)


def test_fresh_weights_warn_and_loaded_ones_do_not(tiny):
    model = presets.rdm_imagenet()
    query = Query(torch.randn(1, 512))
    with pytest.warns(UserWarning, match="fresh weights gives noise"):
        out = model.sample(query=query, mode="text", steps=1, **QUIET)
    assert out.images.shape == (1, 3, 64, 64)
    loaded = presets.rdm_imagenet(checkpoint=fresh("rdm_imagenet"))
    loaded.sample(query=query, mode="text", steps=1, **QUIET)


def test_the_baseline_has_no_retrieval(tiny):
    model = presets.ldm_imagenet()
    assert model.denoiser.widths == {}
    with pytest.warns(UserWarning, match="fresh weights"):
        out = model.sample(n=2, steps=1, **QUIET)
    assert out.images.shape[0] == 2


def test_a_database_of_another_encoder_is_refused_without_fetching_weights(tiny):
    from retrodiff.databases import ArrayDatabase

    def database(encoder):
        fingerprint = Fingerprint(encoder=encoder, weights="abc", preprocessing="rdm-224", dim=512)
        return ArrayDatabase(torch.randn(20, 512), fingerprint)

    with pytest.raises(ValueError, match=r"open_clip:ViT-B-32-quickgelu.*timm:x"):
        presets.rdm_imagenet(database=database("timm:x"))
    right = database("open_clip:ViT-B-32-quickgelu:quick_gelu@224")
    model = presets.rdm_imagenet(database=right, proposal=Uniform())
    assert not model.encoder.loaded
    with pytest.warns(UserWarning, match="fresh weights"):
        assert model.sample(n=1, steps=1, **QUIET).neighbors.k == 4


def test_an_unknown_or_contradicted_scale_is_refused(tiny):
    from dataclasses import replace

    published = fresh("rdm_imagenet")
    with pytest.raises(ValueError, match="trained on raw embeddings, but scale='unit'"):
        presets.from_published(published, scale="unit")
    with pytest.raises(ValueError, match=r"does not say.*scale='raw'.*scale='unit'"):
        presets.from_published(replace(published, scale=None))


def stored(scale, name="open_clip:ViT-L-14-quickgelu:quick_gelu@224", dim=768):
    """A database of a preset's own encoder at either scale."""
    from retrodiff.databases import ArrayDatabase

    vectors = torch.randn(20, dim, generator=torch.Generator().manual_seed(0)) * 3
    if scale == "unit":
        vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    fingerprint = Fingerprint(
        encoder=name, weights="abc", preprocessing="rdm-224", dim=dim, scale=scale
    )
    return ArrayDatabase(vectors, fingerprint)


REFUSED = r"trained on unit embeddings, but the database stores raw ones.*convert_scale=True"


def test_a_raw_database_with_a_unit_checkpoint_is_refused_until_told(tiny, tmp_path):
    """At every joint: building, swapping, loading; and the conversion is the one that is meant."""
    published = fresh("rdm_768")
    with pytest.raises(ValueError, match=REFUSED) as error:
        presets.rdm_768(checkpoint=published, database=stored("raw"))
    assert "\n" not in str(error.value)
    assert "--convert-scale" in str(error.value)
    with pytest.raises(ValueError, match=REFUSED):
        presets.from_published(published, database=stored("raw")).build()
    unit = presets.rdm_768(checkpoint=published, database=stored("unit"), proposal=Uniform())
    with pytest.raises(ValueError, match=REFUSED):
        unit.replace(database=stored("raw"))
    folder = unit.replace(database=None).save(tmp_path / "model")
    with pytest.raises(ValueError, match=REFUSED):
        Model.load(folder, database=stored("raw"))
    told = Model.load(folder, database=stored("raw"), conditioner=NeighborEmbeddings("unit"))
    told = told.replace(proposal=Uniform())
    asked = presets.rdm_768(
        checkpoint=published, database=stored("raw"), proposal=Uniform(), convert_scale=True
    )
    by_hand = unit.sample(n=2, steps=1, **QUIET)
    for model in (told, asked):
        out = model.sample(n=2, steps=1, **QUIET)
        assert torch.equal(out.neighbors.indices, by_hand.neighbors.indices)
        tokens = model.conditioner.condition(out.query, out.neighbors).streams["neighbors"].values
        torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(2, 11))
        torch.testing.assert_close(out.latents, by_hand.latents, rtol=1e-2, atol=1e-2)


def test_a_unit_database_with_a_raw_checkpoint_cannot_be_converted(tiny):
    name = "open_clip:ViT-B-32-quickgelu:quick_gelu@224"
    line = "takes raw embeddings, but the database stores unit ones, whose norms are lost"
    with pytest.raises(ValueError, match=line):
        presets.rdm_imagenet(database=stored("unit", name, 512))
    assert presets.rdm_imagenet(database=stored("raw", name, 512)).database is not None
    with pytest.raises(ValueError, match=line):
        presets.from_published(
            fresh("rdm_imagenet"), database=stored("unit", name, 512), convert_scale=True
        ).build()


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: Dropped(c, 0.1)], ids=["plain", "dropped"])
def test_conditioners_know_which_databases_they_take(wrap):
    def taken(conditioner):
        return [wrap(conditioner).refuses(scale) is None for scale in ("raw", "unit")]

    assert taken(NeighborEmbeddings("raw")) == [True, False]
    assert taken(NeighborEmbeddings("unit")) == [True, True]
    assert taken(NeighborEmbeddings("unit", convert=False)) == [False, True]
    assert taken(QueryAndNeighbors("raw")) == [True, False]
    assert taken(QueryAndNeighbors("unit")) == [True, True]


def test_one_published_model_is_not_loaded_as_another(tiny):
    with pytest.raises(ValueError, match=r"is the model rdm_768, not rdm_imagenet.*rdm_768\("):
        presets.rdm_imagenet(checkpoint=fresh("rdm_768"))


def test_the_open_recipe_can_be_changed(tiny):
    recipe = Builder.from_preset(presets.rdm_imagenet).sampler("plms").defaults(k=8)
    assert recipe.build().k == 8


def test_a_missing_checkpoint_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere/model.ckpt is neither"):
        load_published("nowhere/model.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no.such.file.ckpt"):
        presets.rdm_imagenet(checkpoint="no.such.file.ckpt")


@pytest.mark.parametrize("name", ["rdm_imagenet", "rdm_ffhq", "rdm_768", "ldm_imagenet"])
def test_every_model_of_a_recipe_has_networks_of_its_own(tiny, name):
    recipe = Builder.from_preset(getattr(presets, name))
    one, other = recipe.build(), recipe.build()
    for part in ("denoiser", "autoencoder"):
        mine, theirs = (set(map(id, getattr(m, part).parameters())) for m in (one, other))
        assert not mine & theirs
    weight = [next(m.denoiser.parameters()) for m in (one, other)]
    assert not torch.equal(*weight)  # fresh ones, not copies


def test_models_of_one_checkpoint_do_not_share_what_is_trained(tiny):
    published = fresh("rdm_imagenet")
    one, other = (presets.rdm_imagenet(checkpoint=published) for _ in range(2))
    mine, theirs = (set(map(id, m.denoiser.parameters())) for m in (one, other))
    assert not mine & theirs
    for a, b in zip(one.denoiser.parameters(), other.denoiser.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_unknown_argument_is_named(tiny):
    with pytest.raises(TypeError, match=r"no argument smapler: it takes checkpoint"):
        presets.rdm_imagenet(smapler=1)
    model = presets.rdm_imagenet(sampler="plms", guidance=ClassifierFree(3.0), k=2)
    assert (repr(model.sampler), model.guidance.scale, model.k) == ("PLMS()", 3.0, 2)


@pytest.mark.parametrize("through", [lambda f, **x: f(**x), Builder.from_preset])
def test_no_preset_swallows_an_unknown_argument(through):
    for name in presets.__all__:
        with pytest.raises(TypeError, match=r"sizes"):
            through(getattr(presets, name), sizes=8)
    with pytest.raises(TypeError, match="ldm has no argument size: it takes encoder, latent"):
        through(presets.ldm, size=8)


def test_a_partial_preset_is_a_preset(tiny):
    fewer = functools.partial(presets.rdm_imagenet, k=2)
    assert Builder.from_preset(fewer, sampler="plms").build().k == 2
    with pytest.raises(TypeError, match="rdm_imagenet has no argument size"):
        Builder.from_preset(fewer, size=8)


def test_a_preset_of_ones_own_may_take_any_argument():
    def mine(**options: object) -> Builder:
        return Builder.from_preset(presets.ldm, channels=options["width"])

    assert Builder.from_preset(mine, width=64).build() is not None


def test_the_papers_preset_fits_on_a_page():
    lines = inspect.getsource(presets.rdm_imagenet.recipe).splitlines()
    assert len(lines) <= 40
