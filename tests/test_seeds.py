"""Image i of a seed is the same whatever the batch size, the other images, and their modes."""

import itertools

import pytest
import torch
from parts import small_network
from retrievers import ENCODER, PHRASING, RANDOM, RETRIEVERS

from retrodiff.builder import Builder
from retrodiff.diffusion import (
    DDIM,
    ClassifierFree,
    EDMDenoiser,
    EulerAncestral,
    NeighborEmbeddings,
)
from retrodiff.diffusion.sampler import SAMPLERS
from retrodiff.interfaces import Query
from retrodiff.randomness import Randomness, normal, normal_like, uniform
from retrodiff.retrieval import (
    NeighborCounts,
    TopM,
    Uniform,
    neighbor_table,
)
from retrodiff.testing import small_database

N = 7
MANY = 65
PROMPTS = [f"a {chr(97 + i % 20)}{i}" for i in range(N)]
IMAGES = torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
QUERY = Query(torch.randn(N, 8, generator=torch.Generator().manual_seed(6)))
ASKED = {
    "text": {"prompts": PROMPTS, "mode": "text"},
    "text+neighbors": {"prompts": PROMPTS, "mode": "text+neighbors"},
    "neighbors": {"prompts": PROMPTS, "mode": "neighbors"},
    "class": {"classes": PROMPTS, "mode": "class"},
    "image": {"images": IMAGES},
    "query": {"query": QUERY},
    "unconditional": {"n": N},
}
PROPOSALS = ["uniform", "counts", "top", "weighted"]


@pytest.fixture(scope="module")
def database():
    return small_database(rows=40, dim=8)


@pytest.fixture(scope="module")
def model(database):
    return (
        Builder()
        .encoder(ENCODER)
        .database(database)
        .proposal(Uniform())
        .conditioner(NeighborEmbeddings("raw"))
        .denoiser(EDMDenoiser(small_network()))
        .guidance(ClassifierFree(2.0))
        .defaults(k=3, steps=2, class_top=9)
        .build()
    )


def cut(asked, count):
    """The same request for the first images only."""
    (name, value), *rest = asked.items()
    if name == "n":
        value = count
    else:
        value = value.rows(slice(0, count)) if name == "query" else value[:count]
    return {name: value, **dict(rest)}


def agree(one, other, rows=None):
    """Images within 1e-4, neighbors and queries identical."""
    rows = range(min(len(one), len(other))) if rows is None else rows
    for i in rows:
        assert torch.equal(one.neighbors.indices[i], other.neighbors.indices[i]), i
        assert one.query.source[i : i + 1] == other.query.source[i : i + 1]
        assert float((one.images[i] - other.images[i]).abs().max()) <= 1e-4
        assert float((one.latents[i] - other.latents[i]).abs().max()) <= 1e-4


@pytest.mark.parametrize(
    ("mode", "sampler"),
    list(itertools.product(ASKED, [*SAMPLERS, DDIM(eta=0.5), EulerAncestral(0.5)])),
)
def test_every_sampler_and_mode_at_every_batch_size(model, mode, sampler):
    whole = model.sample(**ASKED[mode], sampler=sampler, seed=7)
    for batch, count in ((1, 2), (2, 5), (5, 7), (64, 1)):
        part = model.sample(**cut(ASKED[mode], count), sampler=sampler, seed=7, batch_size=batch)
        agree(whole, part)
    assert not torch.equal(whole.images[0], whole.images[1])


@pytest.mark.parametrize("sampler", ["ddpm", "plms"])
def test_more_images_than_one_batch(model, sampler):
    whole = model.sample(n=MANY, sampler=sampler, seed=7)
    for batch in (1, 64):
        agree(whole, model.sample(n=3, sampler=sampler, seed=7, batch_size=batch))
    agree(whole, model.sample(n=MANY, sampler=sampler, seed=7, batch_size=5))


@pytest.mark.parametrize("retriever", [*RETRIEVERS, *PHRASING], ids=repr)
@pytest.mark.parametrize("mode", ["text+neighbors", "class", "image", "unconditional"])
def test_every_retriever(model, mode, retriever):
    if mode == "class" and "RandomOfTop" in repr(retriever):
        retriever_model = model.replace(retriever=retriever, class_top=4)
    else:
        retriever_model = model.replace(retriever=retriever)
    ask = {"seed": 3, "sampler": "ddpm", "steps": 2, "k": 2}
    whole = retriever_model.sample(**ASKED[mode], **ask)
    for batch, count in ((1, 2), (5, 6)):
        agree(whole, retriever_model.sample(**cut(ASKED[mode], count), **ask, batch_size=batch))


def proposal(name, database):
    counts = NeighborCounts.fit(QUERY, database, 5)
    return {
        "uniform": Uniform(),
        "counts": counts,
        "top": TopM(counts, rows=9),
        "weighted": TopM(counts, fraction=0.5, weighted=True),
    }[name]


@pytest.mark.parametrize("name", PROPOSALS)
def test_every_proposal_draws_image_i_from_its_own_randomness(model, database, name):
    chosen = model.replace(proposal=proposal(name, database))
    whole = chosen.sample(n=30, seed=2, steps=1)
    for count in (1, 2, 5, 29):
        agree(whole, chosen.sample(n=count, seed=2, steps=1))
    assert len({tuple(row) for row in whole.neighbors.indices.tolist()}) > 3


@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_a_mix_of_modes_changes_no_image(model, sampler):
    words = ["text", "neighbors", "text+neighbors"]
    modes = [words[i % 3] for i in range(7)]
    mixed = model.sample(prompts=PROMPTS, mode=modes, sampler=sampler, batch_size=2, seed=1)
    for j, word in enumerate(words):
        pure = model.sample(prompts=PROMPTS, mode=word, sampler=sampler, seed=1)
        for i in range(j, 7, 3):
            k = pure.neighbors.k
            assert torch.equal(mixed.neighbors.indices[i, :k], pure.neighbors.indices[i])
            assert float((mixed.images[i] - pure.images[i]).abs().max()) <= 1e-4
    classes = ["text", "class"] * 3
    mixed = model.sample(classes=PROMPTS[:6], mode=classes, sampler=sampler, seed=1)
    pure = model.sample(classes=PROMPTS[:6], mode="class", sampler=sampler, seed=1)
    agree(mixed, pure, range(1, 6, 2))


def test_the_same_noise_starts_every_mode_and_sampler(model):
    """What a retriever or a proposal draws does not move the noise."""
    seen = []

    class Watching(DDIM):
        def sample(self, denoise, x, sigmas, generator=None, callback=None):
            seen.append(x)
            return super().sample(denoise, x, sigmas, generator, callback)

    for asked in (ASKED["text"], ASKED["class"], ASKED["unconditional"]):
        model.sample(**cut(asked, 4), sampler=Watching(), seed=9)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_other_seeds_and_the_global_state(model):
    torch.manual_seed(1)
    one = model.sample(n=3, sampler="ddpm", seed=3)
    torch.manual_seed(2)
    torch.rand(5)
    agree(one, model.sample(n=3, sampler="ddpm", seed=3))
    for seed in (0, 4, 2**32 + 3, 2**64 - 1):
        other = model.sample(n=3, sampler="ddpm", seed=seed)
        assert not torch.equal(one.images, other.images)


def test_neighboring_seeds_share_no_noise():
    """Seed s, image i + 1 is not seed s + 1, image i."""
    rows = [
        tuple(normal(Randomness.of(seed, [i], use), (1, 4))[0].tolist())
        for seed in (0, 1, 2, 2**32, 2**32 + 1)
        for i in range(20)
        for use in ("noise", "sampler")
    ]
    assert len(set(rows)) == len(rows)


def test_rows_draw_alone_what_they_draw_together():
    whole = Randomness.of(5, range(6), "noise")
    drawn = normal(whole, (6, 2, 3))
    more = uniform(whole, (6, 4), torch.float64)
    part = Randomness.of(5, [1, 4], "noise")
    assert torch.equal(normal(part, (2, 2, 3)), drawn[[1, 4]])
    assert torch.equal(uniform(part, (2, 4), torch.float64), more[[1, 4]])
    again = Randomness.of(5, range(6), "noise").rows([4])
    assert torch.equal(normal(again, (1, 2, 3)), drawn[[4]])
    with pytest.raises(ValueError, match=r"randomness of 1 rows cannot draw for 2"):
        normal(again, (2, 3))
    half = normal(Randomness.of(5, range(6), "noise"), (6, 2, 3), torch.bfloat16)
    assert torch.equal(half, drawn.bfloat16())
    assert normal_like(drawn.double(), Randomness.of(5, range(6), "noise")).dtype == torch.float64


def test_normal_is_normal_and_uniform_uniform():
    noise = normal(Randomness.of(0, range(200), "noise"), (200, 500))
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    flat = uniform(Randomness.of(0, range(200), "noise"), (200, 500))
    assert 0 <= float(flat.min())
    assert float(flat.max()) < 1
    assert abs(float(flat.mean()) - 0.5) < 0.01
    across = normal(Randomness.of(0, range(5000), "noise"), (5000, 1))
    assert abs(float(across.std()) - 1) < 0.05


def test_a_foreign_component_draws_from_it_as_from_any_generator():
    one, other = (torch.rand(3, generator=Randomness.of(1, range(3), "x")) for _ in range(2))
    assert torch.equal(one, other)


def test_a_neighbor_table_does_not_depend_on_its_batches(database):
    one, other = (
        neighbor_table(QUERY, database, 3, RANDOM, batch_size=batch, seed=4) for batch in (7, 1024)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, neighbor_table(QUERY, database, 3, RANDOM, seed=5))
