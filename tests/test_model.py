"""Sampling in every mode: what conditions, what is searched, what is refused."""

import dataclasses
import json

import pytest
import torch
from parts import HashingEncoder, small_network
from PIL import Image

from retrodiff.diffusion import (
    DDIM,
    DDPM,
    ClassifierFree,
    Dropped,
    EDMDenoiser,
    Interval,
    NeighborEmbeddings,
    QueryAndNeighbors,
    Unguided,
)
from retrodiff.interfaces import Context, Query
from retrodiff.networks.dit import DiT
from retrodiff.retrieval import Uniform
from retrodiff.testing import check_conditioner, check_guidance, small_database

QUIET = {"progress": False}


class Counting:
    """A database that counts its searches."""

    def __init__(self, inner):
        self.inner, self.asked = inner, []

    @property
    def fingerprint(self):
        return self.inner.fingerprint

    def __len__(self):
        return len(self.inner)

    def embeddings(self, indices):
        return self.inner.embeddings(indices)

    def records(self, indices):
        return self.inner.records(indices)

    def search(self, query, k):
        self.asked.append(k)
        return self.inner.search(query, k)


@pytest.fixture
def counted(model, database):
    counting = Counting(database)
    return model.replace(database=counting, proposal=Uniform()), counting


@pytest.mark.parametrize(
    ("mode", "rows", "searches"),
    [("text", [-1], []), ("text+neighbors", [-1, 0, 1, 2], [3]), ("neighbors", [0, 1, 2, 3], [4])],
)
def test_text_modes_condition_on_what_the_paper_says(counted, mode, rows, searches):
    model, counting = counted
    out = model.sample(prompts=["a dog"], mode=mode, **QUIET)
    assert counting.asked == searches
    nearest = model.encoder.encode_text(["a dog"])
    found = counting.inner.search(Query(nearest), 4).indices[0].tolist()
    expected = [-1 if row == -1 else found[row] for row in rows]
    assert out.neighbors.indices[0].tolist() == expected
    if -1 in rows:
        assert torch.equal(out.neighbors.embeddings[0, 0], nearest[0])
        assert out.neighbors.records[0][0] == {"query": "a dog"}
    for record, row in zip(out.neighbors.records[0], expected, strict=True):
        if row >= 0:
            assert record["file"] == f"{row}.png"


def test_class_draws_from_the_top_rows_of_the_template(counted):
    model, counting = counted
    out = model.replace(class_top=10).sample(classes=["dog"] * 40, **QUIET)
    assert counting.asked == [10]
    assert out.query.source[0] == "A photo of dog"
    top = counting.inner.search(Query(model.encoder.encode_text(["A photo of dog"])), 10)
    drawn = set(out.neighbors.indices.flatten().tolist())
    assert drawn <= set(top.indices[0].tolist())
    assert len(drawn) > 6
    assert len({tuple(row) for row in out.neighbors.indices.tolist()}) > 10


def test_image_and_unconditional(counted):
    model, counting = counted
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    out = model.sample(images=images, **QUIET)
    expected = counting.inner.search(Query(model.encoder.encode_image(images)), 4)
    assert torch.equal(out.neighbors.indices, expected.indices)
    out = model.sample(n=3, **QUIET)
    rows = [int(source.removeprefix("row ")) for source in out.query.source]
    assert out.neighbors.indices[:, 0].tolist() == rows  # a row is its own nearest neighbor


def test_a_mode_per_row_gives_what_each_mode_gives(model):
    prompts = ["a", "b", "c"]
    mixed = model.sample(prompts=prompts, mode=["neighbors", "text", "neighbors"], **QUIET)
    for row, mode in ((0, "neighbors"), (1, "text"), (2, "neighbors")):
        pure = model.sample(prompts=prompts, mode=mode, **QUIET)
        torch.testing.assert_close(mixed.images[row], pure.images[row], rtol=1e-4, atol=1e-5)
    assert mixed.neighbors.indices[1].tolist() == [-1, -1, -1, -1]
    assert mixed.query.source == ("a", "b", "c")


def test_the_same_seed_gives_the_same_images_whatever_the_batch(model):
    first = model.sample(prompts=["a"] * 5, seed=3, **QUIET)
    again = model.sample(prompts=["a"] * 5, seed=3, batch_size=2, **QUIET)
    other = model.sample(prompts=["a"] * 5, seed=4, **QUIET)
    torch.testing.assert_close(first.images, again.images, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first.images, other.images)
    assert not torch.allclose(first.images[0], first.images[1])


def test_guidance_one_is_the_condition_and_zero_the_null(model):
    def run(guidance):
        return model.sample(prompts=["a"], guidance=guidance, **QUIET).latents

    torch.testing.assert_close(run(1.0), run(Unguided()))
    everywhere = Interval(ClassifierFree(3.0), 0.0, float("inf"))
    torch.testing.assert_close(run(everywhere), run(3.0))
    nowhere = Interval(ClassifierFree(3.0), 0.0, 0.0)
    torch.testing.assert_close(run(nowhere), run(1.0))
    assert not torch.allclose(run(3.0), run(1.0))


@pytest.mark.parametrize(
    "guidance", [Unguided(), ClassifierFree(2.0), Interval(ClassifierFree(2.0), 0.1, 5.0)]
)
def test_guidance_contract(guidance):
    check_guidance(guidance)


def test_guidance_is_the_formula_on_separate_calls(model):
    denoiser = model.denoiser
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 3.0])
    context = Context.of(torch.randn(2, 4, 8))
    out = ClassifierFree(2.5).guide(denoiser, {"cond": context, "null": context.zeros()})(x, sigma)
    cond = denoiser.denoise(x, sigma, context)
    null = denoiser.denoise(x, sigma, context.zeros())
    torch.testing.assert_close(out, null + 2.5 * (cond - null), rtol=1e-4, atol=1e-5)


def test_sample_latents_takes_plain_tensors(model):
    noise = torch.randn(2, 1, 8, 8)
    tokens = torch.randn(2, 4, 8)
    by_name = model.sample_latents(
        context=tokens, null=torch.zeros_like(tokens), noise=noise, sampler="ddim", steps=4
    )
    by_object = model.sample_latents(
        context=Context.of(tokens), noise=noise, sampler=DDIM(), steps=4, guidance=2.0
    )
    torch.testing.assert_close(by_name, by_object)
    drawn = [
        model.sample_latents(
            context=tokens,
            noise=noise,
            sampler=DDPM(),
            steps=4,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_two_streams(encoder, database, recipe):
    torch.manual_seed(0)
    network = DiT(
        shape=(1, 8, 8), patch=4, width=16, depth=1, heads=2, widths={"query": 8, "neighbors": 8}
    )
    inner = Dropped(QueryAndNeighbors("unit"), 0.5, stream="query")
    model = recipe.conditioner(inner).denoiser(EDMDenoiser(network)).build()
    assert model.sample(prompts=["a"], k=0, mode="neighbors", **QUIET).images.shape[0] == 1
    assert model.sample(prompts=["a"], k=3, mode="neighbors", **QUIET).neighbors.k == 3


@pytest.mark.parametrize(
    "conditioner",
    [
        NeighborEmbeddings("raw"),
        NeighborEmbeddings("unit"),
        QueryAndNeighbors("unit"),
        Dropped(NeighborEmbeddings("raw"), 0.3),
        Dropped(QueryAndNeighbors("raw"), 1.0, stream="neighbors"),
    ],
    ids=repr,
)
def test_conditioner_contract(conditioner):
    check_conditioner(conditioner)


def test_scale_is_what_it_says():
    query = Query(torch.randn(2, 8) * 7)
    neighbors = small_database().search(query, 3)
    raw = NeighborEmbeddings("raw").condition(query, neighbors).streams["neighbors"].values
    unit = NeighborEmbeddings("unit").condition(query, neighbors).streams["neighbors"].values
    assert torch.equal(raw, neighbors.embeddings)
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2, 3))


def test_dropout_hides_the_stated_share_and_keeps_the_length():
    context = Context.of(torch.ones(20_000, 2, 3))
    dropped = Dropped(NeighborEmbeddings("raw"), 0.1).drop(
        context, torch.Generator().manual_seed(0)
    )
    values = dropped.streams["neighbors"].values
    hidden = (values == 0).all(-1).all(-1)
    assert values.shape == (20_000, 2, 3)
    assert bool(((values == 0).all(-1).any(-1) == hidden).all())
    assert abs(float(hidden.float().mean()) - 0.1) < 0.01
    assert dropped.streams["neighbors"].null_rows == 0
    with pytest.raises(ValueError, match=r"probability=1.5"):
        Dropped(NeighborEmbeddings("raw"), 1.5)


# --- what is refused ---------------------------------------------------------------------------


class Blind:
    """An encoder without a text tower."""

    dim = 8
    fingerprint = HashingEncoder().fingerprint

    def encode_image(self, images):
        return HashingEncoder().encode_image(images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of prompts, classes, images, query and n, got none"),
        ({"prompts": ["a"], "n": 2}, "got prompts, n"),
        ({"prompts": "a cat"}, r"one string.*\['a cat'\]"),
        ({"prompts": []}, "prompts asks for 0 images"),
        ({"n": 0}, "n=0: give a whole number, at least 1"),
        ({"prompts": ["a"], "mode": "txt"}, "unknown mode 'txt': choose one of text"),
        ({"prompts": ["a"], "mode": "image"}, "mode 'image' does not go with prompts: give images"),
        ({"prompts": ["a"], "mode": ["text", "text"]}, "mode has 2 words for 1 rows"),
        ({"prompts": ["a"], "k": 41, "mode": "neighbors"}, "k=41.*40 rows"),
        ({"prompts": ["a"], "k": 0, "mode": "neighbors"}, "k=0 leaves mode 'neighbors' without"),
        ({"prompts": ["a"], "sampler": "k_lms"}, "unknown sampler 'k_lms'"),
        ({"prompts": ["a"], "steps": 0}, "steps=0"),
        ({"n": 1}, r"needs a proposal.*Uniform\(\)"),
        ({"query": Query(torch.randn(1, 9))}, "query.dim=9 does not match database.dim=8"),
    ],
)
def test_bad_requests_are_answered_in_one_line(model, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        model.sample(**arguments, **QUIET)
    assert "\n" not in str(error.value)


def test_training_data_goes_to_where_the_network_is(model):
    class Elsewhere(EDMDenoiser):
        """On the device ``meta``, which computes nothing."""

        device = torch.device("meta")

        def loss(self, x0, sigma, noise, context):
            places = {x0.device, sigma.device, noise.device}
            places |= {tokens.values.device for tokens in context.streams.values()}
            assert places == {self.device}
            return x0.mean((1, 2, 3))

    model = dataclasses.replace(model, denoiser=Elsewhere(small_network()))
    query = Query(torch.randn(3, 8))
    neighbors = model.database.search(query, 4)
    assert model.loss(torch.randn(3, 1, 8, 8), query, neighbors).device.type == "meta"


def test_missing_parts_are_named(recipe, model):
    without = recipe.set(database=None).build()
    assert without.sample(prompts=["a"], mode="text", **QUIET).images.shape[0] == 1
    with pytest.raises(ValueError, match=r"has no database.*open_database.*mode='text'"):
        without.sample(prompts=["a"], **QUIET)
    blind = recipe.encoder(Blind()).build()
    with pytest.raises(ValueError, match=r"prompts need an encoder of text.*Blind.*no text tower"):
        blind.sample(prompts=["a"], **QUIET)
    with pytest.raises(ValueError, match=r"prompts need an encoder and this model has none"):
        recipe.set(encoder=None).build().sample(prompts=["a"], **QUIET)
    wrong = torch.zeros(2, 1, 9, 9)
    query = Query(torch.randn(2, 8))
    with pytest.raises(
        ValueError, match=r"\(1, 9, 9\).*do not match the denoiser's shape=\(1, 8, 8\)"
    ):
        model.loss(wrong, query, model.database.search(query, 4))


# --- saving ------------------------------------------------------------------------------------


def test_a_generation_is_saved_whole(model, tmp_path):
    out = model.sample(prompts=["a", "b"], seed=5, **QUIET)
    folder = out.save(tmp_path / "out")
    described = json.loads((folder / "generation.json").read_text())
    assert described["settings"]["seed"] == 5
    assert [image["source"] for image in described["images"]] == ["a", "b"]
    row = described["images"][0]["neighbors"][1]
    assert row["record"]["file"] == f"{row['row']}.png"
    with Image.open(folder / "00000.png") as picture:
        assert picture.size == (8, 8)
    with pytest.raises(FileExistsError, match=r"exists"):
        out.save(tmp_path / "out")
    out.save(tmp_path / "out", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"not ours to overwrite"):
        out.save(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]
