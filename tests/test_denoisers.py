"""Each parametrization against the closed form of a Gaussian, in float64, in its own variables."""

import pytest
import torch
from parts import small_network
from torch import nn

from retrodiff.diffusion import (
    EDMDenoiser,
    EpsDenoiser,
    FlowDenoiser,
    ScaledLinear,
    VDenoiser,
    X0Denoiser,
)
from retrodiff.interfaces import Context
from retrodiff.testing import check_denoiser

MEAN, STD = 0.7, 0.6
SCHEDULE = ScaledLinear()


class Closed(nn.Module):
    """The best network for N(MEAN, STD²) data in a parametrization's own variables."""

    shape, widths = (1, 2, 2), {}

    def __init__(self, best):
        super().__init__()
        self.best = best

    def forward(self, x, timesteps, context):
        return self.best(x, timesteps.view(-1, 1, 1, 1))


def variance_preserving(x, t):
    """E[x0], E[noise] given x = a x0 + s noise at integer timestep t (Ho et al. 2020)."""
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    bar = torch.cumprod(1 - betas, 0)[t.long()]
    a, s = bar.sqrt(), (1 - bar).sqrt()
    total = a**2 * STD**2 + s**2
    x0 = MEAN + a * STD**2 * (x - a * MEAN) / total
    noise = s * (x - a * MEAN) / total
    return a, s, x0, noise


def best_eps(x, t):
    return variance_preserving(x, t)[3]


def best_v(x, t):
    a, s, x0, noise = variance_preserving(x, t)
    return a * noise - s * x0


def best_x0(x, t):
    return variance_preserving(x, t)[2]


def best_flow(x, t):
    t = t / 1000
    total = (1 - t) ** 2 * STD**2 + t**2
    x0 = MEAN + (1 - t) * STD**2 * (x - (1 - t) * MEAN) / total
    noise = t * (x - (1 - t) * MEAN) / total
    return noise - x0


def best_edm(x, c_noise):
    """F of Karras et al. 2022, eq. 7, solved for the optimal D with sigma_data = 0.5."""
    sigma = (c_noise / 250).exp()
    noisy = x * (sigma**2 + 0.25).sqrt()
    best = (STD**2 * noisy + sigma**2 * MEAN) / (STD**2 + sigma**2)
    skip, out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    return (best - skip * noisy) / out


DENOISERS = [
    EpsDenoiser(Closed(best_eps)),
    VDenoiser(Closed(best_v)),
    X0Denoiser(Closed(best_x0)),
    EDMDenoiser(Closed(best_edm)),
    FlowDenoiser(Closed(best_flow)),
]


@pytest.mark.parametrize("denoiser", DENOISERS, ids=lambda d: type(d).__name__)
def test_denoised_is_the_conditional_mean(denoiser):
    sigma = SCHEDULE.table[[0, 10, 500, 999]]
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64) * 3
    s2 = sigma.view(-1, 1, 1, 1) ** 2
    expected = (STD**2 * x + s2 * MEAN) / (STD**2 + s2)
    out = denoiser.denoise(x, sigma, Context({}))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("denoiser", DENOISERS, ids=lambda d: type(d).__name__)
def test_loss_of_the_best_network_is_the_posterior_variance(denoiser):
    """E (F - target)² = Var[x0 | x] / c_out² where F is optimal."""
    sigma = SCHEDULE.table[700].expand(20_000)
    generator = torch.Generator().manual_seed(0)
    x0 = MEAN + STD * torch.randn(20_000, 1, 2, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    loss = denoiser.loss(x0, sigma, noise, Context({})).mean()
    posterior = STD**2 * sigma[0] ** 2 / (STD**2 + sigma[0] ** 2)
    expected = posterior / denoiser.scalings(sigma[:1]).out ** 2
    torch.testing.assert_close(loss, expected[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", [EpsDenoiser, VDenoiser, X0Denoiser, EDMDenoiser, FlowDenoiser])
def test_contract(kind):
    check_denoiser(kind(small_network()))


@pytest.mark.parametrize("kind", [EpsDenoiser, VDenoiser, X0Denoiser])
def test_min_snr_weights_are_those_of_the_paper(kind):
    """Hang et al. 2023, section 3.4: of noise, velocity and image prediction."""
    network, gamma = small_network(), 5.0
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, *network.shape, generator=generator) for _ in range(2))
    sigma = SCHEDULE.table[[10, 300, 600, 999]].float()
    context = Context.of(torch.randn(4, 4, 8, generator=generator))
    snr = sigma.double() ** -2
    least = snr.clamp(max=gamma)
    weight = {EpsDenoiser: least / snr, VDenoiser: least / (snr + 1), X0Denoiser: least}[kind]
    plain = kind(network).loss(x0, sigma, noise, context)
    weighted = kind(network, min_snr=gamma).loss(x0, sigma, noise, context)
    torch.testing.assert_close(weighted.double(), weight * plain.double(), rtol=1e-5, atol=0)
    assert kind(network, min_snr=gamma).config()["min_snr"] == gamma
    assert "min_snr" not in kind(network).config()
    with pytest.raises(ValueError, match="min_snr=0"):
        kind(network, min_snr=0)


@pytest.mark.parametrize("kind", [EDMDenoiser, FlowDenoiser])
def test_training_noise_levels_are_log_normal(kind):
    denoiser = kind(small_network(), mean=-0.5, std=0.8)
    drawn = denoiser.draw_sigmas(40_000, torch.Generator().manual_seed(0)).log()
    assert abs(float(drawn.mean()) + 0.5) < 0.02
    assert abs(float(drawn.std()) - 0.8) < 0.02


def test_eps_trains_on_every_timestep_alike():
    drawn = EpsDenoiser(small_network()).draw_sigmas(50_000, torch.Generator().manual_seed(0))
    t = SCHEDULE.timestep(drawn)
    assert torch.equal(t, t.round())
    counts = torch.histc(t, 10, 0, 1000)
    assert float((counts - 5000).abs().max()) < 6 * 5000**0.5


def test_a_network_without_prepare_sees_x_once_per_branch():
    class Foreign(nn.Module):
        shape, widths = (1, 2, 2), {"neighbors": 3}

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x, timesteps, context):
            return x * self.weight + context.streams["neighbors"].values.mean((1, 2)).view(
                -1, 1, 1, 1
            )

    check_denoiser(EDMDenoiser(Foreign()))
