"""PSNR, SSIM and perceptual distances against scikit-image, lpips and formulas."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retrodiff.diffusion import PixelUnshuffle
from retrodiff.encoders import TimmEncoder
from retrodiff.evaluation import psnr, reconstruction, ssim
from retrodiff.evaluation.reconstruction import comparison_sheet
from retrodiff.interfaces import Autoencoder
from retrodiff.training import FeatureDistance, lpips_distance

GENERATOR = torch.Generator().manual_seed(0)
SMOOTH = torch.nn.functional.interpolate(
    torch.rand(5, 3, 6, 6, generator=GENERATOR) * 2 - 1, (30, 41), mode="bicubic"
).clamp(-1, 1)
NOISY = (SMOOTH + torch.randn(SMOOTH.shape, generator=GENERATOR) * 0.1).clamp(-1, 1)


@pytest.mark.parametrize("other", [NOISY, -SMOOTH, SMOOTH * 0.5 + 0.2], ids=["noisy", "neg", "dim"])
@pytest.mark.parametrize("channels", [1, 3])
def test_they_are_those_of_scikit_image(other: Tensor, channels: int) -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is the oracle")
    one, other = SMOOTH[:, :channels], other[:, :channels]
    for i, (found, structural) in enumerate(zip(psnr(one, other), ssim(one, other), strict=True)):
        a, b = (t[i].double().numpy() for t in (one, other))
        expected = metrics.peak_signal_noise_ratio(a, b, data_range=2)
        assert float(found) == pytest.approx(expected, rel=1e-6)
        expected = metrics.structural_similarity(
            a,
            b,
            data_range=2,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert float(structural) == pytest.approx(expected, abs=1e-6)


def test_equal_images_and_small_ones() -> None:
    assert psnr(SMOOTH, SMOOTH).isinf().all()
    assert torch.allclose(ssim(SMOOTH, SMOOTH), torch.ones(5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"images of 10x12 are smaller than SSIM's window"):
        ssim(torch.zeros(1, 3, 10, 12), torch.zeros(1, 3, 10, 12))


class Shifted(Autoencoder):
    """Everything comes back brighter by 0.1."""

    def encode(self, images: Tensor) -> Tensor:
        return images * 3

    def decode(self, latents: Tensor) -> Tensor:
        return latents / 3 + 0.1


def test_the_report_of_an_autoencoder() -> None:
    images = SMOOTH * 0.5
    found = reconstruction(Shifted(), images, batch_size=2, shown=3)
    assert found.rmse == pytest.approx(0.1, rel=1e-5)
    assert found.l1 == pytest.approx(0.1, rel=1e-5)
    assert found.psnr.tolist() == pytest.approx([10 * math.log10(4 / 0.01)] * 5, rel=1e-5)
    assert found.latent_std == pytest.approx(float((images * 3).std(correction=0)), rel=1e-4)
    assert torch.allclose(found.images, images[:3] + 0.1, atol=1e-6)
    assert found.numbers()["images"] == 5
    lossless = reconstruction(PixelUnshuffle(2), (torch.rand(3, 3, 16, 16) * 255).byte())
    assert lossless.rmse == 0
    with pytest.raises(ValueError, match="no images to be reconstructed"):
        reconstruction(Shifted(), images[:0])


def test_a_sheet_has_each_original_above_its_reconstruction() -> None:
    originals = torch.linspace(-1, 0.5, 5).view(5, 1, 1, 1).expand(5, 3, 2, 4)
    sheet = comparison_sheet(originals, originals + 0.25, columns=3)
    assert sheet.shape == (3, 2 * 2 * 2, 3 * 4)
    assert torch.equal(sheet[:, 0:2, 4:8], originals[1])
    assert torch.equal(sheet[:, 2:4, 4:8], originals[1] + 0.25)
    assert torch.equal(sheet[:, 4:6, 4:8], originals[4])
    assert bool((sheet[:, 4:, 8:] == 1).all())


# --- perceptual ----------------------------------------------------------------------------------


def test_a_distance_of_feature_maps_is_the_formula() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh())
    distance = FeatureDistance(network)
    one, other = SMOOTH.clone().requires_grad_(), NOISY
    found = distance(one, other)
    a, b = (network(x).detach().double().numpy() for x in (SMOOTH, NOISY))
    a, b = (x / np.sqrt((x**2).sum(1, keepdims=True)) for x in (a, b))
    assert np.allclose(found.detach().numpy(), ((a - b) ** 2).sum(1).mean((1, 2)), rtol=1e-4)
    found.sum().backward()
    assert one.grad is not None
    assert bool(one.grad.isfinite().all())
    assert float(one.grad.abs().sum()) > 0
    assert next(network.parameters()).grad is None
    assert not distance(SMOOTH, SMOOTH).any()
    with torch.no_grad():
        network[0].weight.add_(1)  # the distance keeps the network as it was
    assert torch.equal(distance(SMOOTH, NOISY), found.detach())


def test_an_encoder_lends_its_maps_and_stays_as_it_is() -> None:
    torch.manual_seed(0)
    encoder = TimmEncoder("test_resnet", image_size=64)
    distance = FeatureDistance.of(encoder, [0, 1])
    images = SMOOTH[:, :, :24, :32].clone().requires_grad_()
    far, near = (distance(images, x[:, :, :24, :32]) for x in (-SMOOTH, NOISY))
    assert bool((far > near).all())
    near.sum().backward()
    assert images.grad is not None
    assert next(encoder.network.parameters()).requires_grad
    assert "test_resnet" in distance.describe()
    assert distance.describe() != FeatureDistance.of(encoder, [1]).describe()
    with pytest.raises(ValueError, match="object gives no feature maps"):
        FeatureDistance.of(object())  # type: ignore[arg-type]


def test_lpips_without_its_weights_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lpips")

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(
        OSError, match=r"squeeze weights .* cannot be had \(no route to host\)"
    ) as e:
        lpips_distance("squeeze")
    assert "\n" not in str(e.value)


def test_lpips_with_its_weights_is_that_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lpips = pytest.importorskip("lpips")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(weights=None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    distance = lpips_distance("squeeze")
    one = torch.nn.functional.interpolate(SMOOTH, (40, 40)).requires_grad_()
    other = torch.nn.functional.interpolate(NOISY, (40, 40))
    found = distance(one, other)
    assert found.shape == (5,)
    found.sum().backward()
    assert float(one.grad.abs().sum()) > 0  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision
        oracle = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).eval()
    names = dict(oracle.net.named_parameters())
    for name, parameter in network.features.named_parameters():
        match = [key for key in names if key.endswith(f".{name}")]
        names[match[0]].data.copy_(parameter.data)
    assert torch.allclose(found, oracle(one, other).flatten(), rtol=1e-4)
