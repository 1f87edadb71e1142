"""The demo's data and figures, and a run of it in miniature."""

import json

import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")
pytest.importorskip("retrodiff_pictograms", reason="pip install packages/pictograms")

from retrodiff import demo
from retrodiff.demo import digits, pictograms
from retrodiff.demo.poster import Cell, Grid, draw_poster

SMALL = demo.Settings(
    pictograms.Settings(prompts=["robot"], modes=["crown"], filmed=["robot", "crown"], steps=2),
    digits.Settings(clip_steps=3, steps=4, sampling_steps=2, per_mode=32, unseen_per_mode=4),
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    try:
        report = demo.run(folder, settings=SMALL, progress=False)
    except (
        demo.CopyingError
    ):  # nothing is learned in four steps; what counts is that it was written
        report = json.loads((folder / "report.json").read_text())
    return folder, report


def test_it_writes_everything(ran):
    folder, report = ran
    assert json.loads((folder / "report.json").read_text()) == report
    for name in ("samples.png", "attribution.png", "demo.gif", "digits.png", "digits/model.json"):
        assert (folder / name).is_file()
    assert (folder / "digits.rdb" / "manifest.json").is_file()
    for key in ("text", "text_neighbors", "neighbors", "class"):
        assert 0 <= report["accuracy"][key] <= 1
    for key in (
        "swap",
        "unseen",
        "pictograms",
        "loss_gap",
        "seconds",
        "peak_rss_mb",
        "versions",
        "copying",
    ):
        assert key in report
    assert "text + k-1 neighbors" in demo.table(report)


def test_the_film_shows_every_step_and_every_neighbor(ran):
    folder, _ = ran
    with Image.open(folder / "demo.gif") as film:
        # Two databases; each of its acts has two steps, the end, and the light on three neighbors.
        # Frames that look alike are stored as one that is shown for longer.
        assert 2 * (2 + 2) <= film.n_frames <= 2 * (2 + 1 + 3)
        assert film.info["loop"] == 0


def test_a_poster_is_as_wide_as_asked_and_holds_its_pictures():
    red = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 8, 8)
    cells = [Cell([red] * 99, [-red]), Cell([], [])]  # more samples than there is room for
    poster = draw_poster("heading", [Grid("title", ["one", "two"], [("a", cells)])], width=700)
    assert poster.width == 700
    colors = {color for _, color in poster.getcolors(10**6)}
    assert {(255, 0, 0), (0, 255, 255)} <= colors
    right = poster.crop((104 + (700 - 104) // 2, 0, 700, poster.height))
    assert (255, 0, 0) not in {color for _, color in right.getcolors(10**6)}


def test_without_the_models_package_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("retrodiff.disk.shipped.SHIPPED", {"pictograms": "no_such_package"})
    with pytest.raises(FileNotFoundError, match="install no-such-package"):
        demo.run(tmp_path / "out", settings=SMALL)
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_left_alone(ran, tmp_path):
    folder, _ = ran
    with pytest.raises(FileExistsError, match="exists"):
        demo.run(folder, settings=SMALL, progress=False)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not ours"):
        demo.run(tmp_path, settings=SMALL, overwrite=True, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_saved_models_sample_again(ran):
    from retrodiff.model import Model

    folder, _ = ran
    model = Model.load(folder / "digits")
    out = model.sample(prompts=[digits.caption(3)], progress=False)
    again = Model.load(folder / "digits").sample(prompts=[digits.caption(3)], progress=False)
    assert torch.equal(out.images, again.images)
    assert model.sample(n=1, progress=False).images.shape == (1, 1, 8, 8)


def test_the_digits_are_split_without_overlap():
    parts = digits.split(0)
    sizes = [len(images) for images, _ in (parts.database, parts.training, parts.held_out)]
    assert sizes[0] == 700
    assert not torch.isin(parts.training[1], torch.tensor(digits.UNSEEN)).any()
    assert torch.isin(parts.database[1], torch.tensor(digits.UNSEEN)).any()
    rows = torch.cat([parts.database[0], parts.training[0], parts.held_out[0]]).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)


def test_copies_are_seen_as_copies_and_new_scans_are_not():
    parts = digits.split(0)
    copies = digits.copying(parts.database[0][:200], parts)
    assert copies["share"] == 1.0
    assert copies["standard_errors_above"] > 50
    real = digits.copying(parts.held_out[0], parts)
    assert real["share"] == real["share_of_real"]


def test_the_judge_knows_real_digits_and_not_noise():
    parts = digits.split(0)
    judge = digits.Judge(parts)
    assert judge.share(parts.training[0], parts.training[1].tolist()) > 0.97
    noise = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert judge.share(noise, [i % 10 for i in range(200)]) < 0.3
