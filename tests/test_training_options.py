"""Optimizers, precision, accumulation, compilation and several averages."""

import copy

import pytest
import torch
from parts import small_recipe
from torch import nn
from trainings import interrupted, linear, run, same, small_data, weights

from retrodiff.training import optimize
from retrodiff.training.held_out import HeldOut
from retrodiff.training.optimizers import Muon, get_optimizers, orthogonal


@pytest.fixture
def data(database):
    return small_data(database)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


def test_muon_is_torchs_muon_on_matrices():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(40, 64)), nn.Parameter(torch.randn(64, 40))]
    theirs = copy.deepcopy(mine)
    ours = Muon(mine, lr=0.02, weight_decay=0.1, dtype=torch.bfloat16)
    torchs = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        ours.step()
        torchs.step()
    for one, other in zip(mine, theirs, strict=True):
        moved = float(((other - one).norm() / other.norm()).detach())
        assert moved < 2e-3  # products in bfloat16, in another order


def test_orthogonal_is_near_the_polar_factor():
    torch.manual_seed(0)
    matrices = torch.randn(3, 48, 32)
    found = orthogonal(matrices, dtype=torch.float32)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert float(torch.cosine_similarity(found.flatten(1), (u @ v).flatten(1)).min()) > 0.95


def test_kernels_are_matrices_and_narrow_layers_are_adamws():
    net = nn.ModuleDict(
        {"first": nn.Conv2d(3, 64, 3), "inner": nn.Conv2d(64, 64, 3), "norm": nn.GroupNorm(4, 64)}
    )
    named = dict(net.named_parameters())
    muon, adamw = get_optimizers("muon", 0.0)(named)
    chosen = {id(p) for group in muon.param_groups for p in group["params"]}
    assert {name for name, p in named.items() if id(p) in chosen} == {"inner.weight"}
    count = sum(len(g["params"]) for g in (*muon.param_groups, *adamw.param_groups))
    assert count == len(named)
    with pytest.raises(ValueError, match=r"one parameter has shape \(64,\): leave it to AdamW"):
        Muon([nn.Parameter(torch.zeros(64))])
    with pytest.raises(ValueError, match="optimizer='sgd' is unknown: give one of adamw, muon"):
        get_optimizers("sgd", 0.0)


def rmsprop(named):
    return [torch.optim.RMSprop(named.values())]


@pytest.mark.parametrize("optimizer", ["muon", rmsprop])
def test_every_optimizer_resumes_exactly(recipe, data, path, optimizer, monkeypatch):
    monkeypatch.setattr("retrodiff.training.optimizers.NARROWEST", 8)
    whole = run(recipe, data, optimizer=optimizer)
    interrupted(recipe, data, path, at=5, optimizer=optimizer)
    resumed = run(recipe, data, optimizer=optimizer, lr=1e-2, checkpoint=path, resume=True)
    assert same(weights(whole.model), weights(resumed.model))
    assert not same(weights(whole.model), weights(run(recipe, data).model))


def test_another_optimizer_or_precision_is_refused_by_name(recipe, data, path):
    run(recipe, data, checkpoint=path)
    with pytest.raises(ValueError, match="optimizer=adamw, but this one has optimizer=muon"):
        run(recipe, data, checkpoint=path, resume=True, optimizer="muon")
    with pytest.raises(ValueError, match=r"precision=float32, but .* precision=bfloat16"):
        run(recipe, data, checkpoint=path, resume=True, precision="bfloat16")
    with pytest.raises(ValueError, match="precision='half' is unknown"):
        run(recipe, data, precision="half")


def test_parts_of_a_batch_train_what_the_whole_trains(recipe, data):
    whole, parts = (run(recipe, data, lr=1e-3, accumulate=n) for n in (1, 4))
    assert torch.allclose(whole.losses, parts.losses, rtol=1e-5)
    one, other = weights(whole.model), weights(parts.model)
    assert max(float((one[n] - other[n]).abs().max()) for n in one) <= 1e-5


def test_bfloat16_learns_as_float32_does(recipe, data):
    exact, fast = (run(recipe, data, steps=60, precision=p) for p in ("float32", "bfloat16"))
    assert not torch.equal(exact.losses, fast.losses)
    assert all(p.dtype == torch.float32 for p in fast.model.denoiser.network.parameters())
    difference = (exact.losses - fast.losses).abs() / exact.losses
    assert float(difference.mean()) < 0.02
    assert float(fast.losses[-20:].mean()) < 0.9 * float(fast.losses[:20].mean())


def test_several_averages(recipe, data, path):
    both = run(recipe, data, ema=(0.5, 0.9))
    for decay in (0.5, 0.9):
        alone = weights(run(recipe, data, ema=decay).model)
        assert same(weights(both.averages[decay]), alone)
    assert same(weights(both.model), weights(both.averages[0.5]))
    interrupted(recipe, data, path, at=5, ema=(0.5, 0.9))
    resumed = run(recipe, data, ema=(0.5, 0.9), lr=1e-2, checkpoint=path, resume=True)
    assert same(weights(resumed.averages[0.9]), weights(both.averages[0.9]))
    with pytest.raises(ValueError, match=r"ema=\(0\.5, 0\.5\): give one decay, or several that"):
        run(recipe, data, ema=(0.5, 0.5))


def test_the_best_average_is_chosen_by_held_out_loss(recipe, data):
    held = HeldOut(data, every=100, levels=2)
    fitted = run(recipe, data, steps=8, ema=(0.0, 0.9999), watch=[held])
    found = {decay: held.measure(model).loss for decay, model in fitted.averages.items()}
    assert len(set(found.values())) == 2
    best = min(found, key=found.get)
    assert same(weights(fitted.model), weights(fitted.averages[best]))
    worst = run(recipe, data, steps=8, ema=(max(found, key=found.get), best), watch=[held])
    assert same(weights(worst.model), weights(fitted.averages[best]))


def test_a_compiled_network_learns_the_same(encoder, database, data, monkeypatch):
    inductor = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: inductor(f, **o, backend="aot_eager"))
    recipe = small_recipe(encoder, database)
    plain, compiled = (run(recipe, data, steps=3, compile=c) for c in (False, True))
    assert torch.allclose(plain.losses, compiled.losses, rtol=1e-4)
    assert weights(plain.model).keys() == weights(compiled.model).keys()
    assert compiled.model.denoiser.network._compiled_call_impl is None


class Watching:
    """Sees every step and draws from torch's own randomness, which must not matter."""

    def __init__(self):
        self.seen, self.began = [], []

    def begin(self, done):
        self.began.append(done)

    def look(self, moment):
        self.seen.append((moment.done, moment.images))
        torch.rand(3)
        if moment.done == 3:
            self.third = weights(moment.averaged())

    def state(self):
        return {"count": torch.tensor(len(self.seen))}

    def load(self, state):
        self.loaded = int(state["count"])


def test_watching_changes_nothing_and_goes_on_after_an_interruption(recipe, data, path):
    watcher = Watching()
    watched, alone = run(recipe, data, watch=[watcher]), run(recipe, data)
    assert same(weights(watched.model), weights(alone.model))
    assert watcher.seen == [(step, 8 * step) for step in range(1, 13)]
    assert same(watcher.third, weights(run(recipe, data, steps=3).model))
    interrupted(recipe, data, path, at=5, watch=[Watching()])
    later = Watching()
    run(recipe, data, watch=[later], checkpoint=path, resume=True)
    assert (later.began, later.loaded, later.seen[0]) == ([5], 5, (6, 48))


def test_a_loss_that_is_no_scalar_is_refused(path):
    module, _, options = linear(path)
    with pytest.raises(ValueError, match=r"the loss has shape \(8, 1\): give its mean, a scalar"):
        optimize(module, lambda module, part: module(torch.ones(8, 3)), **options)


def test_a_loss_that_is_nan_names_step_and_images(recipe, data):
    rows = data.rows_at(2, 8, 0).tolist()
    named = ", ".join(map(str, rows))
    with pytest.raises(FloatingPointError, match=rf"at step 2: .*training images {named}$"):
        run(recipe, data, lr=lambda step: 1e6 if step == 1 else 1e-3, ema=0.5)
