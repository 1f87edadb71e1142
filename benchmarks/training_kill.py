"""Kills trainings at random moments, continues them, and compares every weight.

A training is done once without a disturbance. Then a child process does it again, gets a signal at
a random moment of that time, and another one continues it: SIGKILL, which nothing can answer,
SIGTERM and SIGINT, which keep the state, and some of them twice in a row.

    python benchmarks/training_kill.py --kills 10
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from retrodiff import Builder
from retrodiff.databases import ArrayDatabase
from retrodiff.diffusion import Dropped, EDMDenoiser, LearnedNull, NeighborEmbeddings, Projected
from retrodiff.interfaces import Encoder, Fingerprint
from retrodiff.model import Model
from retrodiff.networks import UNet
from retrodiff.retrieval import NearestNeighbors
from retrodiff.training import Objective, TrainingSet, cosine, fit
from retrodiff.training.checkpoint import read_state

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL)


class Pooled(Encoder):
    """Images as 4 by 4 averages."""

    dim = 48
    fingerprint = Fingerprint(encoder="pooled", weights="", preprocessing="none", dim=48)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) -> (b, 48)."""
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def parts() -> tuple[Model, TrainingSet]:
    """A small UNet with a learned conditioner, and random images."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(64, 3, 16, 16, generator=draw) * 2 - 1
    encoder = Pooled()
    database = ArrayDatabase(torch.randn(200, 48, generator=draw), encoder.fingerprint)
    torch.manual_seed(0)
    conditioner = LearnedNull(Projected(NeighborEmbeddings("raw"), dim=48, width=32), dim=48)
    network = UNet(
        in_channels=3, out_channels=3, size=16, channels=32, multipliers=(1, 2),
        blocks_per_level=1, attention_factors=(2,), context_width=32,
    )  # fmt: skip
    recipe = Builder().encoder(encoder).database(database).conditioner(Dropped(conditioner, 0.1))
    model = recipe.denoiser(EDMDenoiser(network)).build()
    return model, TrainingSet.of(
        images, encoder, database, NearestNeighbors(), model.k, progress=False
    )


def train(steps: int, checkpoint: Path | None, out: Path) -> None:
    """The training, continued where there is a checkpoint; writes all averaged weights."""
    model, data = parts()
    fitted = fit(
        model, data, steps=steps, batch_size=8, lr=cosine(1e-3, steps, 5), ema=0.99,
        checkpoint=checkpoint, checkpoint_every=5, resume=True, snapshots=[steps // 3],
        progress=False,
    )  # fmt: skip
    weights = {"losses": fitted.losses}
    for name, model in (("end", fitted.model), ("third", fitted.snapshots[steps // 3])):
        state = Objective(model).state_dict()
        weights |= {f"{name}.{key}": value.contiguous() for key, value in state.items()}
    save_file(weights, out)


def in_child(work: Any, number: int | None = None, seconds: float = 0.0) -> int:
    """Does the work in a child process that gets a signal after some seconds; its wait status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
        child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    if number is not None:
        time.sleep(seconds)
        os.kill(child, number)  # of a child that has ended, but was not waited for, no harm
    return os.waitpid(child, 0)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    figures: dict[str, Any] = {"trainings": 0, "signals": {}, "identical": 0, "unreadable": 0}
    steps_kept: list[int] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        in_child(lambda: train(options.steps, folder / "whole.state", folder / "whole"))
        seconds = time.perf_counter() - began
        expected = load_file(folder / "whole")
        while figures["trainings"] < options.kills:
            state, out = folder / "killed.state", folder / "killed"
            for path in (state, out):
                path.unlink(missing_ok=True)

            def again(state: Path = state, out: Path = out) -> None:
                train(options.steps, state, out)

            killed = 0
            for _ in range(1 + figures["trainings"] % 2):
                number = draw.choice(SIGNALS)
                status = in_child(again, number, seconds * draw.uniform(0.05, 0.95))
                if status != 0:
                    killed += 1
                    word = signal.Signals(number).name
                    figures["signals"][word] = figures["signals"].get(word, 0) + 1
                    if state.exists():
                        try:
                            steps_kept.append(read_state(state).done)
                        except ValueError:
                            figures["unreadable"] += 1
            if not killed:
                continue  # it was quicker than the signal
            figures["trainings"] += 1
            if in_child(again):
                sys.exit("a training could not be continued")
            found = load_file(out)
            same = found.keys() == expected.keys()
            same = same and all(torch.equal(found[key], expected[key]) for key in expected)
            left = [f.name for f in folder.iterdir() if "partial" in f.name]
            figures["identical"] += same and not left
    figures |= {"tensors_compared": len(expected), "steps": options.steps}
    figures["steps_kept_at_the_signal"] = steps_kept
    print(json.dumps(figures, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(figures["identical"] != figures["trainings"] or figures["unreadable"] > 0)


if __name__ == "__main__":
    main()
