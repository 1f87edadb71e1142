"""``retrodiff train``: what it shows, what decides the network, and what it refuses."""

import csv
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch

import retrodiff.training
from retrodiff.checkpoints.first_stages import save_autoencoder
from retrodiff.cli import main
from retrodiff.cli.train_network import arguments_of
from retrodiff.databases import open_database
from retrodiff.encoders import TimmEncoder, save_encoder
from retrodiff.model import Model
from retrodiff.model.generated import to_picture
from retrodiff.networks import KLAutoencoder
from retrodiff.presets import rdm_imagenet, rdm_small
from retrodiff.training import pace
from retrodiff.training.checkpoint import Checkpoint
from retrodiff.training.pace import Pace


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Folders of pictures, an encoder, a database, a trained model."""
    room = tmp_path_factory.mktemp("room")
    draw = torch.Generator().manual_seed(0)
    for folder, n in {"training": 12, "library": 8, "few": 3, "one": 1}.items():
        (room / folder).mkdir()
        for i in range(n):
            pixels = torch.rand(3, 24 + i, 30, generator=draw) * 2 - 1
            to_picture(pixels).save(room / folder / f"{i}.png")
    torch.manual_seed(0)
    save_encoder(TimmEncoder("test_resnet", pretrained=False, image_size=32), room / "encoder")
    assert call(room, "database build library d.rdb --encoder encoder") == 0
    assert train(room, "trained", f"--steps 4 {EVERY}") == 0
    return room


def call(room, words):
    before = os.getcwd()
    os.chdir(room)
    try:
        return main(words.split())
    finally:
        os.chdir(before)


SMALL = "--channels 32 --size 8 --batch-size 4"
D = "--database d.rdb --encoder encoder"
QUICK = "--checkpoint-every 2 --sample-every 0"
EVERY = "--sample-every 2 --validate-every 2"


def train(room, out, more="--steps 3", images="training", network=SMALL, parts=D):
    return call(room, f"train {images} {out} {parts} {network} {QUICK} {more}")


def refused(capsys, code):
    """The one line on standard error that begins with the program's name."""
    assert code == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("retrodiff: ")][-1]


def table(room, out):
    with (room / f"{out}.run" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_shows_itself(room, capsys):
    assert train(room, "a", f"--steps 4 {EVERY}") == 0
    told = capsys.readouterr()
    folder = room / "a.run"
    rows = table(room, "a")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["step"] for row in rows if row["held_out"]] == ["2", "4"]
    assert {p.name for p in folder.iterdir()} >= {
        "run.json", "metrics.csv", "curves.png", "samples-000002.png", "samples-000004.png"
    }  # fmt: skip
    kept = json.loads((folder / "run.json").read_text())
    assert kept["finished"] is True
    assert kept["training"]["steps"] == 4
    assert "least held-out loss" in told.out
    assert "a.run/samples-000004.png" in told.out
    assert "trained on 11 images for 4 steps" in told.out
    assert "this budget will see about 16 images" in told.err
    assert "step 2 of 4: loss" in told.err


def test_an_interrupted_run_goes_on(room, monkeypatch):
    real = Checkpoint.save

    def save(self, state):
        real(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save)
        assert train(room, "b", f"--steps 4 {EVERY}") == 130
    assert json.loads((room / "b.run" / "run.json").read_text())["finished"] is False
    assert train(room, "b", f"--steps 4 {EVERY} --resume") == 0
    assert [row["step"] for row in table(room, "b")] == ["1", "2", "3", "4"]
    for name in ("samples-000002.png", "samples-000004.png"):
        pictures = [(room / f"{out}.run" / name).read_bytes() for out in ("b", "trained")]
        assert pictures[0] == pictures[1]
    column = [[row["held_out"] for row in table(room, out)] for out in ("b", "trained")]
    assert column[0] == column[1]


def test_what_is_watched_does_not_change_the_model(room):
    for out, more in {"c": EVERY, "c2": "--sample-every 0 --validate-every 0"}.items():
        assert train(room, out, f"--steps 3 {more}") == 0
    weights = [(room / out / "weights.safetensors").read_bytes() for out in ("c", "c2")]
    assert weights[0] == weights[1]
    assert not list((room / "c2.run").glob("samples-*.png"))
    assert not any(row["held_out"] for row in table(room, "c2"))


def test_without_a_database_the_images_are_the_database(room, capsys):
    assert train(room, "own", parts="--encoder encoder") == 0
    told = capsys.readouterr()
    assert "no --database is given" in told.out
    assert "rows of the database themselves" not in told.err  # each without its own row
    assert len(open_database(room / "own.images.rdb")) == 12
    out = Model.load(room / "own").sample(n=2, steps=1)
    assert out.neighbors.k == 4
    assert train(room, "own", "--steps 3 --overwrite", parts="--encoder encoder") == 0


def test_without_an_encoder_it_says_what_to_do(room, capsys):
    line = refused(capsys, train(room, "e", parts=""))
    assert "no --encoder" in line
    assert "retrodiff train-encoder training e-encoder" in line
    assert not list(room.glob("e*.r*"))


def test_a_trained_model_is_trained_further(room, capsys):
    start = Model.load(room / "trained")
    words = "--init trained --batch-size 4"
    assert train(room, "f", "--steps 1 --lr 1e-12", network=words, parts="") == 0
    found = Model.load(room / "f")
    ours, theirs = (dict(m.denoiser.named_parameters()) for m in (found, start))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    assert train(room, "f2", "--steps 1 --lr 1e-2 --k 2", network=words, parts="") == 0
    assert Model.load(room / "f2").k == 2
    changed = dict(Model.load(room / "f2").denoiser.named_parameters())
    assert any(not torch.equal(changed[name], theirs[name]) for name in theirs)
    for more in ("--channels 64", "--preset rdm_small", "--config c.yaml", "--size 16"):
        line = refused(capsys, train(room, "f3", f"--steps 1 {more}", network=words, parts=""))
        assert more in line
        assert "--init trained" in line
    line = refused(capsys, train(room, "f3", network="--init nowhere", parts=""))
    assert "nowhere" in line
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "load", lambda *a, **k: start.replace(encoder=None))
        line = refused(capsys, train(room, "f3", network=words, parts=""))
        assert "no --encoder" in line


def test_the_network_comes_from_a_file(room, capsys):
    (room / "c.yaml").write_text("preset: rdm_small\nchannels: 32\nsize: 8\n")
    (room / "c.json").write_text('{"channels": 32, "size": 8, "k": 2}')
    network = "--config {} --batch-size 4"
    assert train(room, "g", network=network.format("c.yaml")) == 0
    assert train(room, "g2", network=network.format("c.json --preset rdm_small")) == 0
    one, other = Model.load(room / "g"), Model.load(room / "g2")
    assert one.denoiser.shape == other.denoiser.shape == (16, 2, 2)
    assert (one.k, other.k) == (4, 2)


WRONG = {
    "channels: 64": ("--channels 32", "--channels 32", "channels: 64 of w.yaml disagree"),
    "preset: rdm_768": ("--preset rdm_small", "--preset rdm_small", "preset: rdm_768 of w.yaml"),
    "depth: 3": ("", "w.yaml gives depth, which rdm_small does not have", "channels"),
    "size: big": ("", "w.yaml: size is 'big', expected a whole number"),
    "encoder: encoder": ("", "w.yaml gives encoder, which is an option", "--encoder"),
    "- 1": ("", "w.yaml holds no arguments by name"),
    "a: [": ("", "w.yaml cannot be read as .yaml"),
    "preset: nope": ("", "no preset 'nope': there are", "rdm_small"),
    "k: 4": ("--preset ldm_imagenet", "w.yaml gives k, which ldm_imagenet does not have"),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_file_that_does_not_fit_is_one_line(room, capsys, text):
    options, *words = WRONG[text]
    (room / "w.yaml").write_text(text)
    line = refused(capsys, train(room, "h", network=f"--config w.yaml {options}"))
    for word in words:
        assert word in line
    assert not list(room.glob("h*"))


def test_numbers_that_a_preset_does_not_have(room, capsys):
    line = refused(capsys, train(room, "h", network="--preset rdm_imagenet --channels 32"))
    assert "--channels 32 has no effect on --preset rdm_imagenet" in line
    line = refused(capsys, train(room, "h", network="--preset nope"))
    assert "no preset 'nope'" in line
    line = refused(capsys, train(room, "h", network="--config nowhere.yaml"))
    assert "nowhere.yaml" in line
    assert set(arguments_of(rdm_small)) == {"size", "channels", "k"}
    assert {"checkpoint", "k"} <= set(arguments_of(rdm_imagenet))
    assert not {"encoder", "database", "conditioner"} & set(arguments_of(rdm_imagenet))


def test_held_out_images(room, capsys):
    assert train(room, "i", "--steps 2 --validation 0.5") == 0
    assert "trained on 6 images" in capsys.readouterr().out
    assert train(room, "i2", "--steps 2 --validation library") == 0
    assert "trained on 12 images" in capsys.readouterr().out
    assert train(room, "i3", "--steps 2 --validation 0") == 0
    assert "held-out" not in capsys.readouterr().out
    for more, images, *words in (
        ("--validation 0.99", "training", "--validation 0.99 of 12 images leaves none"),
        ("--validation 1", "training", "1 is no share"),
        ("--validation nowhere", "training", "nowhere"),
        ("--validation 0.9", "training", "1 training images are fewer than --k 4"),
        ("", "few", "2 training images are fewer than --k 4"),
        ("", "one", "one holds one image"),
        ("--k 9", "training", "--k 9 neighbors of each image", "8 rows"),
    ):
        line = refused(capsys, train(room, "i4", f"--steps 2 {more}", images=images))
        for word in words:
            assert word in line, line
    line = refused(
        capsys, train(room, "i5", "--k 3 --steps 1", images="few", parts="--encoder encoder")
    )
    assert "2 rows besides the image's own" in line


def test_a_time_in_place_of_steps(room, capsys, monkeypatch):
    asked = []

    def measured(model, data, *, looks, **options):
        asked.append((len(looks), options))
        return Pace(step=12.0, look=3.0)

    monkeypatch.setattr(pace, "measure_pace", measured)
    assert train(room, "j", "--minutes 1.5") == 0
    told = capsys.readouterr().out
    assert "1.5 minutes are about 6 steps of 4 images here; --steps 6 repeats" in told
    assert asked[0][0] == 1  # the held-out loss; no grids are drawn here
    assert asked[0][1]["batch_size"] == 4
    assert [row["step"] for row in table(room, "j") if row["held_out"]] == ["2", "4", "6"]
    for more in ("--minutes 1.5", "--steps 6"):
        assert train(room, "j", f"{more} --resume") == 0
        assert "nothing is left to do" in capsys.readouterr().out
    assert len(asked) == 1
    assert "not allowed with" in refused(capsys, train(room, "j2", "--minutes 1 --steps 3"))
    real = Checkpoint.save

    def save(self, state):
        real(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save)
        assert train(room, "j3", "--minutes 1.5") == 130
    monkeypatch.setattr(pace, "measure_pace", lambda *a, **k: Pace(step=1.0))
    assert train(room, "j3", "--minutes 1.5 --resume") == 0  # as long as it was begun
    assert [row["step"] for row in table(room, "j3") if row["held_out"]] == ["2", "4", "6"]


def test_steps_that_fit_into_a_time():
    assert Pace(0.5).steps(1) == (120, 10)
    assert Pace(0.5, look=6).steps(10) == (1080, 10)
    assert Pace(0.5, look=20).steps(10) == (1080, 3)
    assert Pace(0.5, look=30).steps(1, most=10) == (1, 2)  # no time at all: one step
    with pytest.raises(ValueError, match="minutes"):
        Pace(0.5).steps(0)


def test_the_pace_is_measured_on_a_copy(room):
    from retrodiff.retrieval import NearestNeighbors
    from retrodiff.training import FolderImages, TrainingSet

    model = Model.load(room / "trained")
    before = {n: p.clone() for n, p in model.denoiser.named_parameters()}
    images = FolderImages(room / "training", 8, progress=False)
    data = TrainingSet.of(
        images, model.encoder, model.database, NearestNeighbors(), 4, progress=False
    )
    looked = []
    found = pace.measure_pace(model, data, looks=[looked.append], batch_size=4, lr=1e-3)
    assert found.step > 0
    assert looked == [model]
    assert all(torch.equal(p, before[n]) for n, p in model.denoiser.named_parameters())


def test_options_of_the_loop_are_passed_on_when_given(room, monkeypatch):
    calls = []

    def fake(model, data, **options):
        calls.append(options)
        return SimpleNamespace(model=model)

    monkeypatch.setattr(retrodiff.training, "fit", fake)
    names = ("precision", "optimizer", "accumulate", "compile", "workers")
    assert train(room, "k", "--steps 1") == 0
    assert [calls[0].get(name) for name in names] == ["auto", "muon", None, None, None]
    assert calls[0]["ema"] == 0.999
    more = "--precision bfloat16 --optimizer adamw --accumulate 2 --compile --workers 3"
    assert train(room, "k2", f"--steps 1 {more} --ema 0.9 0.99") == 0
    assert [calls[1][name] for name in names] == ["bfloat16", "adamw", 2, True, 3]
    assert calls[1]["ema"] == (0.9, 0.99)


def test_records_of_other_trainings_stay(room, capsys):
    (room / "l.run").mkdir()
    (room / "l.run" / "notes.txt").write_text("mine")
    assert "has no run.json" in refused(capsys, train(room, "l"))
    assert re.findall(r"\w+", (room / "l.run" / "notes.txt").read_text()) == ["mine"]
    assert not (room / "l").exists()
    assert train(room, "l2") == 0
    os.rename(room / "l2", room / "l2-moved")
    assert "the record of another training" in refused(capsys, train(room, "l2"))
    assert train(room, "l2", "--steps 3 --overwrite") == 0


def test_a_trained_first_stage_is_taken(room, capsys):
    torch.manual_seed(1)
    stage = KLAutoencoder(
        channels=32, multipliers=[1, 1], blocks_per_level=1, latent_channels=4, groups=8
    )
    save_autoencoder(stage.eval(), room / "stage")
    small = "--channels 32 --size 8 --batch-size 4 --first-stage stage"
    assert train(room, "staged", network=small) == 0
    autoencoder = Model.load(room / "staged").autoencoder
    assert isinstance(autoencoder, KLAutoencoder)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    assert torch.equal(autoencoder.encode(images), stage.encode(images))
    capsys.readouterr()
    more = "--init trained --first-stage stage"
    assert train(room, "x", more, network="") == 2
    assert "--first-stage stage and --init trained disagree" in capsys.readouterr().err
    assert train(room, "x", network="--preset rdm_imagenet --first-stage stage") == 2
    assert "--first-stage stage has no effect on --preset rdm_imagenet" in capsys.readouterr().err
    assert not (room / "x").exists()
