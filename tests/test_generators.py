"""The seam for what is no diffusion model; conditioners with weights, and wrappers around them."""

import dataclasses

import pytest
import torch
from parts import small_network
from torch import nn

from retrodiff.builder import Builder
from retrodiff.components import first_not_finite, inside, modules, summary, where
from retrodiff.diffusion import (
    Dropped,
    EDMDenoiser,
    LearnedNull,
    NeighborEmbeddings,
    Projected,
    QueryAndNeighbors,
    QueryVector,
    Unconditional,
    Wrapper,
)
from retrodiff.interfaces import (
    Conditioner,
    Context,
    Generator,
    Query,
    Tokens,
    TrainableGenerator,
)
from retrodiff.model import Model
from retrodiff.model.checks import refusal
from retrodiff.networks.unet import UNet
from retrodiff.randomness import normal_like
from retrodiff.retrieval import Uniform
from retrodiff.testing import check_conditioner, check_generator, small_database


class Painter(nn.Module):
    """A foreign generator: colors from the mean of the tokens, no noise levels, no denoiser."""

    shape, widths = (1, 8, 8), {"neighbors": 8}

    def __init__(self):
        super().__init__()
        self.color = nn.Linear(8, 1)

    def generate(self, context, null, noise, *, steps, generator=None, callback=None):
        color = self.color(context.streams["neighbors"].values.mean(1))
        return color.view(-1, 1, 1, 1) + 0.1 * noise

    def decode(self, latents):
        return latents.clamp(-1, 1)

    def loss(self, images, context, generator=None):
        color = self.color(context.streams["neighbors"].values.mean(1))
        return (images.mean((1, 2, 3)) - color[:, 0]).square()


@pytest.fixture
def foreign(encoder, database):
    torch.manual_seed(0)
    return (
        Builder()
        .encoder(encoder)
        .database(database)
        .proposal(Uniform())
        .conditioner(NeighborEmbeddings("raw"))
        .generator(Painter())
    )


def test_a_foreign_generator_samples_trains_saves_and_loads(foreign, tmp_path):
    model = foreign.build()
    out = model.sample(prompts=["a", "b", "c"], batch_size=2, seed=1)
    assert out.images.shape == (3, 1, 8, 8)
    assert out.neighbors.k == 4
    assert "Painter" in out.settings["generator"]
    torch.testing.assert_close(model.sample(prompts=["a"], seed=1).images, out.images[:1])
    query = Query(torch.randn(2, 8))
    loss = model.loss(torch.zeros(2, 1, 8, 8), query, model.database.search(query, 4))
    assert loss.shape == (2,)
    assert loss.requires_grad
    model.save(tmp_path / "m")
    again = Model.load(
        tmp_path / "m", generator=Painter(), encoder=model.encoder, database=model.database
    )
    assert torch.equal(again.sample(prompts=["a"], seed=1).images, out.images[:1])


def test_what_a_foreign_generator_does_not_take_is_refused_in_one_line(foreign):
    model = foreign.build()
    for wrong, message in (
        ({"sampler": "ddim"}, r"sampler='ddim' has no effect.*Painter, which has no sampler"),
        ({"guidance": 2.0}, r"guidance=2.0 has no effect.*Painter"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            model.sample(n=1, **wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"\{'query': 8, 'neighbors': 8\}.*generator takes"):
        foreign.conditioner(QueryAndNeighbors("raw")).build()
    with pytest.raises(ValueError, match=r"a vector of width 8.*generator takes no vector"):
        foreign.conditioner(QueryVector(NeighborEmbeddings("raw"), "raw")).build()
    with pytest.raises(ValueError, match=r"denoiser=EDMDenoiser has no effect beside generator"):
        foreign.denoiser(EDMDenoiser(small_network())).build()
    with pytest.raises(ValueError, match=r"generator=Painter is a class: .*Painter\(\.\.\.\)"):
        foreign.generator(Painter).build()
    with pytest.raises(ValueError, match=r"generator=str is no Generator: it has no shape"):
        foreign.generator("diffusion").build()
    with pytest.raises(ValueError, match=r"streams \{'query': 8\}, but Painter takes"):
        model.sample_latents(context=Context.of(torch.randn(1, 2, 8), "query"), noise=noise(1))
    with pytest.raises(ValueError, match=r"Painter and has no denoiser"):
        model.diffusion()


def noise(rows):
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(rows))


def test_the_diffusion_generator_is_one_of_them(model):
    generator = model.generating()
    assert isinstance(generator, Generator)
    assert isinstance(generator, TrainableGenerator)
    assert isinstance(Painter(), TrainableGenerator) is False  # a duck lacks optional members
    assert generator.widths == {"neighbors": 8}
    assert generator.vector_width is None


# --- contexts that do not fit ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": torch.randn(2, 3, 8), "noise": noise(1)}, r"context has 2 rows for 1 images"),
        ({"context": torch.randn(1, 3, 8), "noise": noise(2)}, r"context has 1 rows for 2 images"),
        ({"context": torch.randn(3, 3, 8), "noise": noise(2)}, r"context has 3 rows for 2 images"),
        ({"context": torch.randn(2, 8), "noise": noise(1)}, r"tokens of shape \(2, 8\)"),
        ({"context": torch.randn(1, 3, 7), "noise": noise(1)}, r"'neighbors': 7.*takes"),
        (
            {
                "context": torch.randn(1, 3, 8),
                "null": torch.zeros(1, 2, 8),
                "noise": noise(1),
            },
            r"null has neighbors \(2, 8\), but the context neighbors \(3, 8\)",
        ),
        (
            {"context": torch.randn(1, 3, 8), "noise": torch.randn(1, 3, 8, 8)},
            r"noise has shape \(1, 3, 8, 8\), expected \(b, 1, h, w\)",
        ),
        ({"context": torch.randn(1, 3, 8), "noise": noise(1), "steps": 0}, r"steps=0"),
    ],
)
def test_contexts_that_do_not_fit_are_refused_in_one_line(model, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        model.sample_latents(**arguments)
    assert "\n" not in str(error.value)


def test_contexts_are_joined_only_if_alike():
    one = Context.of(torch.zeros(1, 3, 8))
    for other in (
        Context.of(torch.zeros(1, 2, 8)),
        Context.of(torch.zeros(1, 3, 8), "query"),
        Context(one.streams, torch.zeros(1, 4)),
    ):
        with pytest.raises(ValueError, match=r"cannot be joined"):
            Context.cat([one, other])
    assert len(Context.cat([one, one])) == 2


# --- wrappers ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Forgetful:
    """A wrapper that is no subclass and forgets all that is optional."""

    held: object
    uses_neighbors: bool = True

    def widths(self, dim):
        return self.held.widths(dim)

    def condition(self, query, neighbors):
        return self.held.condition(query, neighbors)

    def null(self, context):
        return self.held.null(context)

    def drop(self, context, generator=None):
        return context


class Halved(Conditioner):
    """A subclass that does not mention `refuses`."""

    def __init__(self, inner):
        self.inner = [inner]

    def widths(self, dim):
        return self.inner[0].widths(dim)

    def condition(self, query, neighbors):
        return self.inner[0].condition(query, neighbors)


class Converting(Wrapper):
    """A wrapper that knows better than what it wraps."""

    def __init__(self, conditioner):
        self.conditioner = conditioner

    def refuses(self, stored):
        return None


RAW = NeighborEmbeddings("raw")


@pytest.mark.parametrize(
    "conditioner",
    [
        RAW,
        Dropped(RAW, 0.1),
        Dropped(Dropped(RAW, 0.1), 0.1),
        Forgetful(RAW),
        Forgetful(Dropped(Forgetful(RAW), 0.1)),
        Halved(RAW),
        Dropped(Halved(RAW), 0.1),
        Projected(RAW, dim=8, width=4),
        Dropped(LearnedNull(Projected(RAW, dim=8, width=4), dim=8), 0.5),
        QueryVector(RAW, "raw"),
        QueryAndNeighbors("raw"),
        Forgetful(QueryAndNeighbors("raw")),
    ],
)
def test_no_wrapper_switches_the_scale_check_off(conditioner, recipe):
    assert "norms are lost" in refusal(conditioner, "unit")
    assert refusal(conditioner, "raw") is None
    stored = small_database()
    fingerprint = dataclasses.replace(stored.fingerprint, scale="unit")
    from retrodiff.databases import ArrayDatabase

    unit = ArrayDatabase(stored.embeddings(torch.arange(32)), fingerprint)
    if conditioner.widths(8) == {"neighbors": 8} and not isinstance(conditioner, QueryVector):
        with pytest.raises(ValueError, match=r"norms are lost"):
            recipe.set(encoder=None, conditioner=conditioner, database=unit).build()


def test_a_wrapper_that_speaks_has_the_last_word():
    assert refusal(Converting(RAW), "unit") is None
    assert refusal(Forgetful(Converting(RAW)), "unit") is None


@pytest.mark.parametrize(
    "conditioner",
    [
        Projected(RAW, dim=8, width=4),
        Projected(QueryAndNeighbors("unit"), dim=8, width=4),
        LearnedNull(RAW, dim=8),
        LearnedNull(QueryVector(RAW, "raw"), dim=8),
        Dropped(LearnedNull(Projected(RAW, dim=8, width=4), dim=8), 0.5),
        QueryVector(Unconditional(), "unit"),
    ],
    ids=summary,
)
def test_learned_conditioners_keep_the_contract(conditioner):
    check_conditioner(conditioner)


def test_weights_are_found_inside_wrappers_and_move():
    held = Dropped(LearnedNull(Projected(RAW, dim=8, width=4), dim=8), 0.5)
    assert [type(m).__name__ for m in modules(held)] == ["LearnedNull"]
    names = {name for name, _ in modules(held)[0].named_parameters()}
    assert names == {"token.neighbors", "conditioner.project.neighbors.weight"}
    assert [type(p).__name__ for p in inside(held)][:3] == ["Dropped", "LearnedNull", "Projected"]
    assert where(held) == (torch.device("cpu"), torch.float32)
    assert where(RAW) is None
    assert modules(Forgetful([held, held])) == modules(held)
    with torch.no_grad():
        held.conditioner.token["neighbors"][0] = torch.nan
    assert first_not_finite(held) == "token.neighbors"


def learned(recipe, encoder):
    torch.manual_seed(3)
    conditioner = Dropped(LearnedNull(Projected(RAW, dim=8, width=6), dim=8), 0.5)
    return (
        recipe.conditioner(conditioner)
        .denoiser(EDMDenoiser(small_network(dim=6)))
        .defaults(k=2, steps=2)
    )


def test_a_learned_conditioner_samples_learns_moves_and_saves(recipe, encoder, tmp_path):
    model = learned(recipe, encoder).build()
    query = Query(torch.randn(6, 8))
    near = model.database.search(query, 2)
    context = model.conditioner.condition(query, near)
    dropped = model.conditioner.drop(context, torch.Generator().manual_seed(0))
    token = model.conditioner.conditioner.token["neighbors"]
    hidden = (dropped.streams["neighbors"].values == token).all(-1).all(-1)
    assert 0 < int(hidden.sum()) < 6
    assert dropped.streams["neighbors"].null_rows == 0
    seeded = torch.Generator().manual_seed(0)
    model.loss(torch.zeros(6, 1, 8, 8), query, near, seeded).mean().backward()
    for module in modules(model.conditioner):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    one = model.sample(prompts=["a"], seed=2)
    model.save(tmp_path / "m")
    again = Model.load(tmp_path / "m", encoder=encoder, database=model.database)
    assert torch.equal(again.sample(prompts=["a"], seed=2).images, one.images)
    assert model.bfloat16() is model
    assert where(model.conditioner)[1] == torch.bfloat16
    assert where(model.denoiser)[1] == torch.bfloat16
    half = model.sample(prompts=["a"], seed=2)
    assert half.images.dtype == torch.float32
    assert float((half.images - one.images).abs().mean()) < 0.1


def test_projected_refuses_another_encoder(recipe):
    with pytest.raises(ValueError, match=r"made for embeddings of dim=9, not 8"):
        recipe.conditioner(Projected(RAW, dim=9, width=8)).build()


def test_a_vector_joins_the_time_embedding(recipe, encoder):
    def network(width):
        torch.manual_seed(0)
        net = UNet(
            in_channels=1,
            out_channels=1,
            size=8,
            channels=32,
            multipliers=(1,),
            blocks_per_level=1,
            attention_factors=(),
            context_width=8,
            vector_width=width,
        )
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.05)
        return EDMDenoiser(net)

    vector = recipe.conditioner(QueryVector(RAW, "unit"))
    model = vector.denoiser(network(8)).build()
    fixed = {"query": Query(torch.eye(8)[:2]), "mode": "neighbors", "seed": 1}
    out = model.sample(**fixed)
    assert out.images.isfinite().all()
    noise = torch.zeros(1, 1, 8, 8)
    tokens = Tokens(torch.ones(1, 2, 8))
    one, other = (
        model.sample_latents(context=Context({"neighbors": tokens}, vector), noise=noise)
        for vector in torch.eye(8)[:2, None]
    )
    assert not torch.allclose(one, other)
    with pytest.raises(ValueError, match=r"a vector of width 8 .*denoiser takes no vector"):
        vector.denoiser(network(None)).build()
    with pytest.raises(ValueError, match=r"no vector through .*takes a vector of width 8"):
        recipe.denoiser(network(8)).build()
    with pytest.raises(ValueError, match=r"context has no vector.*takes a vector of width 8"):
        model.sample_latents(context=torch.ones(1, 2, 8), noise=noise)


def components_that_ship():
    from retrodiff import diffusion, retrieval
    from retrodiff.encoders import CLIPEncoder, TimmEncoder
    from retrodiff.networks.kl import KLAutoencoder
    from retrodiff.networks.principal import PrincipalPatches
    from retrodiff.networks.vq import VQAutoencoder

    near = retrieval.NearestNeighbors()
    counts = retrieval.NeighborCounts(torch.arange(9), torch.ones(9).long(), None)
    numbers = {"channels": 32, "multipliers": [1, 2], "blocks_per_level": 1, "latent_channels": 3}
    return [
        diffusion.DDIM(),
        diffusion.Interval(diffusion.ClassifierFree(2.0), 0.1, 1.0),
        diffusion.LogSpaced(),
        diffusion.EDMDenoiser(small_network()),
        Dropped(LearnedNull(Projected(RAW, dim=8, width=4), dim=8), 0.5),
        retrieval.MultiQuery(retrieval.ReciprocalRankFusion(near, 5), None, ["a {}"]),
        retrieval.ExcludeGroup(retrieval.Diverse(near, 0.5, 9), "file"),
        retrieval.TopM(counts, rows=3),
        counts,
        VQAutoencoder(**numbers, codes=16),
        KLAutoencoder(**numbers),
        PrincipalPatches(channels=3, patch=4, components=16),
        CLIPEncoder("ViT-B-32-quickgelu", "openai"),
        TimmEncoder("test_resnet", image_size=32),
        small_database(),
    ]


def test_every_component_prints_on_a_line():
    for component in components_that_ship():
        assert "\n" not in repr(component)
        assert len(repr(component)) < 400, repr(component)


# --- priors ------------------------------------------------------------------------------------


class Wandering:
    """A prior that draws: image i of a seed has its own."""

    def translate(self, embedding, generator=None):
        return embedding + normal_like(embedding, generator)


def test_a_prior_stands_between_prompt_and_search(recipe):
    plain, model = recipe.build(), recipe.prior(Wandering()).build()
    whole = model.sample(prompts=["a", "b", "c"], mode="neighbors", seed=1)
    part = model.sample(prompts=["a", "b"], mode="neighbors", seed=1, batch_size=1)
    assert torch.equal(whole.query.embedding[:2], part.query.embedding)
    encoded = model.encoder.encode_text(["a", "b", "c"])
    assert 0.1 < float((whole.query.embedding - encoded).abs().mean()) < 3
    found = model.database.search(Query(whole.query.embedding), 4)
    assert torch.equal(whole.neighbors.indices, found.indices)
    images = torch.rand(2, 1, 8, 8) * 2 - 1  # pictures need no prior
    assert model.sample(images=images).query == plain.sample(images=images).query

    class Wrong:
        def translate(self, embedding, generator=None):
            return embedding[:, :3]

    with pytest.raises(ValueError, match=r"Wrong made embeddings \(1, 3\) of \(1, 8\)"):
        recipe.prior(Wrong()).build().sample(prompts=["a"])


def test_generator_contract(model, foreign):
    check_generator(model.generating())
    check_generator(model.generating("ddpm"))
    check_generator(foreign.build().generating())
