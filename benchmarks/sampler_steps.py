"""How many steps does a sampler need? Error against steps where the best denoiser is known exactly.

The data are a mixture of Gaussians in the plane, whose denoiser E[x0 | x] is a closed formula, at
the noise levels of the paper's models. Every sampler starts from the same unit noise, once along
the paper's even timesteps (`ScaledLinear`), once along even steps of log sigma (`LogSpaced`). Two
errors:

- of the trajectory: the distance (root of the mean square over samples) between its end and the end
  of the exact probability-flow ODE from the same noise, which a float64 Runge-Kutta method of order
  4 gives that is written here and shares nothing with the samplers;
- of the distribution: the mean distance of sorted projections (sliced Wasserstein) between all ends
  and exact draws. A stochastic sampler such as DDPM can be held to this one only; its floor is what
  exact draws of the same number have.

    python benchmarks/sampler_steps.py            # about a minute on one core
    python benchmarks/sampler_steps.py --quick    # few samples and steps; writes nothing

Writes docs/images/sampler_steps.png and benchmarks/results/sampler_steps.json. The plot needs
matplotlib.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.diffusion import (
    DDIM,
    DDPM,
    PLMS,
    DPMpp2M,
    Euler,
    Heun,
    LogSpaced,
    ScaledLinear,
)
from retrodiff.disk.files import write_json
from retrodiff.interfaces import Sampler, Schedule

ROOT = Path(__file__).parents[1]
STEPS = (5, 8, 10, 15, 20, 30, 50, 100, 200, 500)
SAMPLERS: dict[str, Sampler] = {
    "DDIM": DDIM(),
    "Euler": Euler(),
    "PLMS": PLMS(),
    "Heun": Heun(),
    "DPM++(2M)": DPMpp2M(),
    "DDPM": DDPM(),
}
LEVELS: dict[str, Schedule] = {
    "even timesteps": ScaledLinear(),
    "even log sigma": LogSpaced(ScaledLinear()),
}


class Mixture:
    """Eight Gaussians of one width on two circles, about unit variance in all."""

    def __init__(self) -> None:
        angles = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
        radii = torch.tensor([1.7, 0.9], dtype=torch.float64).repeat(4)
        self.means = torch.stack([radii * angles.cos(), radii * angles.sin()], 1)
        self.weights = torch.tensor([3, 1, 2, 1, 1, 2, 1, 3], dtype=torch.float64)
        self.weights /= self.weights.sum()
        self.std = 0.15
        self.calls = 0

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x0 + sigma * noise = x] for x (b, 2, 1, 1) and sigma (b,)."""
        self.calls += 1
        variance = self.std**2 + sigma[:, None] ** 2  # (b, 1)
        apart = x.flatten(1)[:, None] - self.means  # (b, 8, 2)
        likely = self.weights.log() - apart.square().sum(-1) / (2 * variance)
        towards = self.means + apart * (self.std**2 / variance)[..., None]
        return (likely.softmax(1)[..., None] * towards).sum(1).view_as(x)

    def draw(self, n: int, sigma: float, generator: torch.Generator) -> Tensor:
        """Draws (n, 2) of x0 + sigma * noise."""
        at = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return self.means[at] + math.hypot(self.std, sigma) * noise


def exact_flow(mixture: Mixture, x: Tensor, start: float, end: float, steps: int) -> Tensor:
    """The end of dx / d(log sigma) = x - E[x0 | x], by the classical Runge-Kutta method."""

    def slope(x: Tensor, log_sigma: float) -> Tensor:
        return x - mixture.denoise(x, torch.full((len(x),), math.exp(log_sigma)).to(x))

    h = (math.log(end) - math.log(start)) / steps
    for i in range(steps):
        t = math.log(start) + i * h
        a = slope(x, t)
        b = slope(x + h / 2 * a, t + h / 2)
        c = slope(x + h / 2 * b, t + h / 2)
        d = slope(x + h * c, t + h)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


def projections(points: Tensor, directions: int = 32) -> Tensor:
    """Points (n, 2) projected on lines, each line's sorted (n, directions)."""
    angles = torch.arange(directions, dtype=torch.float64) * (math.pi / directions)
    return (points @ torch.stack([angles.cos(), angles.sin()])).sort(0).values


def rms(a: Tensor, b: Tensor) -> float:
    """Root of the mean squared distance of the rows."""
    return float((a - b).flatten(1).square().sum(1).mean().sqrt())


def measure(n: int, steps: tuple[int, ...], flow_steps: int) -> dict[str, Any]:
    """All errors, and how exact the reference is."""
    mixture, schedule = Mixture(), ScaledLinear()
    top, end = float(schedule.table[-1]), float(schedule.table[0])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, 2, 1, 1, generator=generator, dtype=torch.float64)
    first = noise * math.sqrt(1 + top**2)
    exact = exact_flow(mixture, first, top, end, flow_steps)
    halved = exact_flow(mixture, first[:500], top, end, flow_steps // 2)
    # Expected order statistics, from 16 times as many draws.
    drawn = projections(mixture.draw(16 * n, end, generator)).unflatten(0, (n, 16)).mean(1)
    apart = [projections(mixture.draw(n, end, generator)) - drawn for _ in range(16)]
    floor = float(torch.stack(apart).abs().mean())

    rows: list[dict[str, Any]] = []
    for levels, spaced in LEVELS.items():
        for name, sampler in SAMPLERS.items():
            for count in steps:
                sigmas = spaced.sigmas(count)
                mixture.calls = 0
                x = spaced.start(noise, sigmas)
                seeded = torch.Generator().manual_seed(1)
                out = sampler.sample(mixture.denoise, x, sigmas, seeded)
                distance = (projections(out.flatten(1)) - drawn).abs().mean()
                rows.append(
                    {
                        "levels": levels,
                        "sampler": name,
                        "steps": count,
                        "calls": mixture.calls,
                        "trajectory": None if name == "DDPM" else rms(out, exact),
                        "distribution": float(distance),
                    }
                )
    return {
        "samples": n,
        "reference_error": rms(halved, exact[:500]),
        "distribution_floor": floor,
        "rows": rows,
    }


def bounds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """DPM++(2M) at 20 steps against DDIM at 100, whichever levels each of them takes."""
    at = {(r["levels"], r["sampler"], r["steps"]): r["trajectory"] for r in rows}
    found: list[dict[str, Any]] = []
    for levels in LEVELS:
        error = at[levels, "DPM++(2M)", 20]
        ddim = {other: at[other, "DDIM", 100] for other in LEVELS}
        found.append(
            {
                "dpmpp_2m_levels": levels,
                "dpmpp_2m_at_20": error,
                "ddim_at_100": ddim,
                "holds": error <= min(ddim.values()),
            }
        )
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """Both errors against steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    styles = {
        "DDIM": ("#0f766e", "o", "-"),
        "Euler": ("#94a3b8", "x", ":"),
        "PLMS": ("#7c3aed", "s", "-"),
        "Heun": ("#b45309", "^", "-"),
        "DPM++(2M)": ("#be123c", "D", "-"),
        "DDPM": ("#334155", "v", "--"),
    }
    panels = [
        (f"Trajectory, {levels}", levels, "trajectory", "distance to the exact flow's end (RMS)")
        for levels in LEVELS
    ]
    panels.append(
        (
            "Distribution, even timesteps",
            "even timesteps",
            "distribution",
            "sliced Wasserstein distance",
        )
    )
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    for axis, (title, levels, error, label) in zip(axes, panels, strict=True):
        for name, (color, marker, line) in styles.items():
            rows = [r for r in found["rows"] if r["sampler"] == name and r["levels"] == levels]
            points = [(r["steps"], r[error]) for r in rows if r[error] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), line, color=color, marker=marker, label=name)
        axis.set(title=title, xlabel="steps", ylabel=label, xscale="log", yscale="log")
        ticks = [5, 10, 20, 50, 100, 200, 500]
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    reference = min(b["ddim_at_100"]["even timesteps"] for b in found["bounds"])
    for axis in axes[:2]:
        axis.axhline(
            reference,
            color="#0f766e",
            linewidth=0.9,
            dashes=(4, 3),
            label="DDIM, 100 even timesteps",
        )
    axes[0].sharey(axes[1])
    axes[2].axhline(
        found["distribution_floor"],
        color="black",
        linewidth=0.9,
        dashes=(4, 3),
        label="exact draws",
    )
    shown: dict[str, Any] = {}
    for axis in axes:
        shown |= {str(line.get_label()): line for line in axis.get_lines()}
    place = "outside lower center"
    figure.legend(list(shown.values()), list(shown), loc=place, ncols=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(rows: list[dict[str, Any]], steps: tuple[int, ...]) -> str:
    """Trajectory errors as text, DDPM's distribution error below."""
    lines = []
    for levels in LEVELS:
        lines.append(f"\n{levels + ', trajectory':28}" + "".join(f"{s:>9}" for s in steps))
        for name in SAMPLERS:
            mine = [r for r in rows if r["levels"] == levels and r["sampler"] == name]
            kind = "distribution" if name == "DDPM" else "trajectory"
            label = f"{name} (distribution)" if name == "DDPM" else name
            lines.append(f"{label:28}" + "".join(f"{r[kind]:9.4f}" for r in mine))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few samples; writes nothing")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "sampler_steps.json"
    )
    parser.add_argument("--png", type=Path, default=ROOT / "docs" / "images" / "sampler_steps.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    start = time.perf_counter()
    steps = (10, 20, 100) if arguments.quick else STEPS
    n = 256 if arguments.quick else arguments.samples
    found = measure(n, steps, 400 if arguments.quick else 1000)
    found["bounds"] = bounds(found["rows"])
    found |= {
        "date": str(date.today()),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(table(found["rows"], steps))
    print(f"\nthe exact flow is known to {found['reference_error']:.1e}")
    print(f"distribution error of {n} exact draws: {found['distribution_floor']:.4f}")
    for bound in found["bounds"]:
        ddim = ", ".join(f"{error:.4f} ({name})" for name, error in bound["ddim_at_100"].items())
        print(
            f"DPM++(2M) at 20 steps, {bound['dpmpp_2m_levels']}: {bound['dpmpp_2m_at_20']:.4f}; "
            f"DDIM at 100: {ddim}: {'holds' if bound['holds'] else 'does not hold'}"
        )
    if not arguments.quick:
        write_json(arguments.json, found)
        plot(found, arguments.png)


if __name__ == "__main__":
    main()
