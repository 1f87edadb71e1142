"""Signals and kills: a step is finished, the state is kept, the same bits come out."""

import multiprocessing
import os
import random
import signal
import threading

import pytest
import torch
from trainings import made, run, same, small_data, train_slowly, weights

from retrodiff import interrupts
from retrodiff.training import checkpoint as checkpoints
from retrodiff.training.checkpoint import read_state


@pytest.fixture
def data(encoder, database):
    return small_data(database, encoder)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


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
    real = checkpoints.write_tensors

    def interrupted_again(file, tensors, header):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        real(file, tensors, header)

    monkeypatch.setattr(checkpoints, "write_tensors", interrupted_again)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, data, lr=signaled_at(5, signal.SIGINT), checkpoint=path)
    monkeypatch.setattr(checkpoints, "write_tensors", real)
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


def test_killed_at_random_moments_resumes_to_the_same_bits(path):
    """A short version of benchmarks/training_kill.py: SIGKILL, in a process of its own.

    Processes are forked from one that has trained nothing: torch refuses a backward pass after a
    fork where the parent's has started threads.
    """
    torch.set_num_threads(1)
    options = {"steps": 60, "checkpoint": path, "checkpoint_every": 5, "resume": True}
    whole = run(*made(), steps=60)
    draw, ends = random.Random(0), []
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["trainings"])
    first = processes.Process(target=torch.set_num_threads, args=(1,))
    first.start()
    first.join()  # what the others are forked from has imported
    for _ in range(6):
        child = processes.Process(target=train_slowly, kwargs=options)
        child.start()
        child.join(draw.uniform(0.1, 0.8))
        child.kill()
        child.join()
        ends.append(child.exitcode)
    # 60 steps take more than 3.6 s; one that goes on near the end may finish before it is killed.
    assert set(ends) <= {0, -signal.SIGKILL}, ends
    assert ends.count(-signal.SIGKILL) >= 2, ends
    resumed = run(*made(), **options)
    assert same(weights(whole.model), weights(resumed.model))
    assert torch.equal(whole.losses, resumed.losses)
