"""The command line on real files: what it does, and how it refuses."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from retrodiff.cli import main
from retrodiff.model import Model

ENCODER = ["--encoder", "timm:test_resnet", "--no-pretrained"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for label in ("cats", "dogs"):
        (folder / label).mkdir()
        for i in range(6):
            pixels = torch.randint(0, 256, (40, 48, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / label / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def built(pictures, tmp_path_factory):
    """A database and a model, made by the command line."""
    folder = tmp_path_factory.mktemp("built")
    database, model = str(folder / "d.rdb"), str(folder / "model")
    assert main(["database", "build", str(pictures), database, *ENCODER]) == 0
    command = ["train", str(pictures), model, "--database", database, *ENCODER]
    assert (
        main([*command, "--steps", "3", "--size", "16", "--channels", "32", "--batch-size", "4"])
        == 0
    )
    return folder


def test_train_info_and_sample(built, pictures, tmp_path, capsys):
    assert main(["info", str(built / "model")]) == 0
    shown = capsys.readouterr().out
    assert "FlowDenoiser(network=UNet(" in shown
    assert "d.rdb" in shown
    out = tmp_path / "out"
    command = ["sample", str(built / "model"), str(out), "--steps", "2"]
    assert main([*command, "--unconditional", "--n", "3"]) == 0
    described = json.loads((out / "generation.json").read_text())
    assert len(described["images"]) == 3
    assert described["images"][0]["neighbors"][0]["record"]["label"] in ("cats", "dogs")
    image = str(pictures / "cats" / "0.png")
    assert main([*command, "--image", image, "--n", "2", "--overwrite"]) == 0
    assert sorted(p.name for p in out.glob("*.png")) == ["00000.png", "00001.png", "sheet.png"]
    capsys.readouterr()
    assert main([*command, "--image", image, "--attribution", "--overwrite"]) == 0
    assert "attribution.png" in capsys.readouterr().out
    names = ["00000.png", "attribution.png", "sheet.png"]
    assert sorted(p.name for p in out.glob("*.png")) == names
    described = json.loads((out / "generation.json").read_text())
    near = described["images"][0]["neighbors"]
    assert sum(one["share"] for one in near) == pytest.approx(1, abs=1e-5)


def test_a_model_moves_with_its_database(built, tmp_path):
    shutil.copytree(built, tmp_path / "elsewhere")
    first = Model.load(built / "model").sample(n=1, seed=1, steps=2, progress=False)
    moved = Model.load(tmp_path / "elsewhere" / "model").sample(
        n=1, seed=1, steps=2, progress=False
    )
    assert torch.equal(first.images, moved.images)


def test_an_interrupted_training_resumes(built, pictures, tmp_path, monkeypatch):
    from retrodiff.training import TrainingSet

    database = str(built / "d.rdb")
    command = ["train", str(pictures), str(tmp_path / "m"), "--database", database, *ENCODER]
    command += ["--steps", "4", "--size", "16", "--channels", "32", "--batch-size", "4"]
    whole = [*command]
    whole[2] = str(tmp_path / "whole")
    assert main(whole) == 0
    real = TrainingSet.rows_at

    def killed(self, step, batch_size, seed):
        if step == 2:
            raise KeyboardInterrupt
        return real(self, step, batch_size, seed)

    monkeypatch.setattr(TrainingSet, "rows_at", killed)
    assert main(command) == 130
    assert not (tmp_path / "m").exists()
    monkeypatch.setattr(TrainingSet, "rows_at", real)
    assert main(command) == 2  # neither resume nor overwrite was said
    assert main([*command, "--resume"]) == 0
    a, b = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("m", "whole"))
    assert a == b
    # The record of a training stays when the training has ended.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.run", "whole", "whole.run"]


def failed(capsys, command, *words):
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("retrodiff: ")
    for word in words:
        assert word in error
    return error


def test_bad_input_is_one_line_and_exit_code_2(built, pictures, tmp_path, capsys):
    model, database = str(built / "model"), str(built / "d.rdb")
    out = str(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    failed(capsys, ["database", "build", str(tmp_path / "empty"), out, *ENCODER], "empty")
    failed(capsys, ["sample", str(tmp_path / "empty"), out, "--prompt", "a"], "no model.json")
    failed(capsys, ["sample", model, out, "--prompt", "a"], "TimmEncoder", "no text tower")
    failed(capsys, ["sample", model, out, "--unconditional", "--k", "99"], "--k 99", "12 rows")
    failed(
        capsys, ["sample", model, out, "--unconditional", "--sampler", "x"], "unknown sampler 'x'"
    )
    failed(capsys, ["sample", model, out, "--unconditional", "--mode", "text"], "mode 'text'")
    failed(capsys, ["sample", model, model, "--unconditional"], "exists")
    failed(capsys, ["sample", model, out, "--image", str(tmp_path / "no.png")], "no.png")
    failed(
        capsys,
        [
            "train",
            str(pictures),
            out,
            "--database",
            database,
            "--encoder",
            "timm:test_vit",
            "--no-pretrained",
        ],
        "does not match database.dim",
    )
    failed(capsys, ["train", str(pictures), model, "--database", database, *ENCODER], "exists")
    failed(capsys, ["train", str(pictures), out, "--database", out, *ENCODER], out)
    failed(capsys, ["info", out], out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]


def test_unreadable_files_are_skipped_and_named(pictures, built, tmp_path, capsys):
    folder = tmp_path / "mixed"
    shutil.copytree(pictures, folder)
    (folder / "notes.txt").write_text("no image")
    whole = (folder / "cats" / "1.png").read_bytes()
    (folder / "cats" / "1.png").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert main(["database", "build", str(folder), str(tmp_path / "d.rdb"), *ENCODER]) == 0
    told = capsys.readouterr()
    for name in ("notes.txt", "cats/1.png"):
        assert name in told.err + told.out
    command = [
        "train",
        str(folder),
        str(tmp_path / "m"),
        "--database",
        str(built / "d.rdb"),
        *ENCODER,
    ]
    command += ["--steps", "1", "--size", "16", "--channels", "32", "--batch-size", "4"]
    assert main(command) == 0
    assert "cats/1.png" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_said(built, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    out = str(tmp_path / "file" / "out")
    failed(capsys, ["sample", str(built / "model"), out, "--unconditional", "--steps", "1"])


def test_python_dash_m():
    command = [sys.executable, "-m", "retrodiff", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("retrodiff 0.")


def test_a_picture_is_asked_as_a_build_embeds_it(built, tmp_path):
    """Whole, not as a square: a wide picture of a database is its own nearest neighbor."""
    wide = tmp_path / "wide"
    wide.mkdir()
    generator = torch.Generator().manual_seed(1)
    for i in range(6):
        pixels = torch.randint(0, 256, (30, 90, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(wide / f"{i}.png")
    assert main(["database", "build", str(wide), str(tmp_path / "w.rdb"), *ENCODER]) == 0
    command = ["sample", str(built / "model"), str(tmp_path / "out"), "--steps", "1"]
    command += ["--database", str(tmp_path / "w.rdb"), "--image", str(wide / "3.png")]
    assert main(command) == 0
    described = json.loads((tmp_path / "out" / "generation.json").read_text())
    first = described["images"][0]["neighbors"][0]
    assert first["record"]["file"] == "3.png"
    assert first["similarity"] > 0.9999
