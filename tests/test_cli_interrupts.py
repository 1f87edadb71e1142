"""Ctrl-C and SIGTERM at any moment: one line, exit code 130 or 143."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from retrodiff.cli import main
from retrodiff.model.generated import to_picture


def ended(command, after, number, folder):
    """Exit code and lines of a command that gets a signal after some seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "retrodiff", *command],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    time.sleep(after)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    import torch

    folder = tmp_path_factory.mktemp("pictures")
    (folder / "p").mkdir()
    for i in range(40):
        to_picture(torch.rand(3, 64, 64) * 2 - 1).save(folder / "p" / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("after", "number"),
    [(0.25, signal.SIGINT), (0.5, signal.SIGINT), (0.9, signal.SIGTERM), (1.5, signal.SIGINT)],
)
def test_while_packages_load(after, number, pictures):
    command = ["train-encoder", "p", f"e-{after}", "--steps", "100000"]
    code, err = ended(command, after, number, pictures)
    assert code == 128 + number, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("retrodiff: interrupted")
    assert not (pictures / f"e-{after}").exists()


def test_advice_names_resume_only_where_there_is_one(pictures, monkeypatch, capsys):
    from retrodiff.cli import database, info

    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.chdir(pictures)
    monkeypatch.setattr(database, "_build", interrupted)
    monkeypatch.setattr(info, "run", interrupted)
    assert main(["database", "build", "p", "d", "--encoder", "e"]) == 130
    assert "--resume" in capsys.readouterr().err
    assert main(["info", "p"]) == 130
    assert "--resume" not in capsys.readouterr().err


def test_an_error_of_a_library_after_a_signal_is_an_interrupt(monkeypatch, capsys):
    from retrodiff import interrupts
    from retrodiff.cli import info

    def failed(options):
        raise RuntimeError("an index library turned Ctrl-C into this")

    monkeypatch.setattr(info, "run", failed)
    monkeypatch.setattr(interrupts, "_received", [15])
    assert main(["info", "m"]) == 143
    assert capsys.readouterr().err == "retrodiff: interrupted\n"
