"""Models in other types and on other devices, compiled, and in autocast."""

import copy
from dataclasses import replace

import pytest
import torch
from parts import HashingEncoder, small_network

from retrodiff import presets
from retrodiff.attention import use_path
from retrodiff.builder import Builder
from retrodiff.checkpoints.foreign.published import PUBLISHED
from retrodiff.components import where
from retrodiff.diffusion import (
    ClassifierFree,
    Dropped,
    EDMDenoiser,
    EpsDenoiser,
    FlowDenoiser,
    NeighborEmbeddings,
    PixelUnshuffle,
    Projected,
    VDenoiser,
)
from retrodiff.diffusion.sampler import SAMPLERS
from retrodiff.interfaces import Context, Query
from retrodiff.model import Model
from retrodiff.model.asking import conditioned
from retrodiff.networks.principal import PrincipalPatches
from retrodiff.networks.unet import UNet
from retrodiff.retrieval import MultiQuery, NearestNeighbors
from retrodiff.testing import small_database

HALVES = [torch.bfloat16, torch.float16]
BOUND = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""Mean difference to float32 over the latents' standard deviation; measured: up to half of it."""


def small_unet():
    return UNet(
        in_channels=1,
        out_channels=1,
        size=8,
        channels=32,
        multipliers=(1, 2),
        blocks_per_level=1,
        attention_factors=(1, 2),
        context_width=8,
    )


def shaken(model):
    """Weights of a like size everywhere, none of them zero, so that every layer takes part."""
    generator = torch.Generator().manual_seed(1)
    for part in (model.denoiser, model.autoencoder):
        for parameter in part.parameters() if hasattr(part, "parameters") else ():
            if parameter.ndim > 1:
                fan = parameter[0].numel()
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(noise * fan**-0.5)
    model.denoiser.untrained = False
    return model


def paper(name, monkeypatch):
    published = "rdm_imagenet" if name == "ldm_imagenet" else name
    architecture = PUBLISHED[published]
    unet = {**architecture.unet, "channels": 32, "size": 8, "blocks_per_level": 1}
    unet["multipliers"] = unet["multipliers"][:2]
    first = {**architecture.autoencoder, "channels": 32, "multipliers": [1, 2]}
    monkeypatch.setitem(PUBLISHED, published, replace(architecture, unet=unet, autoencoder=first))
    return getattr(presets, name)()


def small(first_stage=None):
    return presets.rdm_small(
        encoder=HashingEncoder(), size=16, channels=32, first_stage=first_stage
    )


def made(name, monkeypatch):
    torch.manual_seed(0)
    if name == "rdm_small":
        return small()
    if name == "principal":
        images = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return small(PrincipalPatches.fit(images, patch=4, components=16))
    return paper(name, monkeypatch)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "name", ["rdm_imagenet", "rdm_ffhq", "rdm_768", "ldm_imagenet", "rdm_small", "principal"]
)
def test_every_preset_samples_in_half_precision(name, dtype, monkeypatch):
    model = shaken(made(name, monkeypatch))
    dim = 0 if model.encoder is None else model.encoder.dim
    query = Query(torch.randn(2, dim, generator=torch.Generator().manual_seed(3)))
    ask = {"n": 2} if name == "ldm_imagenet" else {"query": query, "mode": "text"}
    exact = model.sample(**ask, steps=4, seed=1)
    model.to(dtype=dtype)
    assert where(model.denoiser)[1] == dtype
    half = model.sample(**ask, steps=4, seed=1)
    assert half.images.dtype == half.latents.dtype == torch.float32
    assert half.images.isfinite().all()
    error = float((half.latents - exact.latents).abs().mean() / exact.latents.std())
    assert 0 < error < BOUND[dtype], error


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", [EpsDenoiser, VDenoiser, EDMDenoiser, FlowDenoiser])
def test_every_parametrization_and_sampler_in_half_precision(kind, dtype):
    exact = kind(small_network())
    half = copy.deepcopy(exact).to(dtype)
    recipe = (
        Builder()
        .conditioner(NeighborEmbeddings("raw"))
        .guidance(ClassifierFree(2.0))
        .autoencoder(PixelUnshuffle(1))
    )
    one, other = (recipe.denoiser(d).build() for d in (exact, half))
    tokens = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for name in SAMPLERS:
        seeded = (torch.Generator().manual_seed(2) for _ in range(2))
        latents = [
            m.sample_latents(
                context=tokens, noise=noise, sampler=name, steps=5, generator=next(seeded)
            )
            for m in (one, other)
        ]
        assert latents[1].dtype == torch.float32
        error = float((latents[1] - latents[0]).abs().mean() / latents[0].std())
        assert error < 2 * BOUND[dtype], (name, error)
    taken = other.sample_latents(context=tokens.to(dtype), noise=noise.to(dtype), steps=2)
    assert taken.isfinite().all()
    wide = one.sample_latents(context=tokens.double(), noise=noise.double(), steps=2)
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("kind", [EpsDenoiser, VDenoiser, EDMDenoiser, FlowDenoiser])
def test_the_training_target_is_exact_whatever_the_latents_type(kind):
    """The oracle is a network that returns the target's own formula: its loss is zero."""
    denoiser = kind(small_network())
    x0 = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    sigma = torch.full((64,), 0.002)
    context = Context.of(torch.zeros(64, 1, 8))
    seen = []

    def network(x, t, context):
        s = denoiser.scalings(sigma.double())
        skip, out = (v.view(-1, 1, 1, 1) for v in s[:2])
        clean = x0.double()
        target = (clean - skip * (clean + 0.002 * noise.double())) / out
        seen.append(target)
        return target.float()

    denoiser.network.forward = network
    with torch.autocast("cpu", torch.bfloat16):
        loss = denoiser.loss(x0, sigma, noise, context)
    assert loss.dtype == torch.float32
    assert float(loss.mean() / seen[0].square().mean()) < 1e-6


def test_encoders_move_by_device_only_unless_asked():
    from retrodiff.encoders import TimmEncoder

    encoder = TimmEncoder("test_resnet", image_size=32)
    dim = encoder.dim
    recipe = (
        Builder()
        .encoder(encoder)
        .retriever(MultiQuery(NearestNeighbors(), HashingEncoder(dim), ["a {}"]))
        .conditioner(NeighborEmbeddings("raw"))
        .denoiser(EDMDenoiser(small_network(dim)))
    )
    model = recipe.build()
    fingerprint = encoder.fingerprint
    assert model.half() is model
    assert where(model.denoiser)[1] == torch.float16
    assert where(model.encoder)[1] == torch.float32
    assert model.encoder.fingerprint == fingerprint
    model.to(encoder_dtype=torch.bfloat16)
    assert where(model.encoder)[1] == torch.bfloat16
    assert where(model.denoiser)[1] == torch.float16
    model.to("meta")
    assert {where(part)[0].type for part in (model.encoder, model.denoiser)} == {"meta"}
    with pytest.raises(ValueError, match=r"unknown device 'gpu'"):
        model.to("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"torch sees no CUDA device"):
            model.cuda()


def test_a_half_precision_model_saves_and_loads(model, tmp_path):
    model.bfloat16()
    out = model.sample(prompts=["a"], seed=1)
    model.save(tmp_path / "m")
    again = Model.load(tmp_path / "m", encoder=model.encoder, database=model.database)
    torch.testing.assert_close(
        again.sample(prompts=["a"], seed=1).images, out.images, atol=0.1, rtol=0
    )


def test_a_conditioner_may_be_elsewhere():
    """Queries and neighbors come to where its weights are: ``meta`` stands for a GPU."""
    conditioner = Dropped(Projected(NeighborEmbeddings("raw"), dim=8, width=8), 0.1)
    conditioner.conditioner.to("meta")
    query, database = Query(torch.randn(2, 8)), small_database()
    context = conditioned(conditioner, query, database.search(query, 2))
    assert context.streams["neighbors"].values.device.type == "meta"
    assert context.to("meta", torch.float16).streams["neighbors"].values.dtype == torch.float16


def test_a_compiled_model_saves_loads_and_copies(model, tmp_path):
    out = model.sample(prompts=["a"], seed=1)
    before = set(model.denoiser.state_dict())
    assert model.compile(backend="eager") is model
    compiled = model.sample(prompts=["a"], seed=1)
    torch.testing.assert_close(compiled.images, out.images, atol=1e-5, rtol=0)
    assert set(model.denoiser.state_dict()) == before
    copied = copy.deepcopy(model.denoiser)
    assert set(copied.state_dict()) == before
    model.save(tmp_path / "m")
    again = Model.load(tmp_path / "m", encoder=model.encoder, database=model.database)
    torch.testing.assert_close(
        again.sample(prompts=["a"], seed=1).images, out.images, atol=1e-5, rtol=0
    )


def test_a_network_that_was_compiled_by_hand_is_saved_as_itself(recipe, tmp_path):
    compiled = torch.compile(small_network(), backend="eager")
    model = recipe.denoiser(EDMDenoiser(compiled)).build()
    model.save(tmp_path / "m")
    assert "_orig_mod" not in (tmp_path / "m" / "model.json").read_text()
    again = Model.load(tmp_path / "m", encoder=model.encoder, database=model.database)
    torch.testing.assert_close(
        again.sample(prompts=["a"], seed=1).images,
        model.sample(prompts=["a"], seed=1).images,
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("path", [None, "absorbed", "standard"])
@pytest.mark.parametrize("make", [small_network, small_unet], ids=["DiT", "UNet"])
def test_networks_go_to_meta(make, path, k):
    """Shapes are computed there; a device that autocast does not know raised."""
    network = make().to("meta")
    use_path(network, path)
    context = Context.of(torch.zeros(2, k, 8, device="meta"))
    context = Context.cat([context, context.zeros()])
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            x, t = torch.zeros(2, 1, 8, 8, device="meta"), torch.zeros(2, device="meta")
            assert network(x, t, context).shape == (4, 1, 8, 8)


def test_a_model_on_meta_does_not_sample(model):
    with pytest.raises(ValueError, match=r"the weights are on 'meta'.*load the model again") as one:
        model.to("meta").sample(query=Query(torch.randn(1, 8)))
    assert "\n" not in str(one.value)


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64, torch.float8_e4m3fn, "float16"])
def test_types_that_networks_do_not_compute_in(model, kind):
    before = [where(part) for part in model.parts().values()]
    for name in ("dtype", "encoder_dtype"):
        with pytest.raises(ValueError, match=f"{name}=.*: networks compute in one of") as one:
            model.to(**{name: kind})
        assert "\n" not in str(one.value)
    assert [where(part) for part in model.parts().values()] == before
