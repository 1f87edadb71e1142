"""Signals and kills: a step is finished, the state is kept, the same bits come out."""

import os
import random
import signal
import threading
import time
import warnings

import pytest
import torch
from trainings import run, same, small_data, weights

from retrodiff import interrupts
from retrodiff.training import TrainingSet
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


def test_killed_at_random_moments_resumes_to_the_same_bits(recipe, data, path):
    """A short version of benchmarks/training_kill.py: SIGKILL, in a process of its own."""
    torch.set_num_threads(1)
    options = {"steps": 60, "checkpoint": path, "checkpoint_every": 5, "resume": True}
    whole = run(recipe, data, steps=60)
    draw, kills = random.Random(0), 0

    def slowly(self, *arguments, real=TrainingSet.rows_at):
        time.sleep(0.06)  # 60 steps take more than 3.6 s, so that kills come in the middle
        return real(self, *arguments)

    for _ in range(6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork of a process with threads
            child = os.fork()
        if child == 0:
            try:
                TrainingSet.rows_at = slowly
                run(recipe, data, **options)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0.1, 0.8))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert kills >= 2  # a child that goes on near the end may finish first
    resumed = run(recipe, data, **options)
    assert same(weights(whole.model), weights(resumed.model))
    assert torch.equal(whole.losses, resumed.losses)
