"""Conditioners with weights: trained, averaged, continued, saved, loaded, moved as networks are."""

import copy
from dataclasses import replace

import pytest
import torch
from parts import small_network
from torch import nn
from trainings import InterruptedAt, small_data

from retrodiff import Model
from retrodiff.components import modules
from retrodiff.diffusion import (
    Dropped,
    EDMDenoiser,
    LearnedNull,
    NeighborEmbeddings,
    Projected,
)
from retrodiff.interfaces import Conditioner
from retrodiff.training import NamedEMA, Objective, fit, from_checkpoint, trainable_modules

RAW = NeighborEmbeddings("raw")


class MyProjection(nn.Module, Conditioner):
    """A conditioner of the user's own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 6, bias=False)

    def widths(self, dim):
        return {"neighbors": 6}

    def condition(self, query, neighbors):
        context = RAW.condition(query, neighbors)
        tokens = context.streams["neighbors"]
        return replace(
            context, streams={"neighbors": replace(tokens, values=self.layer(tokens.values))}
        )


CONDITIONERS = {
    "projected": lambda: Projected(RAW, dim=8, width=6),
    "dropped": lambda: Dropped(Projected(RAW, dim=8, width=6), 0.3),
    "learned null": lambda: LearnedNull(Projected(RAW, dim=8, width=6), dim=8),
    "dropped learned null": lambda: Dropped(
        LearnedNull(Projected(RAW, dim=8, width=6), dim=8), 0.3
    ),
    "twice dropped": lambda: Dropped(Dropped(MyProjection(), 0.2), 0.2),
    "the user's own": MyProjection,
    "the user's own, dropped": lambda: Dropped(MyProjection(), 0.3),
}
every_conditioner = pytest.mark.parametrize("make", CONDITIONERS.values(), ids=CONDITIONERS)


def model_of(recipe, make):
    torch.manual_seed(0)
    return (
        recipe.conditioner(make())
        .denoiser(EDMDenoiser(small_network(dim=6)))
        .defaults(k=2, steps=2)
        .build()
    )


@pytest.fixture
def data(database, encoder):
    return small_data(database, encoder, k=2)


def trained(model, data, **options):
    settings = {"steps": 6, "batch_size": 8, "lr": 1e-2, "ema": 0.9, "progress": False}
    return fit(model, data, **{**settings, **options})


def weights(model):
    """Of denoiser and conditioner, whatever wraps them."""
    return {
        f"{slot}.{i}.{name}": tensor.detach().clone()
        for slot in ("denoiser", "conditioner")
        for i, module in enumerate(modules(getattr(model, slot)))
        for name, tensor in module.state_dict().items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def names_of(model):
    """Of the conditioner's weights that training reaches: a null only where it is used."""
    hidden = isinstance(model.conditioner, Dropped)
    names = [name for name in weights(model) if name.startswith("conditioner")]
    return [name for name in names if hidden or "token" not in name]


@every_conditioner
def test_all_weights_are_trained_and_the_given_model_stays(recipe, data, make):
    model = model_of(recipe, make)
    before = weights(model)
    after = weights(trained(model, data).model)
    assert same(weights(model), before)
    assert names_of(model)
    assert all(not torch.equal(before[name], after[name]) for name in names_of(model))
    assert all(p.grad is None for m in modules(model.conditioner) for p in m.parameters())


@every_conditioner
def test_the_result_is_the_average_of_all_weights(recipe, data, make):
    model = model_of(recipe, make)
    objective = Objective(copy.deepcopy(model))
    average = NamedEMA(objective, 0.9)
    names = {name for name, _ in objective.named_parameters()}
    assert any(name.startswith("conditioner.") for name in names)
    assert {f"average.{name}" for name in names} == set(average.state()) - {"updates"}
    raw, mean = (trained(model, data, ema=ema).model for ema in (0.0, 0.9))
    differing = [n for n in names_of(model) if not torch.equal(weights(raw)[n], weights(mean)[n])]
    assert differing == names_of(model)


@every_conditioner
def test_snapshots_change_nothing(recipe, data, make):
    model = model_of(recipe, make)
    plain, watched = trained(model, data), trained(model, data, snapshots=[2, 4])
    assert torch.equal(plain.losses, watched.losses)
    assert same(weights(plain.model), weights(watched.model))
    assert same(weights(watched.snapshots[2]), weights(trained(model, data, steps=2).model))


@every_conditioner
def test_an_interrupted_training_ends_with_the_same_weights(recipe, data, make, tmp_path):
    path = tmp_path / "state"
    model = model_of(recipe, make)
    whole = trained(model, data)
    with pytest.raises(KeyboardInterrupt):
        trained(model, data, lr=InterruptedAt(3), checkpoint=path)
    so_far = from_checkpoint(model, path)
    assert same(weights(so_far), weights(trained(model, data, steps=3).model))
    resumed = trained(model, data, checkpoint=path, resume=True)
    assert same(weights(whole.model), weights(resumed.model))


@every_conditioner
def test_saved_loaded_and_sampled(recipe, data, encoder, make, tmp_path):
    model = trained(model_of(recipe, make), data).model
    model.save(tmp_path / "m")
    own = any(isinstance(module, MyProjection) for module in modules(model.conditioner))
    given = {"conditioner": make()} if own else {}
    again = Model.load(tmp_path / "m", encoder=encoder, database=model.database, **given)
    assert same(weights(again), weights(model))
    one, other = (m.sample(prompts=["a", "b"], seed=1).images for m in (model, again))
    assert torch.equal(one, other)
    assert bool(one.isfinite().all())


@every_conditioner
def test_moved_with_the_model(recipe, data, make):
    model = trained(model_of(recipe, make), data, steps=1).model
    model.to(dtype=torch.bfloat16)
    assert {tensor.dtype for n, tensor in weights(model).items() if n in names_of(model)} == {
        torch.bfloat16
    }
    model.to("meta")
    assert all(p.is_meta for m in modules(model.conditioner) for p in m.parameters())


def test_frozen_weights_and_shared_parts_stay(recipe, data):
    model = model_of(recipe, CONDITIONERS["dropped learned null"])
    for parameter in model.conditioner.conditioner.conditioner.parameters():
        parameter.requires_grad_(False)
    after = trained(model, data).model
    before, now = weights(model), weights(after)
    frozen = [name for name in names_of(model) if "project" in name]
    assert frozen
    assert all(torch.equal(before[n], now[n]) == (n in frozen) for n in names_of(model))
    assert set(trainable_modules(model)) == {"denoiser", "conditioner"}


class WithEncoder(nn.Module, Conditioner):
    """A conditioner that holds the model's encoder, which is not trained for that."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.layer = encoder, nn.Linear(8, 6, bias=False)

    widths, condition = MyProjection.widths, MyProjection.condition


def test_an_encoder_inside_of_a_conditioner_is_not_copied(recipe, data, encoder):
    make = lambda: Dropped(WithEncoder(encoder), 0.1)  # noqa: E731
    after = trained(model_of(recipe, make), data, steps=1).model
    assert after.conditioner.conditioner.encoder is encoder


def test_nothing_to_train_is_said(recipe, data):
    model = model_of(recipe, CONDITIONERS["projected"])
    for part in (model.denoiser, model.conditioner):
        part.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter of EDMDenoiser or Projected requires"):
        trained(model, data)
