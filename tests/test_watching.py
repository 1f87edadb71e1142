"""Watchers of a training: what they measure and write, and that they change nothing."""

import csv
import io
import json
import math
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from trainings import InterruptedAt, run, same, small_data, weights

from retrodiff.diffusion import EDMDenoiser, EpsDenoiser, FlowDenoiser
from retrodiff.training import constant, fit
from retrodiff.training.grids import Grids
from retrodiff.training.held_out import HeldOut, noise_levels
from retrodiff.training.log import Log, duration
from retrodiff.training.outlook import Budget, Outlook, measured_budgets, outlook
from retrodiff.training.run_folder import check_run, read_run
from retrodiff.training.splitting import split


@pytest.fixture
def data(database):
    return small_data(database)


@pytest.fixture
def unseen(database):
    return small_data(database, n=6, seed=5)


def watchers(folder, unseen, data, **options):
    held = HeldOut(unseen, 4, trained=data, levels=3)
    grids = Grids(folder, unseen, 6, trained=data, lines=2, samples=2, steps=2)
    log = Log(folder, held_out=held, grids=grids, every=3, tensorboard=False, **options)
    return [held, grids, log]


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_watched_or_not_the_weights_are_the_same(recipe, data, unseen, tmp_path):
    plain = run(recipe, data)
    watched = run(recipe, data, watch=watchers(tmp_path / "run", unseen, data))
    assert same(weights(plain.model), weights(watched.model))
    assert torch.equal(plain.losses, watched.losses)


def test_also_where_the_network_uses_the_global_randomness(recipe, data, unseen, tmp_path):
    """Such as dropout does; watchers take nothing from it."""

    model = recipe.build()
    model.denoiser.network.register_forward_hook(
        lambda module, _, out: out * (1 + 0.1 * torch.randn_like(out))
    )
    options = {"steps": 12, "batch_size": 8, "lr": 1e-2, "ema": 0.9, "progress": False}

    def noisy(watch):
        torch.manual_seed(1)
        return fit(model, data, watch=watch, **options)

    plain, watched = noisy([]), noisy(watchers(tmp_path / "run", unseen, data))
    assert torch.equal(plain.losses, watched.losses)
    assert same(weights(plain.model), weights(watched.model))


def test_a_watcher_that_draws_globally_disturbs_nothing(recipe, data, unseen):
    """A network may use torch's global randomness: what a measurement draws there is undone."""
    model = recipe.build()
    held = HeldOut(unseen, 1)
    real = type(model).loss

    def noisy(self, *arguments, **options):
        torch.rand(5)
        return real(self, *arguments, **options)

    before = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "loss", noisy)
        held.measure(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_held_out_loss_against_its_formula(recipe, unseen):
    """The mean over images and levels of the squared error, here in float64 by hand."""
    model = recipe.build()
    held = HeldOut(unseen, 1, levels=3, batch_size=4)
    found = held.measure(model, 7)
    noise = held._noise(model, range(len(unseen)))
    images, query, neighbors = unseen.batch(torch.arange(len(unseen)), model.k)
    expected = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for i, sigma in enumerate(held.sigmas):
            level = torch.full((len(images),), sigma, dtype=torch.float64)
            x = images.double() + sigma * noise[:, i].double()
            tokens = model.conditioner.condition(query, neighbors)
            denoised = model.denoiser.denoise(x, level, tokens)
            out = model.denoiser.scalings(level).out.view(-1, 1, 1, 1)
            # The loss is taken at the network's output: denoised = skip x + out F.
            expected[i] = ((denoised - images) / out).square().mean()
    assert found.by_level == pytest.approx(expected.tolist(), rel=1e-4)
    assert found.loss == pytest.approx(float(expected.mean()), rel=1e-4)
    assert (found.done, found.trained) == (7, None)
    assert held.measure(model) == replace(found, done=0)  # fixed: the same again
    whole = HeldOut(unseen, 1, levels=3, batch_size=64).measure(model, 7)
    assert whole.by_level == pytest.approx(found.by_level, rel=1e-5)  # whatever the batch


@pytest.mark.parametrize("kind", [EDMDenoiser, FlowDenoiser, EpsDenoiser])
def test_noise_levels_are_quantiles_of_training(recipe, kind):
    network = recipe.build().denoiser.network
    model = recipe.denoiser(kind(network)).build()
    levels = torch.tensor(noise_levels(model, 4), dtype=torch.float64)
    drawn = model.denoiser.draw_sigmas(200_000, torch.Generator().manual_seed(9)).double()
    shares = (drawn[:, None] <= levels).double().mean(0)
    expected = torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64)
    assert (shares - expected).abs().max() < 0.01
    if kind is EDMDenoiser:  # log-normal: the quantiles are known
        normal = torch.distributions.Normal(-1.2, 1.2)
        assert levels.log() == pytest.approx(normal.icdf(expected).tolist(), abs=0.03)


def test_the_best_step_is_said(recipe, data, unseen):
    held = HeldOut(unseen, 4)
    assert held.best is None
    assert "no held-out loss" in held.summary()
    run(recipe, data, watch=[held])
    assert [h.done for h in held.history] == [4, 8, 12]
    assert held.best.loss == min(h.loss for h in held.history)
    first = held.history[0]
    held.history.append(replace(first, done=16, loss=0.0))
    assert "after step 16, the last one" in held.summary()
    held.history.append(replace(first, done=20, loss=9.0))
    assert held.summary().startswith("least held-out loss 0.0000, after step 16; 9.0000")


def test_a_table_curves_and_grids(recipe, data, unseen, tmp_path, capsys):
    folder = tmp_path / "run"
    watch = watchers(folder, unseen, data, about={"size": 8})
    result = run(recipe, data, watch=watch)
    rows = table(folder)
    assert [row["step"] for row in rows] == ["1", "3", "4", "6", "8", "9", "12"]
    assert [row["step"] for row in rows if row["held_out"]] == ["4", "8", "12"]
    for row in rows:
        step = int(row["step"])
        assert float(row["loss"]) == pytest.approx(float(result.losses[step - 1]), rel=1e-5)
        assert row["images"] == str(8 * step)
        assert float(row["images_per_second"]) > 0
    held = watch[0].history[-1]
    assert float(rows[-1]["held_out"]) == pytest.approx(held.loss, rel=1e-5)
    assert float(rows[-1]["held_out_3"]) == pytest.approx(held.by_level[2], rel=1e-5)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "curves.png", "metrics.csv", "run.json", "samples-000006.png", "samples-000012.png",
    ]  # fmt: skip
    kept = json.loads((folder / "run.json").read_text())
    assert kept["finished"] is True
    assert kept["size"] == 8
    assert kept["noise_levels"] == list(watch[0].sigmas)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 4 of 12: loss ")
    assert "(the least so far)" in lines[0]
    assert "images/s" in lines[0]
    assert "left" in lines[0]
    assert "left" not in lines[-1]


def test_grids_show_what_they_say(recipe, data, unseen, tmp_path):
    """Query, neighbors and samples, in pixels; the same weights give the same picture."""
    model = recipe.build()
    grids = Grids(tmp_path, unseen, 1, lines=1, samples=2, steps=2, side=8)
    sheet = grids.draw(model)
    again = grids.draw(model)
    assert np.array_equal(np.asarray(sheet), np.asarray(again))
    pixels = np.asarray(sheet.convert("L"))
    gray = round((float(unseen.images[0, 0, 0, 0]) + 1) * 127.5)
    top = np.argwhere((pixels[:, 6:14] == gray).all(1)).flatten()
    assert len(top) >= 8  # the query stands at the left
    other = Grids(tmp_path, unseen, 1, lines=1, samples=2, steps=2, side=8, seed=1)
    assert not np.array_equal(np.asarray(other.draw(model)), np.asarray(sheet))


def test_an_interrupted_training_continues_its_curves(recipe, data, unseen, tmp_path):
    whole = watchers(tmp_path / "whole", unseen, data)
    run(recipe, data, watch=whole, checkpoint=tmp_path / "w.safetensors")
    folder, file = tmp_path / "run", tmp_path / "c.safetensors"
    first = watchers(folder, unseen, data)
    with suppress(KeyboardInterrupt):
        run(recipe, data, watch=first, lr=InterruptedAt(7), checkpoint=file)
    assert read_run(folder)["finished"] is False
    with (folder / "metrics.csv").open("a") as out:  # what a kill after the checkpoint leaves
        out.write("8,64,1,1,1,1,1,9.9,,,,\n9,72,")
    again = watchers(folder, unseen, data)
    result = run(recipe, data, watch=again, lr=InterruptedAt(99), checkpoint=file, resume=True)
    assert len(result.losses) == 12
    mine, theirs = table(folder), table(tmp_path / "whole")
    fixed = ("step", "images", "lr", "loss", "loss_smoothed", "held_out", "trained", "held_out_2")
    assert [[row[c] for c in fixed] for row in mine] == [[row[c] for c in fixed] for row in theirs]
    seconds = [float(row["seconds"]) for row in mine]
    assert seconds == sorted(seconds)
    assert again[0].history == whole[0].history
    for name in ("samples-000006.png", "samples-000012.png"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_watchers_that_an_earlier_sitting_did_not_have(recipe, data, unseen, tmp_path):
    file = tmp_path / "c.safetensors"
    with suppress(KeyboardInterrupt):
        run(recipe, data, lr=InterruptedAt(7), checkpoint=file)
    watch = watchers(tmp_path / "run", unseen, data)
    run(recipe, data, watch=watch, lr=InterruptedAt(99), checkpoint=file, resume=True)
    assert [row["step"] for row in table(tmp_path / "run")] == ["8", "9", "12"]


def test_a_full_disk_does_not_end_a_training(recipe, data, unseen, tmp_path, monkeypatch):
    from retrodiff.training import grids, log

    def full(path):
        raise OSError(28, "No space left on device")

    for module in (grids, log):
        monkeypatch.setattr(module, "atomic_write", full)
    with pytest.warns(UserWarning, match="could not be written .No space left.*goes on"):
        result = run(recipe, data, watch=watchers(tmp_path / "run", unseen, data))
    assert same(weights(result.model), weights(run(recipe, data).model))


def test_tensorboard_has_the_curves(recipe, data, unseen, tmp_path):
    pytest.importorskip("tensorboard")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    held = HeldOut(unseen, 6)
    grids = Grids(tmp_path / "run", unseen, 12, lines=1, samples=1, steps=1)
    log = Log(tmp_path / "run", held_out=held, grids=grids, every=3)
    result = run(recipe, data, watch=[held, grids, log])
    events = EventAccumulator(str(tmp_path / "run" / "events"))
    events.Reload()
    losses = events.Scalars("loss/loss")
    assert [event.step for event in losses] == [1, 3, 6, 9, 12]
    assert losses[-1].value == pytest.approx(float(result.losses[-1]))
    assert [event.value for event in events.Scalars("loss/held_out")] == pytest.approx(
        [h.loss for h in held.history]
    )
    shown = Image.open(io.BytesIO(events.Images("samples")[-1].encoded_image_string))
    assert shown.size == grids.latest[1].size


def test_run_folders_of_others_are_left_alone(tmp_path):
    folder = tmp_path / "m.run"
    options = {"resume": False, "overwrite": False, "kept": False}
    check_run(folder, **options)
    folder.mkdir()
    check_run(folder, **options)
    (folder / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"has no run\.json"):
            check_run(folder, resume=False, overwrite=overwrite, kept=False)
    (folder / "run.json").write_text('{"finished": true}')
    with pytest.raises(FileExistsError, match="the record of another training"):
        check_run(folder, **options)
    check_run(folder, resume=False, overwrite=True, kept=True)
    (folder / "run.json").write_text('{"finished": false}')
    check_run(folder, **options)  # what a killed training left, and nothing else
    with pytest.raises(FileExistsError, match="the record of another training"):
        check_run(folder, **{**options, "kept": True})


def test_a_new_run_removes_its_own_files_only(recipe, data, unseen, tmp_path):
    folder = tmp_path / "run"
    run(recipe, data, watch=watchers(folder, unseen, data))
    (folder / "samples-000099.png").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    run(recipe, data, watch=watchers(folder, unseen, data))
    assert not (folder / "samples-000099.png").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert len(table(folder)) == 7


def test_images_are_split_once_and_for_all(data):
    images = data.images
    rest, held = split(images, 0.25, seed=3)
    assert (len(rest), len(held)) == (15, 5)
    values = torch.cat([rest[torch.arange(15)], held[torch.arange(5)]]).flatten(1)[:, 0]
    assert sorted(values.tolist()) == sorted(images[:, 0, 0, 0].tolist())
    again, _ = split(images, 0.25, seed=3)
    other, _ = split(images, 0.25, seed=4)
    assert rest.digest() == again.digest() != other.digest()
    assert split(images, 0) == (images, None)
    assert len(split(images, 0.001)[1]) == 1
    with pytest.raises(ValueError, match=r"validation=0\.99 of 20 images leaves none"):
        split(images, 0.99)


@dataclass
class Now:
    """A moment of a training at a steady speed."""

    done: int
    steps: int = 1000
    loss: float = 1.0
    lr: float = 1.0

    @property
    def images(self):
        return 32 * self.done

    @property
    def seconds(self):
        return 5 + self.done / 2  # 64 images a second, after 5 seconds of start

    @property
    def last(self):
        return self.done == self.steps


BUDGETS = [
    Budget("faces", 32, "pixels", "UNet", 20_000, False, "blotches", "a run"),
    Budget("faces", 32, "pixels", "UNet", 200_000, True, "faces", "a run"),
    Budget("faces", 128, "pixels", "UNet", 1_000, False, "noise", "a run"),
]


def test_what_a_budget_will_see():
    line = outlook(32_000, 533, 32, speed=64, table=BUDGETS)
    assert "about 32,000 images in 8 min, at 64 a second (60 passes over your 533)" in line
    assert "took about 200,000 (faces), 52 min here; this is less: 20,000" in line
    assert outlook(200_000, 533, 32, table=BUDGETS).endswith("this is enough")
    far = outlook(100, 50, 200, table=BUDGETS)
    assert "at 128x128, the nearest size that was measured, no measured training" in far
    assert "no training of such images" in outlook(1, 1, 8, table=[])
    for row in measured_budgets():
        assert row.source
        assert "images" in outlook(row.images, 600, row.size, speed=50)


def test_the_outlook_is_said_once_at_the_measured_speed(monkeypatch):
    said = []
    watcher = Outlook(533, 32, said.append)
    watcher.begin(0)
    for done in range(1, 60):
        watcher.look(Now(done))
    assert len(said) == 1
    assert "about 32,000 images in 8 min, at 64 a second" in said[0]
    watcher.begin(30)  # continued
    watcher.look(Now(31))
    assert len(said) == 1


def test_a_short_training_says_its_outlook_too(recipe, data):
    said = []
    run(recipe, data, watch=[Outlook(len(data), 8, said.append)], steps=1)
    run(recipe, data, watch=[Outlook(len(data), 8, said.append)], steps=3, lr=constant(1e-3))
    assert len(said) == 2
    assert "this budget will see about 24 images" in said[1]


def test_durations_in_words():
    shown = [duration(s) for s in (3.2, 89, 240, 4800, 86400)]
    assert shown == ["3 s", "89 s", "4 min", "80 min", "24 h"]
    assert duration(6000) == "1 h 40 min"
    assert math.isfinite(len(duration(1e9)))
