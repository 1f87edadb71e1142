"""Regions with neighbors of their own, and retrieval that goes on while an image forms."""

import pytest
import torch
from parts import HashingEncoder, small_recipe

from retrodiff import presets
from retrodiff.databases import ArrayDatabase
from retrodiff.diffusion import Mixture
from retrodiff.diffusion.sampler import SAMPLERS
from retrodiff.encoders import Regions
from retrodiff.interfaces import Generator, Query
from retrodiff.model import ReRetrieving
from retrodiff.retrieval import NearestNeighbors, neighbor_table
from retrodiff.training import TrainingSet, fit


class Blocks(HashingEncoder):
    """The first pixels of an image of any size, so that every block has its own embedding."""

    def encode_image(self, images):
        return super().encode_image(images.flatten(1)[:, :16])


@pytest.fixture(scope="module")
def encoder():
    return Blocks()


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def database(encoder, pictures):
    return ArrayDatabase(encoder.encode_image(pictures), encoder.fingerprint)


@pytest.fixture(scope="module")
def blocks(encoder, pictures):
    cut = Regions(encoder, 2).blocks(pictures)
    return ArrayDatabase(encoder.encode_image(cut), encoder.fingerprint)


def alive(model):
    torch.manual_seed(0)
    for parameter in model.denoiser.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.05)
    return model


# --- regions -------------------------------------------------------------------------------------


def test_regions_are_the_blocks_in_reading_order(encoder, pictures):
    regions = Regions(encoder, 2)
    found = regions.encode_image(pictures[:3])
    assert found.shape == (3, 4, 8)
    for number, (y, x) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        alone = encoder.encode_image(pictures[:3, :, y : y + 4, x : x + 4])
        torch.testing.assert_close(found[:, number], alone)
    words = regions.encode_text(["a", "b"])
    assert torch.equal(words, encoder.encode_text(["a", "b"]).unsqueeze(1).expand(2, 4, 8))
    assert regions.fingerprint == encoder.fingerprint
    with pytest.raises(ValueError, match="images of 8x8 cannot be cut into 3x3 regions"):
        Regions(encoder, 3).encode_image(pictures)


def test_one_region_is_plain_retrieval(encoder, database, pictures):
    one = alive(presets.region_retrieval(encoder=encoder, database=database, side=1))
    plain = one.replace(encoder=encoder)
    for asked in ({"images": pictures[:3]}, {"prompts": ["a", "b"], "mode": "neighbors"}):
        mine, theirs = one.sample(**asked, steps=3), plain.sample(**asked, steps=3)
        assert torch.equal(mine.neighbors.indices[:, 0], theirs.neighbors.indices)
        torch.testing.assert_close(mine.images, theirs.images, rtol=0, atol=1e-6)


def test_a_region_attends_to_its_own_neighbors(encoder, blocks, pictures):
    model = alive(presets.region_retrieval(encoder=encoder, database=blocks))
    out = model.sample(images=pictures[:2], steps=2)
    assert out.neighbors.indices.shape == (2, 4, 4)
    own = torch.arange(8).view(2, 4)  # the blocks of the pictures are rows of the database
    assert torch.equal(out.neighbors.indices[..., 0], own)


def test_regions_learn(encoder, blocks, pictures):
    model = presets.region_retrieval(encoder=encoder, database=blocks)
    embeddings = model.encoder.encode_image(pictures)
    table = neighbor_table(Query(embeddings), blocks, 4, NearestNeighbors(), progress=False)
    data = TrainingSet(pictures, embeddings, table, blocks)
    model = fit(model, data, steps=1, batch_size=4, lr=1e-3, progress=False).model
    assert model.sample(images=pictures[:2], steps=2).images.isfinite().all()


def test_more_regions_than_positions_are_refused(encoder, blocks, pictures):
    model = presets.region_retrieval(encoder=encoder, database=blocks, side=8)
    with pytest.raises(ValueError, match=r"64 regions do not tile a latent of 4x4") as error:
        model.sample(images=pictures[:1], steps=1)
    assert "\n" not in str(error.value)


# --- re-retrieval --------------------------------------------------------------------------------


@pytest.fixture
def model(encoder, database):
    return small_recipe(encoder, database).build()


ASKED = {"prompts": ["a", "b", "c"], "mode": "neighbors", "seed": 2, "steps": 4}


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_no_step_is_none(model, sampler):
    plain = model.sample(**ASKED, sampler=sampler)
    none = model.sample(**ASKED, sampler=sampler, reretrieve=[])
    assert torch.equal(none.images, plain.images)
    assert none.renewed == {}
    again = model.sample(**ASKED, sampler=sampler, reretrieve=[1, 3])
    assert again.images.isfinite().all()
    assert sorted(again.renewed) == [1, 3]


def test_neighbors_of_the_estimate_are_found_and_recorded(model, encoder, database):
    seen = []
    denoise = model.denoiser.denoise

    def watched(x, sigma, context):
        out = denoise(x, sigma, context)
        cond, null = out.chunk(2)
        seen.append((null + 2 * (cond - null)).float())
        return out

    model.denoiser.denoise = watched
    out = model.sample(**ASKED, sampler="euler", reretrieve=ReRetrieving((2,)))
    model.denoiser.denoise = denoise
    expected = database.search(Query(encoder.encode_image(seen[1].clamp(-1, 1))), 4)
    (found,) = out.renewed.values()
    for one, row in zip(found, expected.indices, strict=True):
        assert torch.equal(one.indices[0], row)
        assert one.records[0][0] == {"number": int(row[0])}
    assert out.settings["reretrieve"] == [2]
    alone = model.sample(**ASKED, sampler="euler", reretrieve=[2], batch_size=1)
    torch.testing.assert_close(alone.images, out.images, rtol=0, atol=1e-4)
    for one, other in zip(found, alone.renewed[2], strict=True):
        assert torch.equal(one.indices, other.indices)


def test_a_prompt_stays_a_token(model, encoder):
    asked = {**ASKED, "mode": "text+neighbors"}
    out = model.sample(**asked, reretrieve=[1])
    texts = encoder.encode_text(asked["prompts"])
    for one, text in zip(out.renewed[1], texts, strict=True):
        assert one.indices[0, 0] == -1
        assert (one.indices[0, 1:] >= 0).all()
        torch.testing.assert_close(one.embeddings[0, 0], text)


def test_mixed_modes_come_back_in_order(model):
    modes = ("text+neighbors", "neighbors", "text+neighbors")
    out = model.sample(**{**ASKED, "mode": modes}, reretrieve=[2])
    assert [int(one.indices[0, 0]) == -1 for one in out.renewed[2]] == [True, False, True]


def test_regions_ask_again_each_for_itself(encoder, blocks):
    model = alive(presets.region_retrieval(encoder=encoder, database=blocks))
    out = model.sample(prompts=["a", "b"], mode="neighbors", steps=3, reretrieve=[1])
    first = out.neighbors.indices
    assert torch.equal(first[:, 0], first[:, 3])  # one prompt for all regions
    assert out.renewed[1][0].indices.shape == (1, 4, 4)
    assert not torch.equal(out.renewed[1][0].indices[0, 0], out.renewed[1][0].indices[0, 3])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"reretrieve": [4]}, "names step 4, but the last of steps=4 is number 3"),
        ({"reretrieve": [0]}, "reretrieve=0"),
        ({"reretrieve": 2}, r"reretrieve=2: give numbers of steps, such as \[4, 8\]"),
        ({"reretrieve": [1], "mode": "text"}, "mode 'text' retrieves nothing, so reretrieve"),
    ],
    ids=str,
)
def test_what_means_nothing_is_one_line(model, arguments, line):
    with pytest.raises(ValueError, match=line):
        model.sample(**{**ASKED, **arguments})


def test_attribution_of_neighbors_that_change_is_refused(model, pictures):
    for given, reason in (
        ({"reretrieve": [1]}, "reretrieve changes neighbors"),
        ({"start": pictures[0], "strength": 0}, "strength=0 paints nothing"),
        ({"guidance": Mixture({"neighbors": 1.0})}, "does not weigh the whole condition"),
    ):
        with pytest.raises(ValueError, match=f"attribution has no meaning here, since .*{reason}"):
            model.sample(**ASKED, attribution=True, **given)
    plain = model.sample(**ASKED, attribution=True)
    other = Mixture({"neighbors": 0.0, "cond": 2.0})
    mixed = model.sample(**ASKED, attribution=True, guidance=other)
    torch.testing.assert_close(mixed.attribution.weights, plain.attribution.weights)


def test_a_generator_without_steps_says_so(encoder, database):
    class Painter(Generator):
        shape, widths = (1, 8, 8), {"neighbors": 8}

        def generate(self, context, null, noise, *, steps, generator=None, callback=None):
            return noise

    parts = dict.fromkeys(("denoiser", "guidance", "sampler", "autoencoder"))
    painted = small_recipe(encoder, database).set(**parts, generator=Painter()).build()
    with pytest.raises(ValueError, match="reretrieve has no effect: Painter has no steps"):
        painted.sample(**ASKED, reretrieve=[1])
