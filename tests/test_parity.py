"""Two miniatures of the published models against outputs of the reference implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from retrodiff.checkpoints.compvis import load_compvis
from retrodiff.checkpoints.published import PublishedModel
from retrodiff.interfaces import Context

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


def alphas(model: PublishedModel, steps: int) -> tuple[list[int], Tensor, Tensor]:
    """Timesteps from noisy to clean, the alphas there and one step on, in float64."""
    ladder = model.schedule.alphas_cumprod
    every = model.schedule.length // steps
    t = [i * every + 1 for i in range(steps)][::-1]
    return t, ladder[t], torch.cat([ladder[t[1:]], ladder[:1]])


def guided(model: PublishedModel, x: Tensor, t: int, context: Tensor, scale: float) -> Tensor:
    timesteps = torch.full((len(x),), t)
    both = torch.cat([context, torch.zeros_like(context)])
    cond, null = model.unet(x.float(), timesteps, both).double().chunk(2)
    return null + scale * (cond - null)


def ddim_step(x: Tensor, eps: Tensor, a: Tensor, a_next: Tensor) -> Tensor:
    """Song et al. 2021, eq. 12 with eta 0."""
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    return a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps


@pytest.mark.parametrize(("key", "scale"), [("ddim_no_guidance", 1.0), ("ddim_cfg", 3.0)])
def test_ddim(pair: tuple[PublishedModel, dict[str, Tensor]], key: str, scale: float) -> None:
    model, io = pair
    x = io["x"].double()
    for t, a, a_next in zip(*alphas(model, 10), strict=True):
        x = ddim_step(x, guided(model, x, t, io["context"], scale), a, a_next)
    assert relative(x.float(), io[key]) <= BOUND


def test_plms(pair: tuple[PublishedModel, dict[str, Tensor]]) -> None:
    """Liu et al. 2022: Adams-Bashforth on eps, the first step by the improved Euler method."""
    model, io = pair
    x, old = io["x"].double(), list[Tensor]()
    t, here, there = alphas(model, 10)
    for i, (a, a_next) in enumerate(zip(here, there, strict=True)):
        eps = guided(model, x, t[i], io["context"], 3.0)
        if not old:
            ahead = ddim_step(x, eps, a, a_next)
            mean = (eps + guided(model, ahead, t[min(i + 1, 9)], io["context"], 3.0)) / 2
        else:
            weights = {1: (3, -1), 2: (23, -16, 5), 3: (55, -59, 37, -9)}[min(len(old), 3)]
            divisor = {1: 2, 2: 12, 3: 24}[min(len(old), 3)]
            terms = [eps, *reversed(old)]
            mean = sum(w * e for w, e in zip(weights, terms, strict=False)) / divisor
        x = ddim_step(x, mean, a, a_next)
        old.append(eps)
    assert relative(x.float(), io["plms_cfg"]) <= BOUND
