"""Interrupted trainings: continued to the same bits, refused where anything else has changed."""

import pytest
import torch
from parts import small_network
from torch import nn
from trainings import InterruptedAt, interrupted, linear, run, same, small_data, weights

from retrodiff.diffusion import Dropped, EDMDenoiser, NeighborEmbeddings
from retrodiff.networks.dit import DiT
from retrodiff.testing import small_database
from retrodiff.training import constant, cosine, fit, from_checkpoint, optimize


@pytest.fixture
def data(encoder, database):
    return small_data(database, encoder)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


def test_a_training_may_get_longer(recipe, data, path):
    whole = run(recipe, data, steps=16)
    interrupted(recipe, data, path, at=6, steps=8)
    longer = run(recipe, data, steps=16, checkpoint=path, resume=True)
    assert torch.equal(whole.losses, longer.losses)
    assert same(weights(whole.model), weights(longer.model))


def test_a_finished_training_may_go_on(recipe, data, path):
    run(recipe, data, steps=8, checkpoint=path)
    longer = run(recipe, data, steps=16, checkpoint=path, resume=True)
    assert same(weights(run(recipe, data, steps=16).model), weights(longer.model))


def test_a_finished_training_gives_its_result_again(recipe, data, path):
    first = run(recipe, data, checkpoint=path)
    kept = path.read_bytes()
    again = run(recipe, data, checkpoint=path, resume=True)
    assert same(weights(first.model), weights(again.model))
    assert torch.equal(first.losses, again.losses)
    assert path.read_bytes() == kept


def test_a_cosine_may_get_longer_with_the_training(recipe, data, path):
    run(recipe, data, steps=8, lr=cosine(1e-2, 8, 1), checkpoint=path)
    longer = run(recipe, data, steps=16, lr=cosine(1e-2, 16, 2), checkpoint=path, resume=True)
    assert len(longer.losses) == 16
    assert bool(longer.losses.isfinite().all())


def test_fewer_steps_than_are_done_are_refused(recipe, data, path):
    interrupted(recipe, data, path, at=6)
    with pytest.raises(ValueError, match=r"6 steps done already, but this one has steps=4"):
        run(recipe, data, steps=4, checkpoint=path, resume=True)


def other_network(recipe, **options):
    network = DiT(
        **{
            "shape": (1, 8, 8),
            "patch": 4,
            "width": 16,
            "depth": 1,
            "heads": 2,
            "widths": {"neighbors": 8},
            **options,
        }
    )
    return recipe.denoiser(EDMDenoiser(network))


CHANGES = {
    "batch_size": ({"batch_size": 4}, "batch_size=8, but this one has batch_size=4"),
    "lr": ({"lr": constant(0.1)}, r"lr=0.01 \(constant\), .* has lr=0.1 \(constant\)"),
    "a function as lr": ({"lr": lambda step: 0.1}, "lr=0.01 at step 0, but this one has lr=0.1"),
    "kind of lr": ({"lr": cosine(1e-2, 12)}, r"lr=0.01 \(constant\), .* has lr=0.01 \(cosine\)"),
    "warmup": ({"lr": constant(1e-2, 3)}, "warmup=0 of the learning rate.* warmup=3"),
    "weight_decay": ({"weight_decay": 0.5}, "weight_decay=0.0, but this one has weight_decay=0.5"),
    "ema": ({"ema": 0.5}, "ema=0.9, but this one has ema=0.5"),
    "seed": ({"seed": 1}, "seed=0, but this one has seed=1"),
    "snapshots": ({"snapshots": [3]}, r"snapshots=\[\], but this one has snapshots=\[3\]"),
}


@pytest.mark.parametrize(("options", "message"), CHANGES.values(), ids=CHANGES)
def test_other_settings_are_refused_by_name(recipe, data, path, options, message):
    run(recipe, data, steps=12, checkpoint=path)
    kept = path.read_bytes()
    with pytest.raises(ValueError, match=f"belongs to a training with {message}") as refused:
        run(recipe, data, checkpoint=path, resume=True, **options)
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == kept


def test_other_data_are_refused_by_name(recipe, data, path, encoder, database):
    interrupted(recipe, data, path)
    fewer = database.subset(torch.arange(39))
    for other, message in (
        (small_data(database, encoder, seed=1), "other training images"),
        (small_data(database, encoder, n=19), "other training images"),
        (small_data(small_database(rows=40, dim=8, seed=0).subset(torch.arange(39))), "rows"),
        (small_data(fewer, encoder), "rows differ"),
        (small_data(database, encoder, k=5), "neighbors 4, but this one has 5"),
    ):
        with pytest.raises(ValueError, match=message):
            run(recipe, other, checkpoint=path, resume=True)


def test_one_other_picture_among_many_is_refused(recipe, data, path, encoder, database):
    """Every pixel counts, not some of the pictures."""
    import dataclasses

    interrupted(recipe, data, path)
    images = data.images.clone()
    images[13, 0, 3, 3] += 1e-3
    changed = dataclasses.replace(data, images=images)
    object.__setattr__(changed, "made_from", data.made_from)
    with pytest.raises(ValueError, match="other training images"):
        run(recipe, changed, checkpoint=path, resume=True)


def test_another_model_is_refused_by_name(recipe, data, path):
    fit_options = {"steps": 12, "batch_size": 8, "lr": 1e-2, "ema": 0.9, "progress": False}
    interrupted(recipe, data, path)
    for other, message in (
        (other_network(recipe, width=32), "denoiser.network.width 16, but this one has 32"),
        (other_network(recipe, heads=4), "denoiser.network.heads 2, but this one has 4"),
        (
            recipe.denoiser(EDMDenoiser(small_network(), sigma_data=0.7)),
            "denoiser.sigma_data 0.5, but this one has 0.7",
        ),
        (
            recipe.conditioner(Dropped(NeighborEmbeddings("raw"), 0.2)),
            "conditioner.probability 0.1, but this one has 0.2",
        ),
        (recipe.conditioner(NeighborEmbeddings("raw")), "conditioner.class"),
        (recipe.defaults(k=3), "k=4, but this one has k=3"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(other.build(), data, **fit_options, checkpoint=path, resume=True)


class Plain(nn.Module):
    """A network of the user's own, which a file describes by its weights only."""

    def __init__(self, width, frozen=0.0):
        super().__init__()
        self.shape, self.widths = (1, 8, 8), {"neighbors": 8}
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, 1, 3, padding=1)
        self.shift = nn.Parameter(torch.full((1,), frozen), requires_grad=False)

    def forward(self, x, timesteps, context):
        return self.last(torch.relu(self.norm(self.first(x)))) + self.shift


def plain(recipe, **options):
    torch.manual_seed(0)
    return recipe.denoiser(EDMDenoiser(Plain(**{"width": 4, **options})))


def fitted(recipe, data, **options):
    settings = {"steps": 12, "batch_size": 8, "lr": 1e-2, "ema": 0.9, "progress": False}
    return fit(recipe.build(), data, **{**settings, **options})


def test_buffers_and_frozen_weights_are_part_of_a_training(recipe, data, path):
    whole = fitted(plain(recipe), data)
    with pytest.raises(KeyboardInterrupt):
        fitted(plain(recipe), data, lr=InterruptedAt(7), checkpoint=path)
    with pytest.raises(ValueError, match="other frozen weights in the network"):
        fitted(plain(recipe, frozen=1.0), data, checkpoint=path, resume=True)
    with pytest.raises(ValueError, match=r"first.weight is \(4, 1, 3, 3\)"):
        fitted(plain(recipe, width=6), data, checkpoint=path, resume=True)
    resumed = fitted(plain(recipe), data, checkpoint=path, resume=True)
    assert same(weights(whole.model), weights(resumed.model))  # BatchNorm's statistics, too
    assert int(resumed.model.denoiser.network.norm.num_batches_tracked) == 12


def test_an_interruption_between_forward_and_update_is_not_kept(recipe, data, path, monkeypatch):
    """The statistics of a BatchNorm have moved on already, and the weights have not."""
    whole = fitted(plain(recipe), data)
    real, calls = EDMDenoiser.loss, [0]

    def killed(self, *arguments):
        calls[0] += 1
        value = real(self, *arguments)
        if calls[0] == 8:
            raise KeyboardInterrupt
        return value

    monkeypatch.setattr(EDMDenoiser, "loss", killed)
    with pytest.raises(KeyboardInterrupt, match=r"keeps the first 4: continue with resume=True"):
        fitted(plain(recipe), data, checkpoint=path, checkpoint_every=4)
    monkeypatch.setattr(EDMDenoiser, "loss", real)
    resumed = fitted(plain(recipe), data, checkpoint=path, checkpoint_every=4, resume=True)
    assert same(weights(whole.model), weights(resumed.model))


def test_snapshots_outlive_an_interruption(recipe, data, path):
    whole = run(recipe, data, snapshots=[3, 9])
    interrupted(recipe, data, path, at=6, snapshots=[3, 9])
    resumed = run(recipe, data, snapshots=[3, 9], checkpoint=path, resume=True)
    for step in (3, 9):
        assert same(weights(whole.snapshots[step]), weights(resumed.snapshots[step]))


def test_the_average_so_far_can_be_taken_from_a_checkpoint(recipe, data, path):
    interrupted(recipe, data, path, at=6)
    model = recipe.build()
    before = weights(model)
    so_far = from_checkpoint(model, path)
    assert same(weights(so_far), weights(run(recipe, data, steps=6).model))
    assert same(weights(model), before)
    with pytest.raises(ValueError, match=r"denoiser\.network\.width 16, but this one has 32"):
        from_checkpoint(other_network(recipe, width=32).build(), path)


def test_optimize_alone_keeps_and_resumes(path):
    def trained(**changes):
        module, loss, options = linear(**{"path": None, **changes})
        losses = optimize(module, loss, **options)
        return module.weight.detach(), losses

    whole = trained()
    with pytest.raises(KeyboardInterrupt):
        trained(path=path, lr=InterruptedAt(5))
    resumed = trained(path=path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    with pytest.raises(KeyboardInterrupt, match="nothing is kept: give a checkpoint"):
        trained(lr=InterruptedAt(4))
