"""The examples run as they are, only shorter."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from retrodiff import Model
from retrodiff.model.generated import to_picture

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> dict[str, object]:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def pictures(folder: Path, n: int, seed: int) -> Path:
    """Flat colors with a brighter square: small pictures that differ."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for i in range(n):
        image = (torch.rand(3, 1, 1, generator=generator) * 1.5 - 1).expand(3, 40, 48).clone()
        image[:, 8:24, 8:24] += 0.5
        to_picture(image).save(folder / f"{i}.png")
    return folder


def test_every_example_is_run() -> None:
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    assert [file.stem for file in EXAMPLES.glob("*.py") if file.stem not in tests] == []


def test_custom_retriever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "custom_retriever.py")
    assert "keeps every promise" in capsys.readouterr().out


def test_swap_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = run(
        monkeypatch,
        *("swap_database.py", "--out", str(tmp_path / "swap")),
        *("--steps", "2", "--channels", "32"),
    )
    assert (tmp_path / "swap" / "swap.png").stat().st_size > 10_000
    model, swapped = made["model"], made["swapped"]
    assert isinstance(model, Model)
    assert isinstance(swapped, Model)
    assert swapped.denoiser is model.denoiser
    assert {
        r["file"] for r in swapped.database.records(torch.tensor([0, -1 % len(swapped.database)]))
    } == {
        "chelsea",
        "retina",
    }


def test_train_on_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(
        monkeypatch,
        "train_on_a_folder.py",
        str(pictures(tmp_path / "training", 12, seed=0)),
        str(pictures(tmp_path / "library", 10, seed=1)),
        *("--out", str(tmp_path / "out"), "--encoder", "timm:test_resnet", "--no-pretrained"),
        *("--steps", "3", "--channels", "32", "--size", "16"),
    )
    assert len(list((tmp_path / "out" / "samples").glob("*.png"))) == 16
    again = Model.load(tmp_path / "out" / "model")
    assert again.database is not None
    assert len(again.database) == 10


def test_convert_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parity = Path(__file__).parents[2] / "shared" / "parity"
    if not parity.is_dir():
        pytest.skip("the reference checkpoints are not here (shared/parity is missing)")
    run(
        monkeypatch,
        *("convert_published.py", str(parity / "rdm_vq_tiny.ckpt")),
        *(str(parity / "rdm_vq_tiny.yaml"), str(tmp_path / "out"), "--scale", "raw"),
    )
    assert (tmp_path / "out" / "0.png").is_file()
