"""Two processes train what one trains with all of the batch (gloo on a CPU)."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainings import run, small_data, weights

from retrodiff.training.processes import Processes


@pytest.fixture
def data(database):
    return small_data(database)


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
import trainings
from trainings import weights
from safetensors.torch import save_file

out, slow, options = sys.argv[2], float(sys.argv[3]), eval(sys.argv[4])
recipe, data = trainings.made()
if slow:
    batches = type(data).batches
    def slowly(self, *given, **options):
        for batch in batches(self, *given, **options):
            print("step", flush=True)
            time.sleep(slow)
            yield batch
    type(data).batches = slowly
fitted = trainings.run(recipe, data, **options)
from retrodiff.training.processes import Processes
if Processes().main:
    save_file({**weights(fitted.model), "losses": fitted.losses}, out)
"""


def started(out, slow=0.0, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(out), str(slow)]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [*command, repr(options)],
            env={**os.environ, **together, "RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def finished(processes):
    said = [process.communicate(timeout=240) for process in processes]
    return [process.returncode for process in processes], said


def test_two_processes_train_what_one_trains(recipe, data, tmp_path):
    codes, said = finished(started(tmp_path / "w", steps=6, batch_size=8, lr=1e-3))
    assert codes == [0, 0], said
    alone = run(recipe, data, steps=6, batch_size=8, lr=1e-3)
    together = load_file(tmp_path / "w")
    assert torch.allclose(together.pop("losses"), alone.losses, rtol=1e-5)
    mine = weights(alone.model)
    assert together.keys() == mine.keys()
    assert max(float((together[n] - mine[n]).abs().max()) for n in mine) <= 1e-5


def test_a_signal_to_one_ends_both_and_both_continue(recipe, data, tmp_path):
    file, out = tmp_path / "state", tmp_path / "w"
    options = {"steps": 12, "batch_size": 8, "lr": 1e-3, "checkpoint": str(file), "resume": True}
    processes = started(out, slow=0.3, **options)
    for _ in range(3):
        processes[1].stdout.readline()
    processes[1].send_signal(signal.SIGTERM)
    codes, said = finished(processes)
    assert all(codes), said
    assert file.exists()
    assert not out.exists()
    codes, said = finished(started(out, **options))
    assert codes == [0, 0], said
    alone = run(recipe, data, steps=12, batch_size=8, lr=1e-3)
    together = load_file(out)
    mine = weights(alone.model)
    assert max(float((together[n] - mine[n]).abs().max()) for n in mine) <= 1e-5


def test_a_batch_that_cannot_be_shared_out_is_refused(recipe, data):
    with pytest.raises(ValueError, match=r"batch_size=8 cannot be .* accumulate=3: .* of 3"):
        run(recipe, data, steps=2, batch_size=8, accumulate=3)


def test_a_program_of_its_own_uses_no_accelerate():
    alone = Processes()
    assert (alone.count, alone.index, alone.main, alone.device) == (1, 0, True, None)
    module = torch.nn.Linear(2, 2)
    assert alone.wrap(module) is module
