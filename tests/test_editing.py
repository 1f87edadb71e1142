"""Edited images: what strength means, exact at both ends, for every sampler and parametrization."""

import math

import pytest
import torch
from parts import HashingEncoder, small_network, small_recipe

from retrodiff.databases import ArrayDatabase
from retrodiff.diffusion import (
    DDIM,
    DiffusionGenerator,
    DPMpp2M,
    EDMDenoiser,
    EpsDenoiser,
    Euler,
    FlowDenoiser,
    Heun,
    Identity,
    Karras,
    PixelUnshuffle,
    Start,
    Unguided,
    VDenoiser,
)
from retrodiff.diffusion.sampler import SAMPLERS
from retrodiff.interfaces import Context, Generator
from retrodiff.networks.dit import DiT


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def recipe(pictures):
    encoder = HashingEncoder()
    database = ArrayDatabase(encoder.encode_image(pictures), encoder.fingerprint)
    return small_recipe(encoder, database)


ASKED = {"prompts": ["a", "b", "c"], "seed": 3, "steps": 5}


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_both_ends_are_exact_with_every_sampler(recipe, pictures, sampler):
    model = recipe.build()
    plain = model.sample(**ASKED, sampler=sampler).images
    all_of_it = model.sample(**ASKED, sampler=sampler, start=pictures[:3], strength=1)
    assert torch.equal(all_of_it.images, plain)
    nothing = model.sample(**ASKED, sampler=sampler, start=pictures[:3], strength=0)
    assert torch.equal(nothing.images, pictures[:3])
    between = model.sample(**ASKED, sampler=sampler, start=pictures[:3], strength=0.5)
    assert not torch.equal(between.images, plain)
    assert between.settings["strength"] == 0.5


@pytest.mark.parametrize("kind", [EpsDenoiser, VDenoiser, EDMDenoiser, FlowDenoiser])
def test_every_parametrization_edits_less_for_less_strength(recipe, pictures, kind):
    model = recipe.denoiser(kind(small_network())).build()
    distances = [
        float((model.sample(**ASKED, start=pictures[0], strength=s).images - pictures[0]).norm())
        for s in (0, 0.2, 0.6, 1)
    ]
    assert distances[0] == 0
    assert distances == sorted(distances)


class Normal(torch.nn.Module):
    """The exact denoiser of independent normal data."""

    shape, widths, vector_width = (1, 2, 2), {}, None
    untrained, takes_float64 = False, True
    device, schedule = torch.device("cpu"), Karras(0.002, 20.0)
    mean, spread = 0.3, 0.5

    def prepare(self, context):
        return context

    def denoise(self, x, sigma, context):
        s2 = sigma.view(-1, 1, 1, 1) ** 2
        return (self.spread**2 * x + s2 * self.mean) / (self.spread**2 + s2)


@pytest.mark.parametrize("sampler", [Euler(), DDIM(), Heun(), DPMpp2M()], ids=repr)
@pytest.mark.parametrize("strength", [0.25, 0.5, 0.9])
def test_it_follows_the_flow_of_normal_data(sampler, strength):
    """Closed form: along the flow (x - mean) / sqrt(spread^2 + sigma^2) stays the same."""
    made = DiffusionGenerator(
        denoiser=Normal(),
        guidance=Unguided(),
        sampler=sampler,
        schedule=Normal.schedule,
        autoencoder=Identity(),
    )
    steps, x0 = 400, torch.full((3, 1, 2, 2), -0.4, dtype=torch.float64)
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = made.generate(Context({}), Context({}), noise, steps=steps, start=Start(x0, strength))
    sigma = float(Normal.schedule.sigmas(steps)[steps - math.ceil(strength * steps)])
    shrunk = Normal.spread / math.sqrt(Normal.spread**2 + sigma**2)
    expected = Normal.mean + (x0 + sigma * noise - Normal.mean) * shrunk
    torch.testing.assert_close(out, expected, rtol=0, atol=0.02)


def test_an_edited_image_does_not_depend_on_its_batch(recipe, pictures):
    model = recipe.build()
    whole = model.sample(**ASKED, start=pictures[:3], strength=0.6)
    alone = model.sample(**ASKED, start=pictures[:3], strength=0.6, batch_size=1)
    torch.testing.assert_close(whole.images, alone.images, rtol=0, atol=1e-4)
    mixed = ("text", "neighbors", "text")
    other = model.sample(**ASKED, mode=mixed, start=pictures[:3], strength=0.2)
    assert (other.images - pictures[:3]).abs().mean() < 0.2  # each from its own start
    one = model.sample(**ASKED, start=pictures[0], strength=0.6)
    same = model.sample(**ASKED, start=pictures[:1].expand(3, -1, -1, -1), strength=0.6)
    assert torch.equal(one.images, same.images)


def test_as_many_steps_as_the_strength_says(recipe, pictures):
    model = recipe.build()
    calls = []
    denoise = model.denoiser.denoise
    model.denoiser.denoise = lambda x, s, c: (calls.append(float(s[0])), denoise(x, s, c))[1]
    model.sample(prompts=["a"], steps=10, sampler="euler", start=pictures[0], strength=0.7)
    assert len(calls) == 7  # and not 8, as 0.7 * 10 in floats would say
    assert calls == pytest.approx(model.denoiser.schedule.sigmas(10)[3:10].tolist(), rel=1e-6)


def test_starts_pass_through_the_first_stage(recipe, pictures):
    network = DiT(shape=(4, 4, 4), patch=2, width=16, depth=1, heads=2, widths={"neighbors": 8})
    model = recipe.denoiser(EDMDenoiser(network)).autoencoder(PixelUnshuffle(2)).build()
    out = model.sample(**ASKED, start=pictures[:3], strength=0)
    assert torch.equal(out.images, pictures[:3])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"start": 1}, r"start needs strength="),
        ({"strength": 0.5}, r"strength=0.5 has no effect without start="),
        ({"start": 1, "strength": 1.2}, r"strength=1.2.*at most 1"),
        ({"start": 1, "strength": -0.1}, r"strength=-0.1.*at least 0"),
        ({"start": 1, "strength": True}, r"strength=True"),
        ({"start": 2, "strength": 0.5}, r"start has 2 images, but 3 are asked for"),
        ({"start": "large", "strength": 0.5}, r"start.*\(1, 10, 10\).*\(1, 8, 8\)"),
        ({"start": "colors", "strength": 0.5}, r"start.*\(3, 8, 8\).*\(1, 8, 8\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line(recipe, pictures, arguments, line):
    starts = {
        1: pictures[0],
        2: pictures[:2],
        "large": torch.zeros(1, 10, 10),
        "colors": torch.zeros(3, 8, 8),
    }
    given = dict(arguments)
    if "start" in given:
        given["start"] = starts[given["start"]]
    with pytest.raises(ValueError, match=line) as error:
        recipe.build().sample(**ASKED, **given)
    assert "\n" not in str(error.value)


def test_a_generator_that_begins_with_noise_only_says_so(recipe, pictures):
    class Painter(Generator):
        shape, widths = (1, 8, 8), {"neighbors": 8}

        def generate(self, context, null, noise, *, steps, generator=None, callback=None):
            return noise

    model = recipe.set(
        denoiser=None, guidance=None, sampler=None, autoencoder=None, generator=Painter()
    ).build()
    with pytest.raises(ValueError, match=r"start has no effect.*Painter.*noise only"):
        model.sample(prompts=["a"], start=pictures[0], strength=0.5)
