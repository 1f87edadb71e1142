"""Samplers and schedules against diffusers, against textbook equations, and in the limit."""

import importlib.util
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodiff.cli import main
from retrodiff.diffusion import (
    DDIM,
    DDPM,
    PLMS,
    ClassifierFree,
    DPMpp2M,
    EDMDenoiser,
    EpsDenoiser,
    Euler,
    EulerAncestral,
    FlowDenoiser,
    Heun,
    Interval,
    Karras,
    LinearFlow,
    LogSpaced,
    ScaledLinear,
    Step,
    Stepwise,
    get_sampler,
)
from retrodiff.diffusion.sampler import SAMPLERS
from retrodiff.interfaces import Context
from retrodiff.testing import check_sampler, check_schedule


def network(x, t):
    """A smooth stand-in for a noise prediction, the same for both libraries."""
    return torch.sin(3 * x) * 0.5 + 0.3 * x + 0.1 * torch.cos(t / 200)


class Network(torch.nn.Module):
    shape, widths = (1, 4, 4), {}

    def forward(self, x, timesteps, context):
        return network(x, timesteps.view(-1, 1, 1, 1))


def ours(sampler, steps, noise, generator=None):
    denoiser = EpsDenoiser(Network())
    schedule = denoiser.schedule
    sigmas = schedule.sigmas(steps)
    x = schedule.start(noise, sigmas)
    x = sampler.sample(lambda x, s: denoiser.denoise(x, s, Context({})), x, sigmas, generator)
    return schedule.finish(x, sigmas)


def noise():
    return torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 500])
def test_ddim_is_diffusers_ddim(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.alphas_cumprod = 1 / (1 + ScaledLinear().table ** 2)  # theirs is float32
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    x = noise()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.double()), t, x).prev_sample
    torch.testing.assert_close(ours(DDIM(), steps, noise()), x, rtol=1e-8, atol=1e-8)


def test_ddim_is_the_papers_equation():
    """Song et al. 2021, eq. 12, written out in the variance-preserving variables, with noise."""
    table = ScaledLinear().table
    bar = 1 / (1 + table**2)
    steps, eta = 20, 0.7
    times = ScaledLinear().timesteps(steps).tolist()
    x, generator = noise(), torch.Generator().manual_seed(3)
    for i, t in enumerate(times):
        previous = bar[times[i + 1]] if i + 1 < steps else bar[0]
        eps = network(x, torch.tensor(float(t), dtype=torch.float64))
        x0 = (x - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()
        s = eta * ((1 - previous) / (1 - bar[t])).sqrt() * (1 - bar[t] / previous).sqrt()
        x = previous.sqrt() * x0 + (1 - previous - s**2).sqrt() * eps
        fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = x + s * fresh
    mine = ours(DDIM(eta=eta), steps, noise(), torch.Generator().manual_seed(3))
    torch.testing.assert_close(mine, x, rtol=1e-9, atol=1e-9)


def _gaussian(x, sigma):
    s2 = sigma.view(-1, 1, 1, 1) ** 2
    return (0.25 * x + 0.7 * s2) / (0.25 + s2)


def _oracle(scheduler, sigmas, x, per_step=1):
    """Runs a σ-space diffusers scheduler on the closed-form denoiser of a Gaussian."""
    for t in scheduler.timesteps:
        sigma = scheduler.sigmas[scheduler.step_index if scheduler.step_index is not None else 0]
        sigma = sigma.double().expand(len(x))
        scheduler_input = x
        eps = (x - _gaussian(scheduler_input, sigma)) / sigma.view(-1, 1, 1, 1)
        x = scheduler.step(eps, t, x).prev_sample
    return x


# diffusers hands torch tensors to numpy in a way that numpy 2 warns about.
old_numpy = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@old_numpy
@pytest.mark.parametrize(
    ("sampler", "name"), [(Euler(), "EulerDiscreteScheduler"), (Heun(), "HeunDiscreteScheduler")]
)
def test_first_and_second_order_are_diffusers(sampler, name):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear")
    scheduler.set_timesteps(12)
    levels = scheduler.sigmas.double()
    ours_levels = torch.cat([levels[:1], levels[1:-1:2], levels[-1:]]) if "Heun" in name else levels
    x = noise() * float(levels[0])
    expected = _oracle(scheduler, levels, x)
    mine = sampler.sample(_gaussian, x, ours_levels)
    torch.testing.assert_close(mine, expected.double(), rtol=1e-5, atol=1e-5)


@old_numpy
def test_euler_ancestral_is_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear")
    scheduler.set_timesteps(12)
    levels = scheduler.sigmas.double()
    x = start = noise() * float(levels[0])
    generator = torch.Generator().manual_seed(3)
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        sigma = levels[scheduler.step_index].expand(len(x))
        eps = (x - _gaussian(x, sigma)) / sigma.view(-1, 1, 1, 1)
        x = scheduler.step(eps, t, x, generator=generator).prev_sample.double()
    again = torch.Generator().manual_seed(3)
    mine = EulerAncestral().sample(_gaussian, start, levels, again)
    torch.testing.assert_close(mine, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 1.7, 50.0])
def test_euler_ancestral_is_its_equations(eta):
    """Katherine Crowson's k-diffusion, ``get_ancestral_step`` and what follows, in float64."""
    sigmas = Karras(0.01, 50.0).sigmas(9).double()
    x = start = noise() * float(sigmas[0])
    generator = torch.Generator().manual_seed(3)
    for sigma, following in itertools.pairwise(sigmas):
        up = eta * (following**2 * (sigma**2 - following**2) / sigma**2).sqrt()
        up = torch.minimum(up, following)
        down = (following**2 - up**2).clamp_min(0).sqrt()
        x = x + (down - sigma) * (x - _gaussian(x, sigma.expand(len(x)))) / sigma
        if eta > 0 and following > 0:
            x = x + up * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    again = torch.Generator().manual_seed(3)
    mine = EulerAncestral(eta).sample(_gaussian, start, sigmas, again)
    torch.testing.assert_close(mine, x, rtol=1e-6, atol=1e-6)
    assert not eta or not torch.equal(mine, EulerAncestral(eta).sample(_gaussian, start, sigmas))


def test_euler_ancestral_without_noise_is_euler_and_otherwise_ddim():
    sigmas, x = Karras(0.01, 50.0).sigmas(20), noise() * 50
    plain, none = (s.sample(_gaussian, x, sigmas) for s in (Euler(), EulerAncestral(0.0)))
    assert torch.equal(plain, none)
    for eta in (0.5, 1.0):
        one, other = (
            s.sample(_gaussian, x, sigmas, torch.Generator().manual_seed(1))
            for s in (EulerAncestral(eta), DDIM(eta=eta))
        )
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@old_numpy
def test_dpmpp_2m_is_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        algorithm_type="dpmsolver++",
        solver_order=2,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
        timestep_spacing="leading",
        steps_offset=1,
    )
    scheduler.set_timesteps(15)
    x = noise()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.double()), t, x).prev_sample
    levels = scheduler.sigmas.double()
    denoiser = EpsDenoiser(Network())
    start = noise() * math.sqrt(1 + float(levels[0]) ** 2)
    mine = DPMpp2M().sample(lambda x, s: denoiser.denoise(x, s, Context({})), start, levels)
    mine = mine / math.sqrt(1 + float(levels[-1]) ** 2)
    torch.testing.assert_close(mine, x, rtol=2e-5, atol=2e-5)


def test_plms_is_the_multistep_formula_of_the_noise():
    """Liu et al. 2022, eq. 12, in variance-preserving variables: improved Euler, then AB 2 to 4."""
    table = ScaledLinear().table
    bar = 1 / (1 + table**2)
    steps = 10
    times = ScaledLinear().timesteps(steps).tolist()

    def move(x, eps, t, previous):
        x0 = (x - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()
        return previous.sqrt() * x0 + (1 - previous).sqrt() * eps

    x, past = noise(), []
    for i, t in enumerate(times):
        previous = bar[times[i + 1]] if i + 1 < steps else bar[0]
        eps = network(x, torch.tensor(float(t), dtype=torch.float64))
        if not past:
            ahead = network(
                move(x, eps, t, previous), torch.tensor(float(times[i + 1]), dtype=torch.float64)
            )
            mean = (eps + ahead) / 2
        elif len(past) == 1:
            mean = 1.5 * eps - 0.5 * past[-1]
        elif len(past) == 2:
            mean = (23 * eps - 16 * past[-1] + 5 * past[-2]) / 12
        else:
            mean = (55 * eps - 59 * past[-1] + 37 * past[-2] - 9 * past[-3]) / 24
        past.append(eps)
        x = move(x, mean, t, previous)
    torch.testing.assert_close(ours(PLMS(), steps, noise()), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "sampler",
    [
        *(DDIM(), DDIM(eta=1.0), DDPM(), PLMS(), Euler(), Heun(), DPMpp2M()),
        *(EulerAncestral(), EulerAncestral(0.3), EulerAncestral(1.5)),
    ],
    ids=repr,
)
def test_contract(sampler):
    check_sampler(sampler)


@pytest.mark.parametrize(
    "schedule", [ScaledLinear(), LogSpaced(), Karras(), LinearFlow(), LinearFlow(shift=3.0)]
)
def test_schedule_contract(schedule):
    check_schedule(schedule)


@given(steps=st.integers(1, 1000))
@settings(max_examples=200, deadline=None)
def test_every_step_count_gives_as_many_distinct_timesteps(steps):
    times = ScaledLinear().timesteps(steps)
    assert len(times) == steps
    assert len(set(times.tolist())) == steps
    assert 0 <= int(times.min())
    assert int(times.max()) < 1000
    if 1000 % steps == 0 and steps < 1000:
        assert times.flip(0).tolist() == [t + 1 for t in range(0, 1000, 1000 // steps)]
    sigmas = ScaledLinear().sigmas(steps)
    assert len(sigmas) == steps + 1
    assert bool((sigmas.diff() < 0).all())


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps={steps}.*1000"):
        ScaledLinear().sigmas(steps)


def test_sigma_and_timestep_are_inverse():
    schedule = ScaledLinear()
    back = schedule.timestep(schedule.table.float())
    assert torch.equal(back, torch.arange(1000).float())
    between = (schedule.table[10] * schedule.table[11]).sqrt()
    assert float(schedule.timestep(between[None])) == pytest.approx(10.5)


def test_higher_order_needs_fewer_steps():
    """Error against the exact flow of a Gaussian falls as the order says."""

    def error(sampler, steps):
        sigmas = Karras(0.01, 50.0).sigmas(steps)[:-1]
        x = noise() * float(sigmas[0])
        out = sampler.sample(_gaussian, x, sigmas)
        s0, s1 = float(sigmas[0]) ** 2, float(sigmas[-1]) ** 2
        exact = 0.7 + (x - 0.7) * math.sqrt((0.25 + s1) / (0.25 + s0))
        return float((out - exact).abs().max())

    orders = ((Euler(), 1), (DDIM(), 1), (Heun(), 2), (DPMpp2M(), 2), (PLMS(), 2))
    for sampler, order in orders:
        measured = math.log2(error(sampler, 40) / error(sampler, 80))
        assert measured > order - 0.35, f"{sampler}: order {measured:.2f}"


def test_even_steps_of_log_sigma_keep_both_ends():
    table = ScaledLinear(0.0015, 0.015).table
    sigmas = LogSpaced(ScaledLinear(0.0015, 0.015)).sigmas(30)
    assert float(sigmas[0]) == pytest.approx(float(table[-1]))
    assert float(sigmas[-1]) == pytest.approx(float(table[0]))
    torch.testing.assert_close(sigmas[1:] / sigmas[:-1], (sigmas[1] / sigmas[0]).expand(30))
    t = ScaledLinear(0.0015, 0.015).timestep(sigmas)
    assert float(t[0]) == pytest.approx(999)
    assert float(t[-1]) == pytest.approx(0)


def test_twenty_steps_of_dpmpp_2m_are_nearer_than_a_hundred_of_ddim():
    """On a mixture of Gaussians; and not on even timesteps, which the documentation says."""
    path = Path(__file__).parents[1] / "benchmarks" / "sampler_steps.py"
    spec = importlib.util.spec_from_file_location("sampler_steps", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.measure(128, (20, 100), 300)
    assert found["reference_error"] < 1e-5
    even, log = benchmark.bounds(found["rows"])
    assert log["holds"]
    assert not even["holds"]


def test_unknown_sampler_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown sampler 'k_lms'.*dpmpp_2m"):
        get_sampler("k_lms")


def test_every_sampler_has_a_name_on_the_command_line(capsys):
    assert get_sampler("euler_ancestral") == EulerAncestral()
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in SAMPLERS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(eta=1.5), "eta=1.5: give a finite number, at least 0, at most 1"),
        (lambda: DDIM(eta=-0.1), "eta=-0.1"),
        (lambda: DDPM(eta=math.nan), "eta=nan"),
        (lambda: EulerAncestral(-0.1), "eta=-0.1: give a finite number, at least 0"),
        (lambda: EulerAncestral(math.inf), "eta=inf"),
        (lambda: ClassifierFree(math.nan), "scale=nan: give a finite number"),
        (lambda: ClassifierFree(math.inf), "scale=inf"),
        (lambda: ClassifierFree("2"), "scale='2'"),
        (lambda: Interval(ClassifierFree(2.0), 1.0, 0.5), "high=0.5: give a number, at least 1"),
        (lambda: Interval(ClassifierFree(2.0), math.nan, 5.0), "low=nan"),
        (lambda: Karras(sigma_min=0.0), "sigma_min=0.0: give a finite number, above 0"),
        (lambda: Karras(sigma_min=90.0), "sigma_max=80.0: give a finite number, above 90"),
        (lambda: Karras(rho=math.nan), "rho=nan"),
        (lambda: LinearFlow(t_max=1.0), "t_max=1.0: give a finite number, above 0, below 1"),
        (lambda: LinearFlow(shift=0.0), "shift=0.0"),
        (lambda: ScaledLinear(beta_start=math.nan), "beta_start=nan"),
        (lambda: ScaledLinear(0.02, 0.01), "beta_end=0.01: give a finite number, at least 0.02"),
        (lambda: ScaledLinear(length=0), "length=0: give a whole number, at least 2"),
        (lambda: EDMDenoiser(Network(), sigma_data=math.nan), "sigma_data=nan"),
        (lambda: EDMDenoiser(Network(), std=0.0), "std=0.0"),
        (lambda: EDMDenoiser(Network(), sigma_max=math.inf), "sigma_max=inf"),
        (lambda: FlowDenoiser(Network(), t_max=1.5), "t_max=1.5"),
        (lambda: FlowDenoiser(Network(), mean=math.nan), "mean=nan"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "schedule", [ScaledLinear(), Karras(), LinearFlow(), LogSpaced()], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_interval_includes_the_levels_that_equal_its_bounds(schedule, dtype):
    """In 32 bits a level is a little less, or a little more, than what it is compared with."""

    class Branches(EDMDenoiser):
        def denoise(self, x, sigma, context):
            return x.new_full((len(context), *x.shape[1:]), 1.0 if len(context) == 2 else 0.0)

        def prepare(self, context):
            return context

    sigmas = schedule.sigmas(50)[:-1]
    branches = {name: Context.of(torch.zeros(1, 1, 1)) for name in ("cond", "null")}
    x = torch.zeros(1, 1, 4, 4, dtype=dtype)
    for i in range(49):
        low, high = float(sigmas[i + 1]), float(sigmas[i])
        denoise = Interval(ClassifierFree(0.0), low, high).guide(Branches(Network()), branches)
        guided = [bool(denoise(x, s.to(dtype)[None]).any()) for s in sigmas]
        assert [j for j, yes in enumerate(guided) if yes] == [i, i + 1]
    everywhere = Interval(ClassifierFree(0.0), 0.0, math.inf)
    denoise = everywhere.guide(Branches(Network()), branches)
    assert all(bool(denoise(x, s.to(dtype)[None]).any()) for s in sigmas)


def test_a_sampler_is_a_step():
    """Euler's method, written as a user would."""

    class Mine(Stepwise):
        memory = 2

        def step(self, now: Step, past) -> torch.Tensor:
            seen.append([step.sigma for step in past])
            return now.x + (now.following - now.sigma) * now.slope

    seen = []
    check_sampler(Mine())
    seen.clear()
    sigmas = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    x = noise()
    out = Mine().sample(_gaussian, x, sigmas)
    torch.testing.assert_close(out, Euler().sample(_gaussian, x, sigmas), rtol=0, atol=0)
    assert seen == [[], [4.0], [4.0, 3.0], [3.0, 2.0]]
    assert Mine().sample(_gaussian, x.half(), sigmas).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_samplers_compute_wider_than_what_they_are_given(dtype):
    """The arithmetic of a thousand steps adds no error to that of the denoiser's own type."""
    sigmas = Karras(0.01, 50.0).sigmas(1000)
    x = (noise() * float(sigmas[0])).to(dtype)
    exact = Euler().sample(_gaussian, x.double(), sigmas)
    rounded = Euler().sample(lambda x, s: _gaussian(x.double(), s.double()), x, sigmas)
    assert rounded.dtype == dtype
    assert float((rounded.double() - exact).abs().max()) < 8 * torch.finfo(dtype).eps
