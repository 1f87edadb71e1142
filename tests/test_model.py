"""Sampling in every mode: what conditions, what is searched, what is refused."""

import dataclasses
import datetime
import decimal
import json

import numpy as np
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
        ({"n": -1}, "n=-1: give a whole number"),
        ({"n": True}, "n=True: give a whole number"),
        ({"n": 2.0}, "n=2.0: give a whole number"),
        ({"prompts": ["a"], "k": -3}, "k=-3: give a whole number, at least 0"),
        ({"prompts": ["a"], "k": 2.0}, "k=2.0: give a whole number"),
        ({"prompts": ["a"], "k": 100}, "k=100 in mode 'text.neighbors' retrieves 99 rows.*40 rows"),
        ({"prompts": ["a"], "steps": True}, "steps=True"),
        ({"prompts": ["a"], "steps": float("nan")}, "steps=nan"),
        ({"prompts": ["a"], "steps": "10"}, "steps='10': give a whole number, at least 1"),
        ({"prompts": ["a"], "batch_size": 0}, "batch_size=0: give a whole number, at least 1"),
        ({"prompts": ["a"], "batch_size": -3}, "batch_size=-3"),
        ({"prompts": ["a"], "seed": 2**64}, f"seed={2**64}.*from 0 to {2**64 - 1}"),
        ({"prompts": ["a"], "seed": -1}, "seed=-1"),
        ({"prompts": ["a"], "seed": 1.5}, "seed=1.5"),
        ({"prompts": ["a"], "seed": None}, "seed=None"),
        ({"prompts": ["a"], "guidance": float("nan")}, "guidance=nan: give a finite number"),
        ({"prompts": ["a"], "guidance": np.float32("inf")}, "guidance=.*inf.*: give a finite"),
        ({"prompts": ["a"], "guidance": torch.tensor(torch.nan)}, "guidance=tensor"),
        ({"prompts": ["a"], "guidance": "2"}, "guidance=str is no Guidance"),
        ({"prompts": ["a"], "guidance": True}, "guidance=True: give a finite number"),
        ({"prompts": ["a"], "sampler": DDIM}, r"sampler=DDIM is a class: .*DDIM\(\.\.\.\)"),
        ({"prompts": ["a"], "guidance": Unguided}, "guidance=Unguided is a class"),
        ({"prompts": ["a"], "sampler": 3}, "sampler=int is no Sampler"),
        ({"classes": "dog"}, r"classes is one string.*\['dog'\]"),
        ({"prompts": b"dog"}, "prompts is one string"),
        ({"prompts": ["a", 3]}, r"prompts\[1\] is int, but a list of texts is taken"),
        ({"prompts": 3}, "prompts is int"),
        ({"query": torch.randn(1, 8)}, r"query is made of Tensor: give Query\(embedding\)"),
        ({"query": Query(np.ones((1, 8)))}, "query is made of ndarray"),
        ({"query": Query(torch.randn(8))}, r"query has embeddings of shape \(8,\)"),
        (
            {"query": Query(torch.full((1, 8), torch.nan))},
            "query has embeddings that are not finite",
        ),
        ({"query": Query(torch.randn(2, 8), ids=torch.tensor([1]))}, "2 embeddings, but 1 ids"),
        ({"images": torch.full((1, 1, 8, 8), 255.0)}, "images holds floats from 255 to 255"),
        (
            {"images": torch.full((1, 1, 8, 8), torch.nan)},
            "images holds values that are not finite",
        ),
        ({"images": torch.zeros(0, 1, 8, 8)}, "images asks for 0 images"),
    ],
)
def test_bad_requests_are_answered_in_one_line(model, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        model.sample(**arguments, **QUIET)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("guidance_scale", "guidance"),
        ("num_inference_steps", "steps"),
        ("prompt", "prompts"),
        ("batchsize", "batch_size"),
    ],
)
def test_an_argument_of_another_name_is_named(model, wrong, right):
    with pytest.raises(TypeError, match=f"no argument '{wrong}': it is called {right}"):
        model.sample(**{"prompts": ["a"], wrong: 2})
    with pytest.raises(TypeError, match=r"no argument 'xyz': it takes prompts, classes"):
        model.sample(xyz=1)


def test_numbers_of_numpy_and_torch_are_numbers(model, tmp_path):
    plain = model.sample(prompts=["a", "b"], k=2, steps=2, batch_size=1, seed=3, guidance=2.0)
    for of in (np.int64, np.uint8, torch.tensor):
        numbers = {"k": of(2), "steps": of(2), "batch_size": of(1), "seed": of(3)}
        for scale in (np.float32(2), np.float64(2), torch.tensor(2.0), of(2), 2):
            out = model.sample(prompts=["a", "b"], guidance=scale, **numbers)
            assert torch.equal(out.images, plain.images)
            assert out.settings == plain.settings
    out.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation.json").read_text())["settings"]["k"] == 2
    model = model.replace(proposal=Uniform())
    assert len(model.sample(n=np.int64(3))) == 3


def test_queries_and_images_of_any_float(model):
    query = torch.randn(2, 8).half()
    exact = model.sample(query=Query(query.float()))
    for kind in (torch.float16, torch.float64):
        out = model.sample(query=Query(query.to(kind)))
        assert torch.equal(out.images, exact.images)
    pixels = (torch.rand(2, 3, 8, 8) * 255).byte()
    encoder = HashingEncoder()
    model = model.replace(encoder=encoder)
    right = model.sample(images=pixels.float() / 127.5 - 1)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    for asked in (pixels, pixels.numpy(), list(pixels), pictures, pixels.long()):
        out = model.sample(images=asked)
        assert torch.equal(out.neighbors.indices, right.neighbors.indices)
    with pytest.warns(UserWarning, match=r"images \* 2 - 1") as warned:
        model.sample(images=torch.rand(2, 3, 8, 8))
    assert len(warned) == 1


def test_a_zero_query_is_warned_about(model):
    with pytest.warns(UserWarning, match="query 1 is all zero"):
        model.sample(query=Query(torch.stack([torch.ones(8), torch.zeros(8)])))


def test_everything_is_retrieved_before_anything_is_sampled(model):
    """A mode that fails does so before the first image of another was made."""
    calls = []

    class Watching(DDIM):
        def sample(self, *arguments, **named):
            calls.append(1)
            return super().sample(*arguments, **named)

    model = model.replace(sampler=Watching())
    with pytest.raises(ValueError, match=r"k=0 leaves mode 'neighbors'"):
        model.sample(prompts=["a", "b"], mode=["text", "neighbors"], k=0)
    model = model.replace(database=None)
    with pytest.raises(ValueError, match=r"has no database"):
        model.sample(prompts=["a", "b"], mode=["text", "neighbors"])
    assert not calls


class Spoiled(EDMDenoiser):
    """Gives NaN for the images of ``rows`` in a batch."""

    rows = (1,)

    def denoise(self, x, sigma, context):
        out = super().denoise(x, sigma, context).clone()
        out[[row for row in self.rows if row < len(out)]] = torch.nan
        return out


def test_images_that_are_not_finite_are_named_and_kept(model, tmp_path):
    spoiled = model.replace(denoiser=Spoiled(small_network()), guidance=Unguided())
    with pytest.warns(UserWarning, match=r"1 of 3 images are not finite \(numbers 1\)"):
        out = spoiled.sample(prompts=["a", "b", "c"])
    assert out.not_finite() == [1]
    assert out.images[[0, 2]].isfinite().all()
    rows = json.loads((out.save(tmp_path / "o") / "generation.json").read_text())["images"]
    assert [row.get("finite") for row in rows] == [None, False, None]
    with pytest.raises(FloatingPointError, match="no image is finite: guidance too high"):
        _all_spoiled(spoiled)
    with torch.no_grad():
        model.denoiser.network.embed.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"the weight network.embed.weight is not finite"):
        model.sample(prompts=["a"])


def _all_spoiled(model):
    model.denoiser.rows = (0, 1)
    return model.sample(prompts=["a", "b"])


def test_embeddings_that_are_not_finite_are_refused(recipe):
    class Broken(HashingEncoder):
        def encode_text(self, prompts):
            out = super().encode_text(prompts)
            out[-1] = torch.nan
            return out

    with pytest.raises(ValueError, match=r"not finite for prompts\[1\]"):
        recipe.encoder(Broken()).build().sample(prompts=["a", "b"])


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
    pixels = torch.full((2, 1, 8, 8), 200.0)
    asked = Query(torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"values up to 200, expected -1 to 1: divide"):
        model.loss(pixels, asked, model.database.search(asked, 4))
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


def test_records_of_any_kind_are_saved(model, tmp_path):
    stored = small_database()
    odd = [
        datetime.datetime(2020, 1, 1),
        datetime.date(2020, 1, 2),
        datetime.timedelta(seconds=3),
        decimal.Decimal("1.50"),
        float("nan"),
        float("-inf"),
        b"\x00\xff",
        np.int64(3),
        np.float32(0.5),
        np.datetime64("2020-01-01"),
        torch.tensor([1, 2]),
        {"set": {1}},
        "caf\udce9",
        2**70,
    ]
    records = [{"file": f"{i}.png", "odd": odd[i % len(odd)]} for i in range(len(stored))]
    from retrodiff.databases import ArrayDatabase

    database = ArrayDatabase(stored.embeddings(torch.arange(32)), stored.fingerprint, records)
    model = model.replace(database=database, proposal=Uniform())
    out = model.sample(n=20, k=4, steps=1)
    folder = out.save(tmp_path / "out")
    saved = json.loads((folder / "generation.json").read_text("utf-8"))
    for row in saved["images"]:
        for neighbor in row["neighbors"]:
            assert neighbor["record"]["file"] == f"{neighbor['row']}.png"
    texts = {json.dumps(n["record"]["odd"]) for r in saved["images"] for n in r["neighbors"]}
    assert {'"2020-01-01T00:00:00"', "null", '"00ff"', "3", "[1, 2]"} <= texts


def test_overwriting_keeps_what_is_not_its_own(model, tmp_path):
    out = model.sample(prompts=["a", "b"])
    folder = out.save(tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    (folder / "chosen").mkdir()
    (folder / "chosen" / "a.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"also holds chosen, notes.txt"):
        out.save(folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "00001.png").exists()
    (folder / "notes.txt").unlink()
    (folder / "chosen" / "a.png").unlink()
    (folder / "chosen").rmdir()
    model.sample(prompts=["a"]).save(folder, overwrite=True)
    assert not (folder / "00001.png").exists()


# --- shown -------------------------------------------------------------------------------------


def test_a_generation_is_shown_in_a_notebook(model):
    stored = small_database()
    from retrodiff.databases import ArrayDatabase

    class Pictured(ArrayDatabase):
        def image(self, row):
            if row % 2:
                raise OSError("gone")
            return torch.zeros(3, 4, 4)

    records = [{"file": f"<b>{i}</b>"} for i in range(32)]
    database = Pictured(stored.embeddings(torch.arange(32)), stored.fingerprint, records)
    model = model.replace(database=database)
    shown = model.sample(prompts=["<script>x</script>"], mode="neighbors", k=8)._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "<b>" not in shown
    assert 1 < shown.count("<img ") <= 9
    out = model.sample(images=torch.rand(20, 1, 8, 8) * 2 - 1, k=2)
    assert len(out.pil()) == 20
    assert "4 more" in out._repr_html_()
    assert out._repr_html_().count("<tr>") == 17


def test_values_compare_hash_and_print_on_a_line(model):
    one, other = (model.sample(prompts=["a"] * 2, seed=s, k=2) for s in (0, 1))
    again = model.sample(prompts=["a"] * 2, seed=0, k=2)
    for name in ("query", "neighbors", None):
        a, b, c = (getattr(x, name) if name else x for x in (one, again, other))
        assert a == b
        assert hash(a) == hash(b)
        assert (a == c) is (name is not None)
        assert a != 3
        assert len({a, b}) == 1
    for value in (one, one.query, one.neighbors, Context.of(torch.zeros(1, 2, 8))):
        assert "\n" not in repr(value)
        assert len(repr(value)) < 2000
    assert Context.of(torch.zeros(1, 2, 8)) == Context.of(torch.zeros(1, 2, 8))
    assert Context.of(torch.zeros(1, 2, 8)) != Context.of(torch.zeros(1, 2, 8).half())
    assert len(repr(model).splitlines()) < 20
    assert max(map(len, repr(model).splitlines())) < 200


def test_sampling_is_quiet_unless_asked(model, capfd, caplog):
    with caplog.at_level("INFO", logger="retrodiff"):
        model.sample(prompts=["a"])
    assert "sampling 1 images" in caplog.text
    assert capfd.readouterr() == ("", "")
