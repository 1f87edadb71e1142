"""The first stage in closed form: an oracle, whitening, exactness, contract, errors."""

import numpy as np
import pytest
import torch

from retrodiff.diffusion import Identity, PixelUnshuffle
from retrodiff.networks.principal import PrincipalPatches
from retrodiff.testing import check_autoencoder


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(40, 3, 6, 6, generator=generator) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")
    return smooth + 0.02 * torch.randn(smooth.shape, generator=generator)


def test_components_are_those_of_scikit_learn(images):
    from sklearn.decomposition import PCA

    mine = PrincipalPatches.fit(images, patch=4, components=5)
    rows = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 48)
    oracle = PCA(5, whiten=True).fit(rows.double().numpy())
    latents = mine.encode(images).permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    expected = oracle.transform(rows.double().numpy())
    signs = np.sign((latents * expected).sum(0))
    assert np.allclose(latents * signs, expected, atol=1e-3)


def test_latents_are_white_and_all_components_are_exact(images):
    few = PrincipalPatches.fit(images, patch=4, components=6)
    latents = few.encode(images)
    assert latents.shape == (40, 6, 4, 4)
    covariance = latents.permute(1, 0, 2, 3).flatten(1).cov()
    torch.testing.assert_close(covariance, torch.eye(6), atol=2e-3, rtol=0)
    whole = PrincipalPatches.fit(images, patch=4, components=48)
    torch.testing.assert_close(whole.decode(whole.encode(images)), images, atol=1e-4, rtol=0)

    def error(components):
        stage = PrincipalPatches.fit(images, patch=4, components=components)
        return float((stage.decode(stage.encode(images)) - images).square().mean())

    assert error(3) > error(6) > error(12)


@pytest.mark.parametrize("stage", [Identity(), PixelUnshuffle(4), PixelUnshuffle(2)], ids=repr)
def test_contract_of_the_others(stage):
    check_autoencoder(stage, (3, 16, 16))


def test_contract(images):
    check_autoencoder(PrincipalPatches.fit(images, patch=4, components=6), (3, 16, 16))


def test_misfits_are_refused(images):
    with pytest.raises(ValueError, match=r"components=49.*1 to 48"):
        PrincipalPatches.fit(images, patch=4, components=49)
    with pytest.raises(ValueError, match=r"\(3, 15, 15\).*side 4"):
        PrincipalPatches(channels=3, patch=4, components=6).encode(images[..., :15, :15])
    with pytest.raises(ValueError, match=r"15x15 cannot be folded by factor=4"):
        PixelUnshuffle(4).encode(images[..., :15, :15])
