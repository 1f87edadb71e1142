"""First stages: what their training minimizes, how it is continued, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retrodiff.interfaces import Autoencoder
from retrodiff.networks import KLAutoencoder, VQAutoencoder
from retrodiff.networks.patch_discriminator import PatchDiscriminator
from retrodiff.training.stages.adversarial import Adversarial
from retrodiff.training.stages.codebook import CodeUse, restart_dead
from retrodiff.training.stages.first_stage import StageResult, fit_autoencoder
from retrodiff.training.stages.stage_objective import StageObjective, Weights

SMALL: dict[str, Any] = {"channels": 32, "multipliers": (1, 1), "blocks_per_level": 1}


def blobs(count: int = 24, side: int = 16, seed: int = 0) -> Tensor:
    """Colored disks on a colored ground (n, 3, side, side), in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.rand(count, 2, generator=generator) * side
    radius = (0.25 + 0.2 * torch.rand(count, 1, 1, generator=generator)) * side
    colors = torch.rand(2, count, 3, 1, 1, generator=generator) * 2 - 1
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    distance = ((y - at[:, 0, None, None]) ** 2 + (x - at[:, 1, None, None]) ** 2).sqrt()
    inside = (distance < radius).float()[:, None]
    return inside * colors[0] + (1 - inside) * colors[1]


IMAGES = blobs()


def kl(**more: Any) -> KLAutoencoder:
    torch.manual_seed(0)
    return KLAutoencoder(**SMALL, latent_channels=2, **more)


def vq(codes: int = 32, **more: Any) -> VQAutoencoder:
    torch.manual_seed(0)
    return VQAutoencoder(**SMALL, latent_channels=2, codes=codes, **more)


def critic(start: int = 2) -> Adversarial:
    torch.manual_seed(1)
    return Adversarial(PatchDiscriminator(channels=32, levels=1), start=start)


def trained(autoencoder: Any, steps: int = 6, **more: Any) -> StageResult:
    settings = {"batch_size": 4, "lr": 1e-3, "progress": False, "latent_noise": 0.05, **more}
    return fit_autoencoder(autoencoder, IMAGES, steps=steps, **settings)


class Flat(Autoencoder):
    """Gives every image back as its mean color."""

    def encode(self, images: Tensor) -> Tensor:
        return images.mean((2, 3), keepdim=True).expand_as(images)

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_at(step: int) -> Any:
    def after(done: int, *_: float) -> None:
        if done == step:
            raise Killed

    return after


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [kl, vq])
def test_a_killed_training_ends_with_the_same_bits(
    make: Any, precision: str, tmp_path: Path
) -> None:
    settings = {"precision": precision, "adversarial": critic(), "restart_after": 2}
    whole = trained(make(), **settings)
    keep = {"checkpoint": tmp_path / "state", "checkpoint_every": 1, "resume": True}
    for step in (1, 4):
        with pytest.raises(Killed):
            trained(make(), **settings, **keep, after=killed_at(step))
    again = trained(make(), **settings, **keep)
    assert torch.equal(whole.losses, again.losses)
    assert whole.parts.keys() == again.parts.keys()
    for name, curve in whole.parts.items():
        assert torch.equal(curve.nan_to_num(-1), again.parts[name].nan_to_num(-1)), name
    for name, weight in whole.autoencoder.state_dict().items():
        assert torch.equal(weight, again.autoencoder.state_dict()[name]), name
    assert whole.autoencoder.scale_factor == again.autoencoder.scale_factor


def test_a_longer_training_takes_over_and_another_one_is_refused(tmp_path: Path) -> None:
    keep = {"checkpoint": tmp_path / "state", "resume": True}
    trained(kl(), steps=3, **keep)
    whole, longer = trained(kl(), steps=5), trained(kl(), steps=5, **keep)
    assert torch.equal(whole.losses, longer.losses)
    for more, said in (
        ({"kl_weight": 1.0}, r"weights.kl 1e-06, but this one has 1\.0"),
        ({"batch_size": 5}, "batch_size=4"),
        ({"adversarial": critic()}, "adversarial=None"),
        ({"precision": "bfloat16"}, "precision=float32"),
    ):
        with pytest.raises(ValueError, match=said):
            trained(kl(), steps=5, **keep, **more)
    with pytest.raises(ValueError, match="VQAutoencoder"):
        trained(vq(), steps=5, **keep)
    with pytest.raises(ValueError, match="other training images"):
        fit_autoencoder(kl(), blobs(seed=1), steps=5, batch_size=4, lr=1e-3, **keep)


def test_what_is_given_stays_and_the_latents_have_unit_variance() -> None:
    given, discriminator = kl(), critic(start=0)
    before = {k: v.clone() for k, v in {**given.state_dict()}.items()}
    old = [p.clone() for p in discriminator.discriminator.parameters()]
    result = trained(given, adversarial=discriminator)
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items())
    assert all(map(torch.equal, old, discriminator.discriminator.parameters()))
    assert given.scale_factor == 1.0
    assert not result.autoencoder.training
    with torch.no_grad():
        latents = result.autoencoder.encode(IMAGES).double()
    assert float(latents.std(correction=0)) == pytest.approx(1, abs=1e-5)
    again = type(given)(**result.autoencoder.config())
    again.load_state_dict(result.autoencoder.state_dict())
    with torch.no_grad():
        assert torch.equal(again.encode(IMAGES), result.autoencoder.encode(IMAGES))


@pytest.mark.parametrize("make", [kl, vq])
def test_a_decoder_alone_learns_and_latents_stay_as_they_are(make: Any, tmp_path: Path) -> None:
    images = blobs(4, 8, seed=1)
    settings: dict[str, Any] = {"batch_size": 4, "lr": 3e-3, "ema": 0.95, "progress": False}
    first = fit_autoencoder(make(groups=8), images, steps=40, **settings).autoencoder
    settings |= {"decoder_only": True, "adversarial": critic(start=75), "steps": 80}
    result = fit_autoencoder(first, images, **settings)
    second = result.autoencoder
    with torch.no_grad():
        latents = first.encode(images)
        assert torch.equal(second.encode(images), latents)
        errors = [(s.decode(latents) - images).abs().mean() for s in (first, second)]
    assert errors[1] < 0.8 * errors[0]
    assert second.scale_factor == first.scale_factor != 1
    assert not {"kl", "codebook"} & result.parts.keys()
    assert (result.code_use is None) == (make is kl)
    keep = {"checkpoint": tmp_path / "state", "checkpoint_every": 1, "resume": True}
    with pytest.raises(Killed):
        fit_autoencoder(first, images, **settings, **keep, after=killed_at(76))
    again = fit_autoencoder(first, images, **settings, **keep)
    assert torch.equal(result.losses, again.losses)
    with pytest.raises(ValueError, match="decoder_only"):
        fit_autoencoder(first, images, **keep, **(settings | {"decoder_only": False}))


@pytest.mark.parametrize("make", [kl, vq])
def test_a_few_images_are_learned_by_heart(make: Any) -> None:
    images = blobs(4, 8, seed=1)
    settings = {"steps": 120, "batch_size": 4, "lr": 3e-3, "ema": 0.95, "progress": False}
    result = fit_autoencoder(make(groups=8), images, **settings)
    with torch.no_grad():
        made = result.autoencoder.decode(result.autoencoder.encode(images))
    flat = images.mean((2, 3), keepdim=True)
    assert (made - images).square().mean() < 0.3 * (flat - images).square().mean()
    assert result.losses[-20:].mean() < result.losses[:20].mean() / 2


# --- the parts of the loss -----------------------------------------------------------------------


def number(value: Tensor | float) -> float:
    """A number without its gradient."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def parts_of(autoencoder: Any, step: int = 0, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    weights = {"kl": 0.0, "codebook": 1.0, "commitment": 0.25, "noise": 0.0, "perceptual": 1.0}
    adversarial, perceptual = options.pop("adversarial", None), options.pop("perceptual", None)
    weights |= {"restart_after": 0, **options}
    objective = StageObjective(autoencoder, Weights(**weights), perceptual, adversarial)
    return objective(IMAGES[:4], step, torch.Generator().manual_seed(5))


def test_the_kl_divergence_is_that_of_torch() -> None:
    autoencoder = kl()
    loss, parts = parts_of(autoencoder, kl=0.5)
    loss = loss.detach()
    mean, log_variance = (m.detach().double() for m in autoencoder.moments(IMAGES[:4]))
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    expected = divergence.sum() / IMAGES[:4].numel()
    assert number(parts["kl"]) == pytest.approx(number(expected), rel=1e-5)
    assert number(loss) == pytest.approx(number(parts["l1"]) + 0.5 * number(expected), rel=1e-5)


def test_latents_are_drawn_from_the_posterior_and_noise_is_added() -> None:
    autoencoder = kl(scale_factor=0.3)
    seen: list[Tensor] = []
    autoencoder.from_latent.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        parts_of(autoencoder)
        parts_of(autoencoder, noise=0.2)
        parts_of(autoencoder, kl=1.0)
        mean, log_variance = autoencoder.moments(IMAGES[:4])
    deviation = (log_variance / 2).exp()
    assert torch.allclose(seen[0], mean, atol=1e-6)
    share = (seen[1] - mean).std() / mean.std()
    assert number(share) == pytest.approx(0.2, rel=0.1)
    drawn = (seen[2] - mean) / deviation
    assert number(drawn.std()) == pytest.approx(1, rel=0.1)
    assert abs(number(drawn.mean())) < 0.1


def test_the_codebooks_loss_moves_codes_and_latents_as_told() -> None:
    autoencoder = vq()
    nn.init.normal_(autoencoder.codebook.weight, std=0.3)
    loss, parts = parts_of(autoencoder, commitment=0.5, codebook=2.0)
    with torch.no_grad():
        latents = autoencoder.encode(IMAGES[:4])
        codes = autoencoder.nearest(latents)
        vectors = autoencoder.codebook(codes).movedim(-1, 1)
        distance = number((vectors - latents).square().mean())
        made = autoencoder.decode(latents)
    assert number(parts["codebook"]) == pytest.approx(1.5 * distance, rel=1e-5)
    assert number(parts["l1"]) == pytest.approx(number((made - IMAGES[:4]).abs().mean()), rel=1e-5)
    loss.backward()
    # Codes learn from their own distance alone: 2 * weight * (code - latent) / count, summed.
    rows, flat = latents.movedim(1, -1).reshape(-1, 2), codes.flatten()
    pull = 2.0 * 2 * (autoencoder.codebook.weight.detach()[flat] - rows) / latents.numel()
    expected = torch.zeros_like(autoencoder.codebook.weight).index_add(0, flat, pull)
    assert torch.allclose(autoencoder.codebook.weight.grad, expected, atol=1e-6)


def test_the_encoder_learns_through_the_codes() -> None:
    autoencoder = vq()
    nn.init.normal_(autoencoder.codebook.weight, std=0.3)
    loss, _ = parts_of(autoencoder, codebook=0.0)
    loss.backward()
    assert number(autoencoder.to_latent.weight.grad.norm()) > 0
    assert not autoencoder.codebook.weight.grad.any()


def test_the_adaptive_weight_is_the_ratio_of_gradients() -> None:
    autoencoder, adversarial = kl(), critic(start=3)
    before, parts = parts_of(autoencoder, step=2, adversarial=adversarial)
    assert "fooling" not in parts
    loss, parts = parts_of(autoencoder, step=3, adversarial=adversarial)
    last = autoencoder.decoder.conv_out.weight
    made = autoencoder.decode(autoencoder.moments(IMAGES[:4])[0])
    patches = adversarial.discriminator(made)
    wanted = []
    for value in ((made - IMAGES[:4]).abs().mean(), -patches.mean()):
        autoencoder.zero_grad()
        value.backward(retain_graph=True)  # the plain way, through all weights
        wanted.append(last.grad.double().norm())
    ratio = 0.5 * number(wanted[0] / (wanted[1] + 1e-4))
    assert number(parts["adversarial_weight"]) == pytest.approx(ratio, rel=1e-4)
    on_real = adversarial.discriminator(IMAGES[:4])
    hinge = ((1 - on_real).clamp(min=0).mean() + (1 + patches).clamp(min=0).mean()) / 2
    assert number(parts["telling"]) == pytest.approx(number(hinge), rel=1e-5)
    total = number(before) - ratio * number(patches.mean()) + number(hinge)
    assert number(loss) == pytest.approx(total, rel=1e-4)


def test_one_backward_pass_is_that_of_two() -> None:
    autoencoder, adversarial = kl(), critic(start=0)
    loss, parts = parts_of(autoencoder, adversarial=adversarial)
    loss.backward()
    mine = [p.grad.clone() for p in autoencoder.parameters() if p.grad is not None]
    critics = [p.grad.clone() for p in adversarial.discriminator.parameters()]
    autoencoder.zero_grad()
    adversarial.discriminator.zero_grad()
    made = autoencoder.decode(autoencoder.moments(IMAGES[:4])[0])
    l1 = (made - IMAGES[:4]).abs().mean()
    weight = parts["adversarial_weight"]
    (l1 - weight * adversarial.discriminator(made).mean()).backward()
    theirs = [p.grad.clone() for p in autoencoder.parameters() if p.grad is not None]
    adversarial.discriminator.zero_grad()
    real, fake = (adversarial.discriminator(x) for x in (IMAGES[:4], made.detach()))
    ((1 - real).relu().mean() / 2 + (1 + fake).relu().mean() / 2).backward()
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)
    for one, parameter in zip(critics, adversarial.discriminator.parameters(), strict=True):
        assert torch.allclose(one, parameter.grad, rtol=1e-4, atol=1e-7)


def test_a_perceptual_distance_is_added_with_its_weight() -> None:
    plain, _ = parts_of(kl())
    loss, parts = parts_of(kl(), perceptual=lambda a, b: (a - b).square())
    made = kl().decode(kl().moments(IMAGES[:4])[0])
    squares = number((made - IMAGES[:4]).square().mean())
    assert number(parts["perceptual"]) == pytest.approx(squares, rel=1e-5)
    assert number(loss) == pytest.approx(number(plain) + squares, rel=1e-5)


# --- codes ---------------------------------------------------------------------------------------


def test_code_use_is_entropy_and_share() -> None:
    use = CodeUse.of(torch.tensor([4, 4, 0, 8]))
    assert use.perplexity == pytest.approx(2**1.5)
    assert (use.used, use.codes, use.positions) == (0.75, 4, 16)
    assert CodeUse.of(torch.full((10,), 3)).perplexity == pytest.approx(10)
    assert CodeUse.of(torch.tensor([5, 0])).perplexity == pytest.approx(1)


def test_a_collapsed_codebook_comes_back_only_by_restarts() -> None:
    def collapsed() -> VQAutoencoder:
        autoencoder = vq(64)
        nn.init.constant_(autoencoder.codebook.weight, 50.0)
        nn.init.zeros_(autoencoder.codebook.weight[:1])
        return autoencoder

    alone = trained(collapsed(), steps=8, restart_after=0)
    helped = trained(collapsed(), steps=20, restart_after=5)
    assert alone.code_use is not None
    assert helped.code_use is not None
    assert alone.code_use.used == pytest.approx(1 / 64)
    assert helped.code_use.used > 0.5
    assert helped.code_use.perplexity > 10
    assert alone.parts["restarted"].nansum() == 0
    assert helped.parts["perplexity"][-5:].mean() > 5


def test_dead_codes_move_to_latents_and_living_ones_stay() -> None:
    book, latents = torch.zeros(6, 2), torch.arange(8.0).view(4, 2) + 1
    age = torch.tensor([0, 3, 2, 9, 3, 0])
    moved = restart_dead(book, age, latents, 3, torch.Generator().manual_seed(0))
    assert moved == 3
    assert age.tolist() == [0, 0, 2, 0, 0, 0]
    assert not book[[0, 2, 5]].any()
    found = {tuple(row) for row in book[[1, 3, 4]].tolist()}
    assert len(found) == 3
    assert found <= {tuple(row) for row in latents.tolist()}


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "more", "said"),
    [
        (torch.zeros(8, 3, 1, 1), {}, r"images of 1x1 are smaller than the autoencoder's factor 2"),
        (torch.zeros(8, 3, 15, 16), {}, r"15x16 do not divide by the autoencoder's factor 2"),
        (torch.zeros(3, 3, 16, 16), {}, r"batch_size=4, but there are 3 images"),
        (torch.zeros(0, 3, 16, 16), {}, "no training images"),
        (torch.zeros(8, 1, 16, 16), {}, r"1 channels, the autoencoder takes 3"),
        (torch.full((8, 3, 16, 16), torch.nan), {}, "image 0 is not finite"),
        (IMAGES, {"kl_weight": -1}, "kl_weight"),
        (IMAGES, {"kl_weight": float("nan")}, "kl_weight"),
        (IMAGES, {"steps": 0}, "steps"),
        (IMAGES, {"batch_size": 0}, "batch_size"),
        (IMAGES, {"latent_noise": -0.1}, "latent_noise"),
        (IMAGES, {"restart_after": -1}, "restart_after"),
        (IMAGES, {"precision": "half"}, "precision='half'"),
        (IMAGES, {"ema": 2.0}, "ema"),
    ],
)
def test_bad_input_is_one_line(images: Tensor, more: dict[str, Any], said: str) -> None:
    settings = {"steps": 2, "batch_size": 4, "lr": 1e-3, "progress": False, **more}
    with pytest.raises(ValueError, match=said) as raised:
        fit_autoencoder(kl(), images, **settings)
    assert "\n" not in str(raised.value)


def test_another_kind_of_autoencoder_is_refused() -> None:
    with pytest.raises(ValueError, match="Flat is no KLAutoencoder and no VQAutoencoder"):
        fit_autoencoder(Flat(), IMAGES, steps=1, batch_size=4, lr=1e-3)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_last_state(
    tmp_path: Path,
) -> None:
    def broken(images: Tensor, generator: torch.Generator) -> Tensor:
        broken.calls += 1
        return images * (torch.nan if broken.calls > 3 else 1)

    broken.calls = 0  # type: ignore[attr-defined]
    keep = {"checkpoint": tmp_path / "state", "checkpoint_every": 2}
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 3.*after 2 steps"):
        trained(kl(), augment=broken, **keep)
