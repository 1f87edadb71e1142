"""``retrodiff train``: interrupted, killed at its very end, sampled before it has finished."""

import json

import pytest
import torch

from retrodiff.cli import main
from retrodiff.encoders import TimmEncoder, save_encoder
from retrodiff.model.generated import to_picture
from retrodiff.training import unfinished
from retrodiff.training.checkpoint import Checkpoint, read_state


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Two folders of pictures, an encoder, a database."""
    room = tmp_path_factory.mktemp("room")
    draw = torch.Generator().manual_seed(0)
    for folder in ("training", "library"):
        (room / folder).mkdir()
        for i in range(8):
            pixels = torch.rand(3, 24 + i, 30, generator=draw) * 2 - 1
            to_picture(pixels).save(room / folder / f"{i}.png")
    torch.manual_seed(0)
    save_encoder(TimmEncoder("test_resnet", pretrained=False, image_size=32), room / "encoder")
    build = ["database", "build", "library", "d.rdb", "--encoder", "encoder"]
    assert _run(room, *build) == 0
    return room


def _run(room, *words):
    import os

    before = os.getcwd()
    os.chdir(room)
    try:
        return main(list(words))
    finally:
        os.chdir(before)


def train(room, out, *more, images="training", steps=4):
    options = ["--database", "d.rdb", "--encoder", "encoder", "--channels", "32", "--size", "8"]
    options += ["--batch-size", "4", "--checkpoint-every", "2", "--steps", str(steps)]
    return _run(room, "train", images, out, *options, *more)


def told(capsys):
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("retrodiff: ")]


@pytest.fixture
def stopped(room, monkeypatch):
    """A training that was interrupted after two of four steps."""

    def stop(out):
        with monkeypatch.context() as patch:
            real = Checkpoint.save

            def save(self, state):
                real(self, state)
                raise KeyboardInterrupt

            patch.setattr(Checkpoint, "save", save)
            assert train(room, out) == 130
        assert read_state(room / f"{out}.training.safetensors").done == 2

    return stop


def names(room, out):
    """What stands at a model's place and beside it, the record of its training aside."""
    found = sorted(p.name for p in room.iterdir() if p.name.split(".")[0] == out)
    return [name for name in found if name != f"{out}.run"]


def test_what_it_has_learned_so_far_can_be_sampled(room, stopped, capsys):
    stopped("a")
    assert names(room, "a") == ["a.training", "a.training.safetensors"]
    capsys.readouterr()
    assert _run(room, "sample", "a", "a-one", "--unconditional") == 2
    (line,) = told(capsys)
    assert "--from-checkpoint" in line
    assert "--resume" in line
    words = ["--unconditional", "--n", "2", "--steps", "2", "--from-checkpoint"]
    assert _run(room, "sample", "a", "a-two", *words) == 0
    kept = json.loads((room / "a-two" / "generation.json").read_text())
    assert len(kept["images"] if "images" in kept else list(room.glob("a-two/*.png"))) >= 2
    so_far = unfinished.load_unfinished(room / "a")
    average = read_state(room / "a.training.safetensors").part("ema")
    name, weight = next(iter(so_far.denoiser.named_parameters()))
    assert torch.equal(weight, average[f"average.denoiser.{name}"])
    assert train(room, "a", "--resume") == 0
    assert names(room, "a") == ["a", "a-one"] or names(room, "a") == ["a"]
    assert _run(room, "sample", "a", "a-three", *words) == 2  # there is none any more


def test_a_resume_with_other_options_is_one_line(room, stopped, capsys):
    stopped("b")
    capsys.readouterr()
    for more, word in (
        (["--batch-size", "8"], "--batch-size 4, but this one has --batch-size 8"),
        (["--lr", "0.5"], "--lr 0.001 (cosine), but this one has --lr 0.5 (cosine)"),
        (["--channels", "64"], "channels 32, but this one has 64"),
        (["--seed", "3"], "--seed 0, but this one has --seed 3"),
        (["--ema", "0.5"], "--ema 0.999, but this one has --ema 0.5"),
        (["--k", "2"], "--k 4, but this one has --k 2"),
        (["--steps", "1"], "2 steps done already, but this one has --steps 1"),
    ):
        assert train(room, "b", "--resume", *more) == 2
        (line,) = told(capsys)
        assert word in line
    assert train(room, "b", "--resume", images="library") == 2
    assert "other training images" in told(capsys)[-1]
    assert read_state(room / "b.training.safetensors").done == 2
    assert train(room, "b", "--resume", steps=6) == 0  # longer is fine


def test_a_damaged_checkpoint_is_one_line(room, stopped, capsys):
    stopped("c")
    file = room / "c.training.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    capsys.readouterr()
    for command in (
        lambda: train(room, "c", "--resume"),
        lambda: _run(room, "sample", "c", "c-out", "--unconditional", "--from-checkpoint"),
    ):
        assert command() == 2
        (line,) = told(capsys)
        assert "c.training.safetensors is damaged" in line


@pytest.mark.parametrize(
    "kills", [["before"], ["after"], ["before", "before"], ["before", "after"]]
)
def test_killed_at_the_very_end(room, kills, monkeypatch, capsys):
    """After the model was saved, before or after the checkpoint is gone; once or twice."""
    out = "d" + "".join(kill[0] for kill in kills)
    real = unfinished.end
    for i, kill in enumerate(kills):

        def killed(path, kill=kill):
            if kill == "after":
                real(path)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(unfinished, "end", killed)
            assert train(room, out, *(["--resume"] if i else [])) == 130
    model = {p.name: p.read_bytes() for p in (room / out).iterdir() if p.is_file()}
    assert train(room, out, "--resume") == 0
    assert names(room, out) == [out]
    assert {p.name: p.read_bytes() for p in (room / out).iterdir() if p.is_file()} == model
    capsys.readouterr()
    assert train(room, out, "--resume", "--lr", "0.5") == 2  # that would be another model
    assert f"{out} exists" in told(capsys)[-1]


def test_nothing_of_the_users_own_is_lost(room, capsys):
    (room / "e.training").mkdir()
    (room / "e.training" / "notes.txt").write_text("mine")
    assert train(room, "e") == 2
    assert train(room, "e", "--overwrite") == 2
    (room / "f.training.safetensors").write_text("mine, too")
    assert train(room, "f", "--overwrite") == 2
    assert (room / "e.training" / "notes.txt").read_text() == "mine"
    assert (room / "f.training.safetensors").read_text() == "mine, too"
    assert not (room / "e").exists()


def test_a_file_that_was_put_beside_the_unfinished_model_stays(room, stopped):
    stopped("g")
    (room / "g.training" / "notes.txt").write_text("mine")
    assert train(room, "g", "--resume") == 0
    assert names(room, "g") == ["g", "g.training"]
    assert [p.name for p in (room / "g.training").iterdir()] == ["notes.txt"]


def test_own_rows_are_excluded_on_request(room, capsys):
    assert train(room, "h", images="library", steps=1) == 0
    assert any("--exclude-self" in line for line in told(capsys))
    assert train(room, "i", "--exclude-self", images="library", steps=1) == 0
    assert told(capsys) == []
