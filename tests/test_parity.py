"""Two miniatures of the published models against outputs of the reference implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from retrodiff.checkpoints.foreign.compvis import load_compvis
from retrodiff.checkpoints.foreign.published import PublishedModel
from retrodiff.cli import main
from retrodiff.interfaces import Context
from retrodiff.model import Model
from retrodiff.presets import from_published

PARITY = Path(__file__).parents[2] / "shared" / "parity"
BOUND = 1e-4

pytestmark = pytest.mark.skipif(
    not PARITY.is_dir(), reason=f"the reference outputs are not here ({PARITY.name}/ is missing)"
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["rdm_vq_tiny", "rdm_kl_tiny"])
def pair(request: pytest.FixtureRequest) -> tuple[PublishedModel, dict[str, Tensor]]:
    from safetensors.torch import load_file

    stem = PARITY / request.param
    model = load_compvis(stem.with_suffix(".ckpt"), stem.with_suffix(".yaml"))
    return model, load_file(f"{stem}.io.safetensors")


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_noise_prediction(pair: tuple[PublishedModel, dict[str, Tensor]]) -> None:
    model, io = pair
    x, t, context = io["x"], io["timesteps"], io["context"]
    assert relative(model.unet(x, t, context), io["eps"]) <= BOUND
    assert relative(model.unet(x, t, model.unet.prepare(Context.of(context))), io["eps"]) <= BOUND


def test_first_stage(pair: tuple[PublishedModel, dict[str, Tensor]]) -> None:
    model, io = pair
    images, autoencoder = io["first_stage.image"], model.autoencoder
    if "first_stage.codes" in io:
        latents = autoencoder.encode(images)
        assert relative(latents, io["first_stage.moments_or_latent"]) <= BOUND
        codes = autoencoder.codes(images)  # type: ignore[union-attr]
        assert torch.equal(codes.flatten(), io["first_stage.codes"].flatten())
        quantized = autoencoder.codebook(codes).permute(0, 3, 1, 2)  # type: ignore[union-attr]
        assert relative(quantized, io["first_stage.quantized"]) <= BOUND
    else:
        moments = torch.cat(autoencoder.moments(images), 1)  # type: ignore[union-attr]
        assert relative(moments, io["first_stage.moments_or_latent"]) <= BOUND
        latents = autoencoder.encode(images)
        assert relative(latents / model.scale_factor, io["first_stage.mode"]) <= BOUND
    assert relative(autoencoder.decode(latents), io["first_stage.reconstruction"]) <= BOUND


@pytest.mark.parametrize(
    ("key", "sampler", "scale"),
    [("ddim_no_guidance", "ddim", 1.0), ("ddim_cfg", "ddim", 3.0), ("plms_cfg", "plms", 3.0)],
)
def test_trajectory(
    pair: tuple[PublishedModel, dict[str, Tensor]], key: str, sampler: str, scale: float
) -> None:
    published, io = pair
    model = from_published(published, scale="raw").build()
    latents = model.sample_latents(
        context=io["context"],
        null=torch.zeros_like(io["context"]),
        noise=io["x"],
        sampler=sampler,
        steps=10,
        guidance=scale,
    )
    assert relative(latents, io[key]) <= BOUND
    by_null_of_the_model = model.sample_latents(
        context=io["context"], noise=io["x"], sampler=sampler, steps=10, guidance=scale
    )
    assert relative(by_null_of_the_model, io[key]) <= BOUND


def test_names_to_rely_on(pair: tuple[PublishedModel, dict[str, Tensor]]) -> None:
    published, io = pair
    model = from_published(published, scale="raw").build()
    eps = model.denoiser.network(io["x"], io["timesteps"], io["context"])  # type: ignore[attr-defined]
    assert relative(eps, io["eps"]) <= BOUND
    latents = model.autoencoder.encode(io["first_stage.image"])
    decoded = model.autoencoder.decode(latents)
    assert relative(decoded, io["first_stage.reconstruction"]) <= BOUND


def test_converted_by_the_command_line(
    pair: tuple[PublishedModel, dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Checkpoint -> our own folder -> the same trajectory; the scale must be said."""
    published, io = pair
    checkpoint = published.source
    command = ["convert", checkpoint, str(tmp_path / "model")]
    assert main(command) == 2
    assert "--scale raw" in capsys.readouterr().err
    assert main([*command, "--scale", "raw"]) == 0
    model = Model.load(tmp_path / "model")
    latents = model.sample_latents(
        context=io["context"], noise=io["x"], sampler="ddim", steps=10, guidance=3.0
    )
    assert relative(latents, io["ddim_cfg"]) <= BOUND
