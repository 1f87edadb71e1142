"""Small trainings that tests share."""

from __future__ import annotations

import time

import torch
from parts import HashingEncoder, small_network, small_recipe
from torch import nn

from retrodiff.retrieval import NearestNeighbors
from retrodiff.testing import small_database
from retrodiff.training import TrainingSet, constant, fit


def small_data(database, encoder=None, n=20, k=4, seed=0):
    """Images of one gray each, with their neighbors."""
    generator = torch.Generator().manual_seed(seed)
    images = (torch.rand(n, 1, 1, 1, generator=generator) * 2 - 1).expand(-1, 1, 8, 8)
    encoder = encoder or HashingEncoder()
    return TrainingSet.of(images.clone(), encoder, database, NearestNeighbors(), k, progress=False)


def made():
    """Recipe and data, as the fixtures make them."""
    database = small_database(rows=40, dim=8, seed=0)
    return small_recipe(HashingEncoder(), database), small_data(database)


def run(recipe, data, **options):
    """A short training from the same initial weights."""
    model = recipe.build()
    model.denoiser.network.load_state_dict(small_network().state_dict())
    settings = {"steps": 12, "batch_size": 8, "lr": constant(1e-2), "ema": 0.9, "progress": False}
    return fit(model, data, **{**settings, **options})


def train_slowly(**options):
    """The training of `made` in a process of its own, which takes 60 ms for each step."""

    def slowly(self, *arguments, real=TrainingSet.rows_at):
        time.sleep(0.06)
        return real(self, *arguments)

    torch.set_num_threads(1)
    TrainingSet.rows_at = slowly
    run(*made(), **options)


def weights(model):
    return {k: v.clone() for k, v in model.denoiser.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class InterruptedAt:
    """A learning rate that is interrupted before a step, as by Ctrl-C between two steps."""

    def __init__(self, step, lr=1e-2):
        self.step, self.lr = step, lr

    def __call__(self, step):
        if step == self.step:
            raise KeyboardInterrupt
        return self.lr


def interrupted(recipe, data, path, at=6, **options):
    """Leaves a checkpoint of ``at`` steps."""
    try:
        run(recipe, data, lr=InterruptedAt(at), checkpoint=path, **options)
    except KeyboardInterrupt:
        return
    raise AssertionError("the training was not interrupted")


def linear(path, **options):
    """Nine steps of the loop on a module of three weights."""
    torch.manual_seed(0)
    module = nn.Linear(3, 1)

    def loss(module, part):
        return (module(torch.randn(8, 3, generator=part.generator)) - 1).square().mean()

    settings = {"steps": 9, "lr": 1e-2, "progress": False, "checkpoint": path}
    return module, loss, {**settings, "checkpoint_every": 2, **options}
