"""``retrodiff train-autoencoder``: trained, continued, measured, and refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from retrodiff.checkpoints import load_autoencoder
from retrodiff.checkpoints.first_stages import read_extra
from retrodiff.cli import main
from retrodiff.encoders import TimmEncoder, save_encoder
from retrodiff.model.generated import to_picture
from retrodiff.training import FolderImages, open_latents
from retrodiff.training.checkpoint import Checkpoint

QUICK = "--size 16 --factor 2 --channels 32 --steps 4 --batch-size 4 --checkpoint-every 2"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    draw = torch.Generator().manual_seed(0)
    for folder, count in (("photos", 12), ("other", 3), ("one", 1)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            picture = torch.rand(3, 20 + i, 24, generator=draw) * 2 - 1
            to_picture(picture).save(tmp_path / folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*more: str) -> int:
    return main(["train-autoencoder", "photos", "stage", *QUICK.split(), *more])


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_first_stage_is_made_measured_and_shown(
    kind: str, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--kind", kind, "--codes", "16", "--adversarial-start", "2", "--latents", "l"]
    assert train(*more, "--held-out", "other") == 0
    said = capsys.readouterr().out
    assert "held out: 3 images: PSNR" in said
    assert ("of 16 codes used, perplexity" in said) == (kind == "vq")
    assert "trained on 12 images for 4 steps: " in said
    found: Any = load_autoencoder("stage")
    assert type(found).__name__ == f"{kind.upper()}Autoencoder"
    assert read_extra("stage")["held_out"]["images"] == 3
    with Image.open("stage/reconstructions.png") as sheet:
        assert sheet.size == (6 * 16 * 3, 6 * 16 * 2)
    assert not Path("stage.training.safetensors").exists()
    latents = open_latents("l", FolderImages("photos", 16, progress=False))
    assert (len(latents), latents.shape) == (12, (4, 8, 8))


def test_a_decoder_is_trained_alone(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    quick = "--size 16 --steps 4 --batch-size 4".split()
    alone = ["train-autoencoder", "photos", "sharper", *quick, "--decoder-of"]
    assert main([*alone, "stage"]) == 0
    before, after = load_autoencoder("stage"), load_autoencoder("sharper")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = before.encode(images)
    assert torch.equal(after.encode(images), latents)
    assert not torch.equal(after.decode(latents), before.decode(latents))
    capsys.readouterr()
    assert main([*alone, "stage", "--resume"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert main([*alone, "stage", "--overwrite", "--channels", "64"]) == 2
    assert "--channels is of a new first stage" in capsys.readouterr().err
    assert main([*alone, "nowhere", "--overwrite"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_interrupted_it_continues_to_the_same_bits(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    whole = {p.name: p.read_bytes() for p in Path("stage").iterdir()}
    Path("stage").rename("whole")
    real = Checkpoint.save

    def save(self: Checkpoint, state: Any) -> None:
        real(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save)
        assert train() == 130
    assert not Path("stage").exists()
    assert train() == 2
    assert "unfinished training" in capsys.readouterr().err
    assert train("--resume", "--kl-weight", "1") == 2
    assert "1e-06" in capsys.readouterr().err
    assert train("--resume") == 0
    assert {p.name: p.read_bytes() for p in Path("stage").iterdir()} == whole
    assert train("--resume") == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_an_encoder_can_be_what_compares(room: Path) -> None:
    save_encoder(TimmEncoder("test_resnet", image_size=32), "enc")
    assert train("--perceptual", "enc") == 0
    assert read_extra("stage")["training"]["perceptual"] == "enc"
    assert json.loads(Path("stage/first_stage.json").read_text())["format"] == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"photos stage {QUICK} --size 15", "--size 15 is no multiple of --factor 2"),
        (f"photos stage {QUICK} --size 4", "--size: 4"),
        (f"photos stage {QUICK} --factor 3", "--factor"),
        (f"photos stage {QUICK} --channels 20", "20 is not a multiple of 32"),
        (f"photos stage {QUICK} --batch-size 64", "--batch-size 64, but there are 11 images"),
        (f"one stage {QUICK}", "holds one image"),
        (f"nowhere stage {QUICK}", "nowhere"),
        (f"photos stage {QUICK} --held-out nowhere", "nowhere"),
        (f"photos stage {QUICK} --perceptual nowhere", "nowhere"),
        (f"photos stage {QUICK} --kl-weight nan", "--kl-weight: nan"),
        (f"photos photos {QUICK}", "photos"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    command: str, said: str, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(room.rglob("*"))
    assert main(["train-autoencoder", *command.split()]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("retrodiff: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert sorted(room.rglob("*")) == before
