"""Interrupted trainings: continued to the same bits, refused where anything else has changed."""

import errno
import os
import random
import signal
import threading
import time
import warnings

import pytest
import torch
from parts import small_network
from torch import nn
from trainings import InterruptedAt, interrupted, run, same, small_data, weights

from retrodiff import interrupts
from retrodiff.diffusion import Dropped, EDMDenoiser, NeighborEmbeddings
from retrodiff.networks.dit import DiT
from retrodiff.testing import small_database
from retrodiff.training import checkpoint as checkpoints
from retrodiff.training import constant, cosine, fit, from_checkpoint, optimize
from retrodiff.training.checkpoint import State, read_state, write_state


@pytest.fixture
def data(encoder, database):
    return small_data(database, encoder)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


# --- what may change, and what may not ---------------------------------------------------------


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


# --- files ---------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_there_is_replaced_only_on_request(recipe, data, path):
    run(recipe, data, steps=2, checkpoint=path)
    with pytest.raises(FileExistsError, match=r"continue it \(resume=True\).*overwrite=True"):
        run(recipe, data, steps=3, checkpoint=path)
    run(recipe, data, steps=3, checkpoint=path, overwrite=True)
    assert read_state(path).done == 3


@pytest.mark.parametrize("content", [b"my notes", b"", b"\x00" * 64])
def test_other_files_are_never_replaced(recipe, data, path, content):
    path.write_bytes(content)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match="is no training checkpoint"):
            run(recipe, data, checkpoint=path, **options)
    assert path.read_bytes() == content


def test_weights_of_a_model_are_no_checkpoint(recipe, data, path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    kept = path.read_bytes()
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises((FileExistsError, ValueError), match="is no training checkpoint"):
            run(recipe, data, checkpoint=path, **options)
    assert path.read_bytes() == kept


def test_places_that_are_no_files(recipe, data, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="is no regular file"):
        run(recipe, data, checkpoint=tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match="is no regular file"):
            run(recipe, data, checkpoint=tmp_path / "pipe", **options)
    monkeypatch.setenv("HOME", str(tmp_path))
    run(recipe, data, steps=1, checkpoint="~/a/b/state")
    assert (tmp_path / "a/b/state").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write into"):
        run(recipe, data, steps=1, checkpoint=tmp_path / "file" / "state")


def test_a_full_disk_keeps_the_last_checkpoint_and_the_training(recipe, data, path, monkeypatch):
    from safetensors import SafetensorError

    whole = run(recipe, data)
    real, saved = checkpoints.write_safetensors, []

    def full(file, tensors, header):
        saved.append(header["done"])
        if len(saved) == 2:
            file.with_name(file.name + ".partial").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        if len(saved) == 3:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(file, tensors, header)
        monkeypatch.setattr(checkpoints, "_last_good", file.read_bytes(), raising=False)

    monkeypatch.setattr(checkpoints, "write_safetensors", full)
    with pytest.warns(UserWarning, match="could not be kept.*No space left on device") as warned:
        fitted = run(recipe, data, checkpoint=path, checkpoint_every=4)
    assert [str(w.message).split(" could")[0] for w in warned] == [
        "the state of step 8",
        "the state of step 12",
    ]
    assert saved == ["4", "8", "12"]
    assert path.read_bytes() == checkpoints._last_good
    assert read_state(path).done == 4
    assert same(weights(fitted.model), weights(whole.model))  # what was trained is not lost
    monkeypatch.setattr(checkpoints, "write_safetensors", real)
    resumed = run(recipe, data, checkpoint=path, resume=True)
    assert same(weights(resumed.model), weights(whole.model))


def test_two_trainings_do_not_take_turns_in_one_file(recipe, data, path, tmp_path):
    other = tmp_path / "other"
    run(recipe, data, steps=2, seed=5, checkpoint=other)

    def rate(step):
        if step == 5:
            os.replace(other, path)
        return 1e-2

    with pytest.warns(UserWarning, match="written by another training meanwhile"):
        run(recipe, data, steps=8, lr=rate, checkpoint=path, checkpoint_every=4)
    assert read_state(path).run["seed"] == 5


def linear(path, **options):
    """Nine steps of the loop on a module of three weights."""
    torch.manual_seed(0)
    module = nn.Linear(3, 1)

    def loss(step, generator):
        return (module(torch.randn(8, 3, generator=generator)) - 1).square().mean()

    settings = {"steps": 9, "lr": 1e-2, "progress": False, "checkpoint": path}
    return module, loss, {**settings, "checkpoint_every": 2, **options}


def test_weights_that_are_no_numbers_do_not_replace_a_checkpoint(path):
    module, loss, options = linear(path)

    def break_weights(done):
        if done == 6:
            module.weight.data[0, 1] = torch.inf

    with pytest.raises(FloatingPointError, match=r"weight is not finite after step 6.*4 steps"):
        optimize(module, loss, after=break_weights, **options)
    assert read_state(path).done == 4
    assert bool(read_state(path).tensors["parameter.weight"].isfinite().all())


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(path):
    module, loss, options = linear(path)

    def broken(step, generator):
        return loss(step, generator) * (torch.nan if step == 5 else 1)

    with pytest.raises(FloatingPointError, match=r"loss is nan at step 5.*keeps .* 4 steps"):
        optimize(module, broken, **options)
    kept = path.read_bytes()
    with pytest.raises(FloatingPointError, match=r"nan at step 5"):
        optimize(module, broken, **options, resume=True)
    assert path.read_bytes() == kept


def damaged(content, draw):
    """Some bytes flipped, zeroed, cut off, repeated or added."""
    data = bytearray(content)
    kind = draw.choice(["flip", "flip", "byte", "zero", "cut", "grow", "header"])
    at = draw.randrange(len(data))
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        data[at] = draw.randrange(256)
    elif kind == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "cut":
        del data[at:]
    elif kind == "grow":
        data += bytes(draw.randrange(1, 100))
    else:
        data[draw.randrange(min(800, len(data)))] = draw.randrange(256)
    return bytes(data)


def test_damaged_checkpoints_are_one_line_and_never_other_weights(path):
    """The committed fuzzer of this format: 1,000 tries with a seed."""
    torch.manual_seed(0)
    tensors = {"parameter.a": torch.randn(4, 5), "ema.updates": torch.tensor(7)}
    tensors |= {"losses": torch.rand(7), "rates": torch.rand(7, dtype=torch.float64)}
    good = State(7, {"seed": 0, "batch_size": 4, "model": {"denoiser": {"width": 16}}}, tensors)
    write_state(path, good)
    content, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(1000):
        changed = damaged(content, draw)
        path.write_bytes(changed)
        try:
            state = read_state(path)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
            assert str(path) in str(error)
            continue
        assert state.done == good.done
        assert state.run == good.run
        assert state.tensors.keys() == tensors.keys()
        assert all(torch.equal(state.tensors[name], tensors[name]) for name in tensors)
    assert refused > 900


def test_a_header_that_promises_much_takes_no_memory(path):
    for length in (2**40, 2**63, 99_999_999):
        path.write_bytes(length.to_bytes(8, "little") + b'{"a":{"dtype":"F32"}}')
        with pytest.raises(ValueError, match="is damaged"):
            read_state(path)
    path.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    with pytest.raises(ValueError, match="is damaged"):
        read_state(path)


def test_a_checkpoint_of_another_format_says_so(path):
    from safetensors.torch import save_file

    about = {"format": "1", "done": "3", "steps": "8", "seed": "0"}
    save_file({"losses": torch.zeros(8)}, path, about)
    with pytest.raises(ValueError, match="of format '1', but this version reads format 2"):
        read_state(path)


# --- signals and kills ----------------------------------------------------------------------------


def signaled_at(step, *numbers):
    """A learning rate that sends this process signals during a step."""

    def rate(now):
        if now == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return 1e-2

    return rate


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_keeps_the_state(recipe, data, path, number):
    whole = run(recipe, data)
    before = [signal.getsignal(n) for n in interrupts.SIGNALS]
    with pytest.raises(KeyboardInterrupt, match=r"after 6 of 12 steps; .*resume=True") as stopped:
        run(recipe, data, lr=signaled_at(5, number), checkpoint=path)
    assert stopped.value.number == number
    assert "\n" not in str(stopped.value)
    assert [signal.getsignal(n) for n in interrupts.SIGNALS] == before
    assert read_state(path).done == 6
    resumed = run(recipe, data, checkpoint=path, resume=True)
    assert same(weights(whole.model), weights(resumed.model))


def test_a_signal_in_the_last_step_is_not_swallowed(recipe, data, path):
    with pytest.raises(KeyboardInterrupt, match="after 12 of 12 steps"):
        run(recipe, data, lr=signaled_at(11, signal.SIGTERM), checkpoint=path)
    again = run(recipe, data, checkpoint=path, resume=True)
    assert same(weights(again.model), weights(run(recipe, data).model))


def test_a_second_signal_ends_the_step_at_once(recipe, data, path):
    both = signaled_at(5, signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=r"after 5 of 12 steps"):
        run(recipe, data, lr=both, checkpoint=path)
    assert read_state(path).done == 5


def test_a_second_signal_does_not_damage_what_is_being_written(recipe, data, path, monkeypatch):
    real = checkpoints.write_safetensors

    def interrupted_again(file, tensors, header):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        real(file, tensors, header)

    monkeypatch.setattr(checkpoints, "write_safetensors", interrupted_again)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, data, lr=signaled_at(5, signal.SIGINT), checkpoint=path)
    monkeypatch.setattr(checkpoints, "write_safetensors", real)
    assert read_state(path).done == 6
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_handlers_of_the_users_own_stay(recipe, data):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))
    try:
        done = run(recipe, data, steps=3, lr=signaled_at(1, signal.SIGTERM))
        assert len(done.losses) == 3
        assert seen == ["mine"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_can_train(recipe, data):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(recipe, data, steps=2)))
    thread.start()
    thread.join()
    assert len(results) == 1


def test_killed_at_random_moments_resumes_to_the_same_bits(recipe, data, path):
    """A short version of benchmarks/training_kill.py: SIGKILL, in a process of its own."""
    torch.set_num_threads(1)
    options = {"steps": 60, "checkpoint": path, "checkpoint_every": 5, "resume": True}
    began = time.perf_counter()
    whole = run(recipe, data, steps=60)
    seconds, draw, kills = time.perf_counter() - began, random.Random(0), 0
    for _ in range(6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork of a process with threads
            child = os.fork()
        if child == 0:
            try:
                run(recipe, data, **options)
            finally:
                os._exit(0)
        time.sleep(seconds * draw.uniform(0.1, 0.8))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert kills >= 1
    resumed = run(recipe, data, **options)
    assert same(weights(whole.model), weights(resumed.model))
    assert torch.equal(whole.losses, resumed.losses)


# --- a training that is not finished can be looked at ----------------------------------------------


def test_the_average_so_far_can_be_taken_from_a_checkpoint(recipe, data, path):
    interrupted(recipe, data, path, at=6)
    model = recipe.build()
    before = weights(model)
    so_far = from_checkpoint(model, path)
    assert same(weights(so_far), weights(run(recipe, data, steps=6).model))
    assert same(weights(model), before)
    with pytest.raises(ValueError, match="denoiser.network.width 16, but this one has 32"):
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
