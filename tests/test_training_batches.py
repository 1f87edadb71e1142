"""Batches of training steps: the same for any number of workers, and after any interruption."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trainings import small_data

from retrodiff.training import Pairing, TrainingSet


def flat(batches):
    """Everything in batches, as tensors."""
    return [
        (images, query.embedding, found.indices, found.similarity, found.embeddings)
        for images, query, found in batches
    ]


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.fixture
def data(database, encoder):
    return small_data(database, encoder)


STEPS = {"batch_size": 8, "seed": 3}


def test_batches_are_those_of_the_synchronous_way(data):
    expected = [data.batch(data.rows_at(step, 8, 3), 2) for step in range(2, 6)]
    assert equal(flat(data.batches(2, 6, k=2, **STEPS)), flat(expected))


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_bits(data, workers):
    data = data.paired(Pairing(torch.arange(20), torch.arange(20).flip(0)))
    before = torch.get_rng_state()
    here = flat(data.batches(1, 7, **STEPS))
    there = flat(data.batches(1, 7, workers=workers, **STEPS))
    assert equal(here, there)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_parts_of_processes_make_the_whole(data):
    whole = flat(data.batches(0, 3, **STEPS))
    parts = [flat(data.batches(0, 3, part=(i, 2), **STEPS)) for i in range(2)]
    joined = [
        tuple(torch.cat(both) for both in zip(*of_step, strict=True))
        for of_step in zip(*parts, strict=True)
    ]
    assert equal(whole, joined)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": (0, 3)}, "batch_size=8 images cannot be shared equally by 3 processes"),
        ({"part": (2, 2)}, r"part=\(2, 2\)"),
        ({"workers": -1}, "workers=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_read(data, options, message):
    with pytest.raises(ValueError, match=message):
        data.batches(0, 3, **{**STEPS, **options})


class Pictures:
    """Images of the user's own class, one of which does something."""

    def __init__(self, images, row, act):
        self.images, self.row, self.act = images, row, act

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        if self.row in rows.tolist():
            self.act()
        return self.images[rows]

    def name(self, row):
        return f"{row:02}.png"


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def vanished():
    raise FileNotFoundError("07.png is gone")


class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(one, two)


def odd():
    raise Odd("of two\nlines", 2)


def acting(data, act):
    return TrainingSet(Pictures(data.images, 7, act), data.embeddings, data.table, data.database)


def test_a_killed_worker_is_one_line_that_names_the_picture(data):
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(ChildProcessError, match=r"ended at 07\.png, killed") as raised:
        list(acting(data, killed).batches(0, 3, workers=2, **STEPS))
    assert "\n" not in str(raised.value)
    assert signal.getsignal(signal.SIGCHLD) is handler


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_worker_is_raised_as_it_was(data, workers):
    with pytest.raises(FileNotFoundError, match=r"^07\.png is gone$"):
        list(acting(data, vanished).batches(0, 3, workers=workers, **STEPS))


def test_an_error_that_cannot_be_sent_is_told(data):
    with pytest.raises(RuntimeError, match=r"^Odd: .*of two"):
        list(acting(data, odd).batches(0, 3, workers=1, **STEPS))


def test_closing_ends_the_workers(data):
    batches = data.batches(0, 50, workers=2, **STEPS)
    next(batches)
    children = torch.multiprocessing.active_children()
    assert len(children) == 2
    batches.close()
    for child in children:
        child.join(5)
    assert not any(child.is_alive() for child in children)


SLOW = """
import sys, time, torch
from retrodiff.databases import ArrayDatabase
from retrodiff.interfaces import Fingerprint
from retrodiff.training import TrainingSet

class Slow:
    def __len__(self): return 40
    def __getitem__(self, rows):
        time.sleep(0.02)
        return torch.zeros(len(rows), 1, 4, 4)

if __name__ == "__main__":
    about = Fingerprint(encoder="e", weights="", preprocessing="", dim=3)
    database = ArrayDatabase(torch.randn(9, 3), about)
    data = TrainingSet(Slow(), torch.randn(40, 3), torch.zeros(40, 2).long(), database)
    if len(sys.argv) > 1:
        torch.multiprocessing.set_start_method(sys.argv[1])
    number = 0
    try:
        for images, query, neighbors in data.batches(0, 10**6, batch_size=8, seed=0, workers=2):
            number += 1
            if number == 3:
                pids = [child.pid for child in torch.multiprocessing.active_children()]
                print("running", *pids, flush=True)
    except KeyboardInterrupt:
        print("stopped", len(torch.multiprocessing.active_children()), flush=True)
"""


PROGRAMS = []


@pytest.fixture(autouse=True)
def none_left():
    """Programs of a test that failed end with it."""
    yield
    while PROGRAMS:
        program = PROGRAMS.pop()
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
            program.communicate()


def started(tmp_path, *arguments):
    """A program that reads batches with two workers, and the numbers of those."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    program = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    PROGRAMS.append(program)
    first = program.stdout.readline().split()
    assert first[0] == "running", program.stderr.read()
    return program, [int(number) for number in first[1:]]


def gone(pids, seconds=20.0):
    """Whether processes end soon."""
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_ctrl_c_reaches_the_training_alone(tmp_path, method):
    program, pids = started(tmp_path, method)
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does, to all of them
    out, errors = program.communicate(timeout=60)
    assert program.returncode == 0
    assert out.split() == ["stopped", "0"]
    assert errors == ""
    assert gone(pids)


@needs_proc
def test_workers_of_a_killed_training_end(tmp_path):
    program, pids = started(tmp_path)
    program.kill()
    program.wait()
    assert gone(pids)
    program.communicate()
