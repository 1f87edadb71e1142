"""Half precision, compilation and placement: every network, first stage and preset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from parts import HashingEncoder
from torch import Tensor, nn

from retrodiff import presets
from retrodiff.checkpoints.foreign.published import PUBLISHED
from retrodiff.diffusion import Identity, PixelUnshuffle
from retrodiff.interfaces import Autoencoder, Context, Query
from retrodiff.model import Model
from retrodiff.networks import DiT, KLAutoencoder, UNet, VQAutoencoder
from retrodiff.networks.principal import PrincipalPatches

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BOUNDS = {torch.float16: 0.02, torch.bfloat16: 0.15}
"""Relative error of sampled latents against float32: 20 times the dtype's rounding, after 4 steps
of networks with random weights (seen: up to 0.009 and 0.08). Pictures get twice that, since rounded
latents may have other codes (seen: up to 0.012 and 0.17)."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def randomized(network: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in network.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / max(1, p[0].numel()) ** 0.5)
            elif "norm" not in name:
                p.copy_(0.1 * noise)
    return network.eval()


def unet() -> UNet:
    numbers: dict[str, Any] = {"channels": 32, "multipliers": (1, 2), "blocks_per_level": 1}
    numbers |= {"in_channels": 3, "out_channels": 3, "size": 8, "attention_factors": (1, 2)}
    return randomized(UNet(**numbers, context_width=8, heads=4))


def dit() -> DiT:
    widths = {"neighbors": 8}
    return randomized(DiT(shape=(3, 8, 8), patch=4, width=16, depth=1, heads=2, widths=widths))


NETWORKS = {"unet": unet, "dit": dit}
GRAPH: dict[str, Any] = {"channels": 32, "multipliers": (1, 2), "blocks_per_level": 1}
STAGES: dict[str, Any] = {
    "vq": lambda: randomized(VQAutoencoder(**GRAPH, latent_channels=3, codes=50)),
    "kl": lambda: randomized(KLAutoencoder(**GRAPH, latent_channels=4, scale_factor=0.3)),
    "principal": lambda: PrincipalPatches.fit(normal(40, 3, 16, 16, seed=5), 4, 8),
}
X, T = normal(2, 3, 8, 8, seed=1), torch.tensor([3.0, 801.0])
CONTEXT = normal(2, 3, 8, seed=2)
IMAGES = normal(2, 3, 16, 16, seed=4).clamp(-1, 1)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# --- networks and first stages -----------------------------------------------------------------


@pytest.mark.parametrize("given", FLOATS, ids=str)
@pytest.mark.parametrize("weights", FLOATS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_any_floating_dtype(
    name: str, weights: torch.dtype, given: torch.dtype
) -> None:
    network = NETWORKS[name]()
    expected = network(X, T, CONTEXT)
    network.to(weights)
    assert network.dtype == weights
    for tokens in (CONTEXT.to(given), CONTEXT.double()):
        found = network(X.to(given), T, tokens)
        assert found.dtype == given
        narrowest = max(torch.finfo(weights).eps, torch.finfo(given).eps)
        assert relative(found, expected) < max(1e-5, 8 * narrowest)
        prepared = network.prepare(Context.of(tokens))
        assert relative(network(X.to(given), T, prepared), found) < max(1e-5, 8 * narrowest)


@pytest.mark.parametrize("given", FLOATS, ids=str)
@pytest.mark.parametrize("weights", FLOATS, ids=str)
@pytest.mark.parametrize("name", STAGES)
def test_first_stages_take_any_floating_dtype_and_give_float32(
    name: str, weights: torch.dtype, given: torch.dtype
) -> None:
    stage = STAGES[name]()
    latents = stage.encode(IMAGES)
    images = stage.decode(latents)
    stage.to(weights)
    assert stage.dtype == weights
    out = torch.promote_types(weights, torch.float32)
    found = stage.encode(IMAGES.to(given))
    room = max(1e-5, 8 * max(torch.finfo(weights).eps, torch.finfo(given).eps))
    assert found.dtype == out
    assert relative(found, latents) < room
    decoded = stage.decode(latents.to(given))
    assert decoded.dtype == out
    # Rounded latents may have other codes: the pictures of a codebook differ more.
    assert relative(decoded, images) < (0.5 if name == "vq" else room)


@pytest.mark.parametrize("name", STAGES)
def test_first_stages_name_what_does_not_fit(name: str) -> None:
    stage = STAGES[name]()
    with pytest.raises(ValueError, match=r"images have dtype torch\.uint8, expected floating"):
        stage.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    channels = stage.encode(IMAGES).shape[1]
    with pytest.raises(ValueError, match=rf"latents have shape \(1, 9, 4, 4\).*b, {channels}, h"):
        stage.decode(torch.zeros(1, 9, 4, 4))
    with pytest.raises(ValueError, match="latents have dtype"):
        stage.decode(torch.zeros(1, channels, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize("stage", [Identity(), PixelUnshuffle(4)], ids=repr)
def test_first_stages_without_weights_are_float32_on_the_cpu(stage: Autoencoder) -> None:
    assert (stage.dtype, stage.device) == (torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("make", [*NETWORKS.values(), *STAGES.values()])
def test_a_network_says_where_it_is(make: Any) -> None:
    network = make()
    assert (network.dtype, network.device.type) == (torch.float32, "cpu")
    assert network.to("meta").device.type == "meta"
    assert network.half().dtype == torch.float16


@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        (normal(2, 3, 8, 12), CONTEXT, r"x has shape \(2, 3, 8, 12\), the network takes \(b, 3, 8"),
        (normal(2, 4, 8, 8), CONTEXT, r"x has shape \(2, 4, 8, 8\)"),
        (X.long(), CONTEXT, r"dtype torch\.int64"),
        (X, CONTEXT[:1], "x has 2 rows, the context 1"),
        (X, Context({}, None), "streams"),
        (X, Context(Context.of(CONTEXT).streams, normal(2, 5)), "a DiT takes none"),
    ],
)
def test_a_transformer_names_what_does_not_fit(x: Tensor, context: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dit()(x, T, context)


def test_heads_of_a_transformer_must_divide_its_width() -> None:
    with pytest.raises(ValueError, match="heads=3 does not divide width=16"):
        DiT(shape=(3, 8, 8), patch=4, width=16, depth=1, heads=3, widths={})


# --- sampling ----------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published models in small."""
    for name, known in PUBLISHED.items():
        unet = {**known.unet, "channels": 32, "size": 8, "context_width": 8}
        unet |= {**GRAPH, "attention_factors": [1, 2], "channels_per_head": 16}
        first = {**known.autoencoder, **GRAPH, "multipliers": [1, 2, 2], "attention_factors": [4]}
        if known.kind == "vq":
            first["codes"] = 64
        monkeypatch.setitem(PUBLISHED, name, replace(known, unet=unet, autoencoder=first))


def built(name: str, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    first_stage = STAGES["principal"]() if name == "rdm_small, components" else None
    if name.startswith("rdm_small"):
        model = presets.rdm_small(
            encoder=HashingEncoder(), size=16, channels=32, first_stage=first_stage
        )
    elif name == "ldm_imagenet":
        model = presets.ldm_imagenet()
    else:
        model = getattr(presets, name)(encoder=HashingEncoder())
    denoiser: Any = model.denoiser
    randomized(denoiser.network)
    denoiser.untrained = False
    denoiser.to(dtype)
    if isinstance(model.autoencoder, nn.Module):
        if not isinstance(model.autoencoder, PrincipalPatches):
            randomized(model.autoencoder)
        model.autoencoder.to(dtype)
    return model


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    "name",
    ["rdm_imagenet", "rdm_ffhq", "rdm_768", "ldm_imagenet", "rdm_small", "rdm_small, components"],
)
def test_every_preset_samples_in_half_precision(name: str, dtype: torch.dtype, small: None) -> None:
    asked: dict[str, Any] = {"query": Query(normal(2, 8, seed=1)), "mode": "text"}
    if name == "ldm_imagenet":
        asked = {"n": 2}
    images: list[Tensor] = []
    latents: list[Tensor] = []
    for each in (torch.float32, dtype):
        model = built(name, each)
        out = model.sample(**asked, steps=4, seed=0, progress=False)
        assert out.images.dtype == torch.float32
        assert out.images.isfinite().all()
        images.append(out.images)
        latents.append(out.latents)
    assert 0 < relative(latents[1], latents[0]) < BOUNDS[dtype]
    assert 0 < relative(images[1], images[0]) < 2 * BOUNDS[dtype]


# --- compilation -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_networks_keep_names_config_and_numbers(name: str) -> None:
    """``network.compile()`` in place; ``torch.compile(network)`` shows the same attributes."""
    network = NETWORKS[name]()
    expected, names = network(X, T, CONTEXT), list(network.state_dict())
    wrapped: Any = torch.compile(network, backend="eager")
    assert wrapped.config() == network.config()
    assert (wrapped.shape, wrapped.widths) == (network.shape, network.widths)
    assert (wrapped.dtype, wrapped.device) == (network.dtype, network.device)
    network.compile(backend="eager")
    assert list(network.state_dict()) == names
    if name == "unet":  # whose tracing takes half a minute
        return
    assert relative(network(X, T, network.prepare(Context.of(CONTEXT))), expected) < 1e-5
    again = type(network)(**network.config())
    again.load_state_dict(network.state_dict())
    assert relative(again.eval()(X, T, CONTEXT), expected) < 1e-6
