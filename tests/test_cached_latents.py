"""Latents on disk: as encoding gives them, trained on as images, refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parts import HashingEncoder, small_network
from torch import Tensor, nn

from retrodiff import presets
from retrodiff.checkpoints import load_autoencoder, save_autoencoder
from retrodiff.checkpoints.first_stages import read_extra, stage_fingerprint
from retrodiff.diffusion import EDMDenoiser, PixelUnshuffle
from retrodiff.networks import KLAutoencoder, PrincipalPatches, VQAutoencoder
from retrodiff.retrieval import NearestNeighbors
from retrodiff.training import (
    CachedLatents,
    TrainingSet,
    encode_latents,
    fit,
    from_checkpoint,
    open_latents,
)

IMAGES = torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.fixture(scope="module")
def stage() -> KLAutoencoder:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"channels": 32, "multipliers": (1, 1), "blocks_per_level": 1}
    return KLAutoencoder(**shape, latent_channels=1, scale_factor=0.7).eval()


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-6), (torch.float16, 5e-4), (torch.bfloat16, 4e-3)]
)
def test_they_are_what_encoding_gives(
    stage: KLAutoencoder, dtype: torch.dtype, most: float, tmp_path: Path
) -> None:
    made = encode_latents(stage, IMAGES, tmp_path / "l", dtype=dtype, batch_size=4, progress=False)
    with torch.no_grad():
        expected = stage.encode(IMAGES)
    rows = torch.tensor([7, 0, 9])
    found = made[rows]
    assert found.dtype == torch.float32
    assert (found - expected[rows]).abs().max() <= most * expected.abs().max()
    opened = open_latents(tmp_path / "l", IMAGES)
    assert opened.latents.dtype == dtype
    assert torch.equal(opened[rows], found)
    assert (len(opened), opened.shape, opened.digest()) == (10, (1, 8, 8), made.digest())
    size = (tmp_path / "l").stat().st_size
    assert size < 10 * 64 * dtype.itemsize + 600


def test_what_was_begun_is_continued_and_what_is_whole_is_opened(
    stage: KLAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"batch_size": 2, "progress": False}
    whole = encode_latents(stage, IMAGES, tmp_path / "whole", **settings)
    real, calls = KLAutoencoder.encode, list[int]()

    def encode(self: KLAutoencoder, images: Tensor) -> Tensor:
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, images)

    monkeypatch.setattr(KLAutoencoder, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        encode_latents(stage, IMAGES, tmp_path / "part", **settings)
    assert not (tmp_path / "part").exists()
    again = encode_latents(stage, IMAGES, tmp_path / "part", **settings)
    assert torch.equal(again.latents, whole.latents)
    before = len(calls)
    encode_latents(stage, IMAGES, tmp_path / "part", **settings)
    assert len(calls) <= before + 1
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()


def test_latents_of_others_are_refused(stage: KLAutoencoder, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"progress": False}
    encode_latents(stage, IMAGES, tmp_path / "l", **settings)
    other = KLAutoencoder(**{**stage.config(), "scale_factor": 0.8})
    other.load_state_dict(stage.state_dict())
    with pytest.raises(ValueError, match="another first stage"):
        encode_latents(other, IMAGES, tmp_path / "l", **settings)
    with pytest.raises(ValueError, match="images"):
        encode_latents(stage, IMAGES.flip(0), tmp_path / "l", **settings)
    with pytest.raises(ValueError, match="latents of other images"):
        open_latents(tmp_path / "l", IMAGES.flip(0))
    encode_latents(other, IMAGES, tmp_path / "l", overwrite=True, **settings)
    damaged = bytearray((tmp_path / "l").read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "l2").write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
        open_latents(tmp_path / "l2")
    with pytest.raises(ValueError, match=r"not finite as torch\.float16"):
        encode_latents(Large(), IMAGES, tmp_path / "large", **settings)
    assert not (tmp_path / "large").exists()


class Large(PixelUnshuffle):
    """Latents that float16 cannot hold."""

    def __init__(self) -> None:
        super().__init__(2)

    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images) * 1e6


def small_set(images: Any, database: Any) -> TrainingSet:
    return TrainingSet.of(images, HashingEncoder(), database, NearestNeighbors(), 4, progress=False)


def test_a_model_learns_the_same_from_latents_as_from_images(
    recipe: Any, database: Any, stage: KLAutoencoder, tmp_path: Path
) -> None:
    model = recipe.autoencoder(stage).denoiser(EDMDenoiser(small_network())).build()
    latents = encode_latents(
        stage, IMAGES, tmp_path / "l", dtype=torch.float32, batch_size=1, progress=False
    )
    settings: dict[str, Any] = {"steps": 4, "batch_size": 3, "lr": 1e-3, "progress": False}
    plain = fit(model, small_set(IMAGES, database), **settings)
    state = tmp_path / "state"
    fast = fit(model, small_set(latents, database), **settings, checkpoint=state)
    assert torch.allclose(plain.losses, fast.losses, rtol=1e-4)
    assert fast.model.autoencoder is stage
    for one, other in zip(
        plain.model.denoiser.parameters(), fast.model.denoiser.parameters(), strict=True
    ):
        assert torch.allclose(one, other, atol=2e-4)
    assert from_checkpoint(model, state).autoencoder is stage


def test_latents_of_another_first_stage_are_not_trained_on(
    recipe: Any, database: Any, stage: KLAutoencoder, tmp_path: Path
) -> None:
    latents = encode_latents(stage, IMAGES, tmp_path / "l", progress=False)
    other = KLAutoencoder(**stage.config()).eval()
    model = recipe.autoencoder(other).denoiser(EDMDenoiser(small_network())).build()
    with pytest.raises(ValueError, match="made by another first stage than the model's"):
        fit(model, small_set(latents, database), steps=1, batch_size=2, lr=1e-3, progress=False)


def test_latents_alone_say_how_they_are_embedded(stage: KLAutoencoder, tmp_path: Path) -> None:
    encode_latents(stage, IMAGES, tmp_path / "l", progress=False)
    alone = open_latents(tmp_path / "l")
    with pytest.raises(ValueError, match="latents alone cannot be embedded"):
        alone.embed(HashingEncoder(), torch.tensor([0]))


def test_latents_of_three_channels_may_have_any_values(database: Any) -> None:
    wide = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3
    latents = CachedLatents(wide, "a", "b", IMAGES[:6])
    images, _, _ = small_set(latents, database).batch(torch.tensor([1, 5]))
    assert torch.equal(images, wide[[1, 5]])


# --- folders -------------------------------------------------------------------------------------


def stages() -> list[Any]:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"channels": 32, "multipliers": (1, 1), "blocks_per_level": 1}
    patches = PrincipalPatches.fit(IMAGES, patch=4, components=8)
    vq = VQAutoencoder(**shape, latent_channels=2, codes=16, groups=8)
    return [KLAutoencoder(**shape, latent_channels=2, scale_factor=0.3), vq, patches]


@pytest.mark.parametrize("number", range(3))
def test_a_first_stage_comes_back_from_its_folder(number: int, tmp_path: Path) -> None:
    given = stages()[number]
    save_autoencoder(given, tmp_path / "stage", extra={"steps": 3})
    found = load_autoencoder(tmp_path / "stage")
    assert stage_fingerprint(found) == stage_fingerprint(given)
    with torch.no_grad():
        assert torch.equal(found.encode(IMAGES), given.eval().encode(IMAGES))
    assert read_extra(tmp_path / "stage") == {"steps": 3}
    with pytest.raises(FileExistsError, match="exists"):
        save_autoencoder(given, tmp_path / "stage")
    save_autoencoder(given, tmp_path / "stage", overwrite=True)


def test_the_first_stage_of_a_saved_model_is_opened_too(
    recipe: Any, stage: KLAutoencoder, tmp_path: Path
) -> None:
    model = recipe.autoencoder(stage).denoiser(EDMDenoiser(small_network())).build()
    model.replace(encoder=None, database=None).save(tmp_path / "model")
    assert stage_fingerprint(load_autoencoder(tmp_path / "model")) == stage_fingerprint(stage)


def test_a_folder_that_is_none_is_one_line(stage: KLAutoencoder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no first_stage\.json"):
        load_autoencoder(tmp_path)
    save_autoencoder(stage, tmp_path / "stage")
    file = tmp_path / "stage" / "first_stage.json"
    text = file.read_text()
    for old, new, said in (
        ('"format": 1', '"format": 7', "format 7"),
        ("networks.KLAutoencoder", "networks.UNet", "no component|lacks|does not take"),
        ("networks.KLAutoencoder", "os.system", "not part of"),
        ('"scale_factor": 0.7', '"scale_factor": "x"', "not a number"),
        ('"groups": 32', '"groups": 5', "multiple of 5"),
    ):
        file.write_text(text.replace(old, new))
        assert file.read_text() != text
        with pytest.raises(ValueError, match=said) as raised:
            load_autoencoder(tmp_path / "stage")
        assert "\n" not in str(raised.value)
    file.write_text(text)
    (tmp_path / "stage" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        save_autoencoder(stage, tmp_path / "stage", overwrite=True)


def test_a_class_of_ones_own_is_refused(tmp_path: Path) -> None:
    class Mine(nn.Module):
        pass

    with pytest.raises(ValueError, match="Mine is no first stage of retrodiff"):
        save_autoencoder(Mine(), tmp_path / "stage")  # type: ignore[arg-type]
    assert not (tmp_path / "stage").exists()


def test_a_small_preset_takes_the_first_stage_at_its_own_factor(stage: KLAutoencoder) -> None:
    model = presets.rdm_small(encoder=HashingEncoder(), first_stage=stage, size=16, channels=32)
    assert model.generating().shape == (1, 8, 8)
    assert model.autoencoder is stage
