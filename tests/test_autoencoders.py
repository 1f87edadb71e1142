"""The first stages against diffusers' independent implementations, and their own promises."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retrodiff.checkpoints.foreign.tensor_names import diffusers_autoencoder
from retrodiff.checkpoints.foreign.transfer import their_names
from retrodiff.interfaces import Autoencoder
from retrodiff.networks.kl import KLAutoencoder
from retrodiff.networks.vq import VQAutoencoder

VQ: dict[str, Any] = {
    "channels": 32,
    "multipliers": (1, 2),
    "blocks_per_level": 1,
    "latent_channels": 3,
    "codes": 50,
}
KL: dict[str, Any] = {
    "channels": 32,
    "multipliers": (1, 2, 2),
    "blocks_per_level": 1,
    "latent_channels": 4,
    "attention_factors": (4,),
    "scale_factor": 0.3,
}
IMAGES = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def vq() -> VQAutoencoder:
    torch.manual_seed(0)
    autoencoder = VQAutoencoder(**VQ).eval()
    nn.init.normal_(autoencoder.codebook.weight, std=0.5)
    return autoencoder


@pytest.fixture
def kl() -> KLAutoencoder:
    torch.manual_seed(0)
    return KLAutoencoder(**KL).eval()


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def diffusers_twin(autoencoder: VQAutoencoder | KLAutoencoder, kind: str) -> Any:
    diffusers = pytest.importorskip("diffusers", reason="diffusers, the oracle, is not installed")
    config = autoencoder.config()
    levels = range(len(config["multipliers"]))
    attends = [2**level in config["attention_factors"] for level in levels]
    numbers = {
        "block_out_channels": [m * config["channels"] for m in config["multipliers"]],
        "layers_per_block": config["blocks_per_level"],
        "down_block_types": [f"{'Attn' if a else ''}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' if a else ''}UpDecoderBlock2D" for a in reversed(attends)],
        "latent_channels": config["latent_channels"],
        "scaling_factor": config["scale_factor"],
    }
    if kind == "VQModel":
        numbers["num_vq_embeddings"] = config["codes"]
    twin = getattr(diffusers, kind)(**numbers).eval()
    names = their_names(autoencoder, diffusers_autoencoder(config))
    shapes = {name: p.shape for name, p in twin.state_dict().items()}
    assert set(names.values()) == set(shapes)
    state = autoencoder.state_dict()
    twin.load_state_dict({names[k]: v.reshape(shapes[names[k]]) for k, v in state.items()})
    return twin


@pytest.mark.parametrize("attention_factors", [(), (2,)])
def test_vq_agrees_with_diffusers(attention_factors: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    vq = VQAutoencoder(**{**VQ, "attention_factors": attention_factors}).eval()
    nn.init.normal_(vq.codebook.weight, std=0.5)
    twin = diffusers_twin(vq, "VQModel")
    latents = vq.encode(IMAGES)
    assert relative(latents, twin.encode(IMAGES).latents) < 1e-5
    assert relative(vq.decode(latents), twin.decode(latents).sample) < 1e-5


def test_kl_agrees_with_diffusers(kl: KLAutoencoder) -> None:
    twin = diffusers_twin(kl, "AutoencoderKL")
    posterior = twin.encode(IMAGES).latent_dist
    mean, log_variance = kl.moments(IMAGES)
    assert relative(mean, posterior.mean) < 1e-5
    assert relative(log_variance, posterior.logvar) < 1e-5
    assert relative(kl.encode(IMAGES), posterior.mode() * 0.3) < 1e-5
    assert relative(kl.decode(kl.encode(IMAGES)), twin.decode(posterior.mode()).sample) < 1e-5


def test_codes_are_the_nearest_in_float64(vq: VQAutoencoder) -> None:
    latents = vq.encode(IMAGES)
    points = latents.double().permute(0, 2, 3, 1)[..., None, :]
    distance = (points - vq.codebook.weight.double()).square().sum(-1)
    assert torch.equal(vq.codes(IMAGES), distance.argmin(-1))
    assert vq.codes(IMAGES).unique().numel() > 5


def test_codes_do_not_depend_on_how_many_are_compared_at_once(
    vq: VQAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = vq.codes(IMAGES)
    monkeypatch.setattr("retrodiff.networks.vq.ROWS_AT_ONCE", 7)
    assert torch.equal(vq.codes(IMAGES), expected)


def test_decoding_quantizes(vq: VQAutoencoder) -> None:
    latents = vq.encode(IMAGES)
    near = vq.codebook(vq.nearest(latents)).permute(0, 3, 1, 2)
    torch.testing.assert_close(vq.decode(latents), vq.decode(near))
    torch.testing.assert_close(vq.decode(latents), vq.decode_codes(vq.codes(IMAGES)))


def test_scale_factor_is_undone_by_decoding(vq: VQAutoencoder) -> None:
    scaled = VQAutoencoder(**{**VQ, "scale_factor": 0.25}).eval()
    scaled.load_state_dict(vq.state_dict())
    torch.testing.assert_close(scaled.encode(IMAGES), vq.encode(IMAGES) * 0.25)
    torch.testing.assert_close(scaled.decode(scaled.encode(IMAGES)), vq.decode(vq.encode(IMAGES)))


@pytest.mark.parametrize("kind", [VQAutoencoder, KLAutoencoder])
def test_shapes_config_and_half_precision(kind: type) -> None:
    autoencoder = kind(**(VQ if kind is VQAutoencoder else KL)).eval()
    assert isinstance(autoencoder, Autoencoder)
    again = kind(**json.loads(json.dumps(autoencoder.config()))).eval()
    again.load_state_dict(autoencoder.state_dict())
    latents = autoencoder.encode(IMAGES)
    f = autoencoder.factor
    assert latents.shape == (2, autoencoder.latent_channels, 32 // f, 40 // f)
    assert autoencoder.decode(latents).shape == IMAGES.shape
    torch.testing.assert_close(again.encode(IMAGES), latents)
    half = again.bfloat16().encode(IMAGES.bfloat16())
    assert half.dtype == torch.float32  # a training target formed from bfloat16 would be far off
    assert relative(half, latents) < 0.1


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 15, 16), "15x16 do not divide by the autoencoder's factor 2"), ((1, 1, 16, 16), "3,")],
)
def test_images_that_do_not_fit_are_refused(
    vq: VQAutoencoder, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        vq.encode(torch.zeros(shape))
