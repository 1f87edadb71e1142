"""The examples run as they are, only shorter, and leave what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from published_files import configuration, published_state, write_checkpoint

from retrodiff import Model
from retrodiff.disk.shipped import shipped
from retrodiff.encoders import TimmEncoder, save_encoder
from retrodiff.model.generated import to_picture

EXAMPLES = Path(__file__).parents[1] / "examples"
LONGEST = 60
"""Lines of an example: a program to be copied is read first."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    def run(name: str, *arguments: Any) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


@pytest.fixture
def pictograms() -> None:
    try:
        shipped("pictograms")
    except FileNotFoundError:
        pytest.skip("retrodiff-pictograms is not installed")


def pictures(folder: Path, n: int, seed: int, side: int = 40) -> Path:
    """Flat colors with a brighter square: small pictures that differ."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for i in range(n):
        image = (torch.rand(3, 1, 1, generator=generator) * 1.5 - 1).expand(3, side, side).clone()
        image[:, 8:24, 8:24] += 0.5
        to_picture(image).save(folder / f"{i}.png")
    return folder


def shown(file: Path) -> None:
    """A picture that is not of one color."""
    with Image.open(file) as picture:
        assert len(set(picture.convert("L").resize((32, 32)).tobytes())) > 8


def test_every_example_is_run() -> None:
    own = Path(__file__).read_text()
    assert [file.name for file in EXAMPLES.glob("*.py") if f'"{file.name}"' not in own] == []


def test_every_example_is_short() -> None:
    lines = {file.name: len(file.read_text().splitlines()) for file in EXAMPLES.rglob("*.py")}
    del lines["run.py"]  # runs the notebooks
    assert {name: n for name, n in lines.items() if n > LONGEST} == {}


def test_sample_pictograms(run, pictograms, tmp_path, capsys) -> None:
    run("sample_pictograms.py", "a red apple", *("--steps", 2, "--each", 2, "--out", tmp_path))
    assert len(list(tmp_path.glob("0*.png"))) == 2
    shown(tmp_path / "sheet.png")
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "a red apple"
    assert [line for line in told if "apple" in line and "(" in line]  # a neighbor, its license


def test_search_a_folder(run, pictograms, tmp_path, capsys) -> None:
    photos = pictures(tmp_path / "photos", 8, seed=0)
    asked = ("search_a_folder.py", photos, "--image", photos / "3.png", "--text", "a blue square")
    options = ("-k", 3, "--encoder", "pictograms", "--out", tmp_path / "out")
    run(*asked, *options)
    first = capsys.readouterr().out
    assert "1.00  3.png" in first
    shown(tmp_path / "out" / "found.png")
    run(*asked, *options)  # opens the database that is there
    assert capsys.readouterr().out == first


def test_swap_database(run, pictograms, tmp_path) -> None:
    mine = pictures(tmp_path / "mine", 6, seed=0)
    few = ("--steps", 1, "--each", 1, "--out", tmp_path / "out")
    made = run("swap_database.py", "crown", "--mine", mine, *few)
    assert [*made["databases"]] == ["all", "noto", "fluent", "twemoji", "mine"]
    assert made["swapped"].denoiser is made["model"].denoiser
    shown(tmp_path / "out" / "swap.png")


def test_union_and_filter(run, pictograms, tmp_path, capsys) -> None:
    run("union_and_filter.py", "a bird", "--out", tmp_path)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "a bird, the first: noto, noto, noto, noto"
    assert told[3].count("noto") == 3  # weights 3 and 1
    shown(tmp_path / "union.png")


def test_edit_an_image(run, pictograms, tmp_path) -> None:
    made = run(
        "edit_an_image.py", "a crown", "--steps", 4, "--strengths", 0, 0.5, "--out", tmp_path
    )
    untouched, edited = made["edits"]
    assert (untouched - made["picture"]).abs().mean() < 0.1  # only encoded and decoded
    assert (edited - untouched).abs().mean() > 0.05
    shown(tmp_path / "edit.png")


def test_custom_retriever(run, pictograms, tmp_path, capsys) -> None:
    run("custom_retriever.py", "crown", "--out", tmp_path)
    assert "keeps every promise" in capsys.readouterr().out
    shown(tmp_path / "neighbors.png")


@pytest.mark.filterwarnings("ignore:.*early in the training")
def test_own_conditioner(run, pictograms, tmp_path) -> None:
    made = run("own_conditioner.py", *("--steps", 6, "--pictures", 20, "--out", tmp_path / "out"))
    assert made["model"].conditioner.conditioner.line.tolist() != [4.0, 0.0]  # it was trained
    shown(tmp_path / "out" / "00000.png")


def test_custom_preset(run, pictograms, tmp_path) -> None:
    few = ("--steps", 2, "--pictures", 30, "--width", 32)
    made = run("custom_preset.py", *few, "--out", tmp_path / "out")
    assert type(made["model"].sampler).__name__ == "Heun"
    shown(tmp_path / "out" / "00000.png")


def test_train_on_a_folder(run, tmp_path) -> None:
    training = pictures(tmp_path / "training", 12, seed=0)
    library = pictures(tmp_path / "library", 10, seed=1)
    small = ("--encoder", "timm:test_resnet", "--no-pretrained", "--channels", 32, "--size", 16)
    out = tmp_path / "out"
    run("train_on_a_folder.py", training, library, *small, "--steps", 3, "--out", out)
    assert len(list((out / "samples").glob("0*.png"))) == 16
    again = Model.load(out / "model")
    assert again.database is not None
    assert len(again.database) == 10


def test_convert_published(run, tmp_path) -> None:
    config = configuration()
    checkpoint = write_checkpoint(tmp_path / "model.ckpt", published_state(config))
    described = tmp_path / "model.yaml"
    described.write_text(yaml.safe_dump(config))
    run("convert_published.py", checkpoint, described, tmp_path / "out", "--scale", "raw")
    shown(tmp_path / "out" / "0.png")
    assert Model.load(tmp_path / "out" / "model").k == 4


def test_evaluate_and_check_copies(run, pictograms, tmp_path, capsys) -> None:
    torch.manual_seed(0)
    save_encoder(TimmEncoder("test_resnet", image_size=32), tmp_path / "judge")
    few = ("--n", 20, "--steps", 1, "--features", tmp_path / "judge")
    run("evaluate_and_check_copies.py", *few, "--out", tmp_path / "out")
    assert "precision" in capsys.readouterr().out.lower()
    assert "<html" in (tmp_path / "out" / "report" / "report.html").read_text()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_references_for_diffusers(run, pictograms, tmp_path, monkeypatch) -> None:
    pytest.importorskip("transformers")
    diffusers = pytest.importorskip("diffusers")
    import tiny_pipelines as tiny
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    from retrodiff.bridges import read_credit

    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (64, 64))
    kind = diffusers.DiffusionPipeline
    monkeypatch.setattr(kind, "from_pretrained", lambda name, **_: tiny.qwen())
    monkeypatch.setattr(kind, "enable_model_cpu_offload", lambda self: None)
    photos = pictures(tmp_path / "photos", 6, seed=0, side=80)
    asked = ("references_for_diffusers.py", photos, "fog", "--license", "CC0", "--steps", 1)
    run(*asked, "--encoder", "pictograms", "--out", tmp_path / "out")
    (made,) = (tmp_path / "out" / "pictures").glob("*.png")
    credits = read_credit(made)["references"]
    assert [one["record"]["license"] for one in credits] == ["CC0", "CC0"]


def test_the_notebooks_run(tmp_path) -> None:
    pytest.importorskip("skimage")
    command = [sys.executable, str(EXAMPLES / "notebooks" / "run.py"), "--small", "--out"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    subprocess.run([*command, str(tmp_path)], env=environment, check=True, capture_output=True)
    for notebook in (EXAMPLES / "notebooks").glob("*.md"):
        kept = re.findall(r"!\[.*\]\((.*)\)", notebook.read_text())
        assert len(kept) >= 2
        assert all((notebook.parent / picture).is_file() for picture in kept)
        assert re.findall(r"!\[.*\]\((.*)\)", (tmp_path / notebook.name).read_text()) == kept


def test_the_plug_in_package_passes_its_own_tests_and_builds(tmp_path) -> None:
    plugin = EXAMPLES / "plugin"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    root = f"{EXAMPLES.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=plugin, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    pytest.importorskip("hatchling")
    built = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(built, cwd=plugin, check=True, capture_output=True)
    assert len(list(tmp_path.glob("retrodiff_balanced-*.whl"))) == 1
