"""The demo's data and figures, and a run of it in miniature."""

import json

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from retrodiff import demo
from retrodiff.demo import digits, photographs

SMALL = demo.Settings(
    photographs.Settings(
        encoder_steps=2, steps=3, samples=6, stride=16, sampling_steps=2, channels=32
    ),
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
    for name in ("samples.png", "neighbors.png", "digits/model.json", "photographs/model.json"):
        assert (folder / name).is_file()
    for name in ("digits.rdb", "photographs.rdb", "photographs-never-trained.rdb"):
        assert (folder / name / "manifest.json").is_file()
    for key in ("text", "text_neighbors", "neighbors", "class"):
        assert 0 <= report["accuracy"][key] <= 1
    for key in (
        "swap",
        "unseen",
        "color",
        "loss_gap",
        "seconds",
        "peak_rss_mb",
        "versions",
        "copying",
    ):
        assert key in report
    assert "text + k-1 neighbors" in demo.table(report)


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


def test_photograph_tiles_share_no_pixel():
    covered = []
    for parity in (0, 1):
        _, records = photographs.patches(photographs.TRAINED, 16, parity)
        pixels = set()
        for record in records:
            x1, y1, x2, y2 = record["box"]
            pixels |= {(record["file"], x, y) for x in range(x1, x2) for y in range(y1, y2)}
        covered.append(pixels)
    assert covered[0]
    assert covered[1]
    assert not covered[0] & covered[1]
    assert not set(photographs.TRAINED) & set(photographs.NEVER_TRAINED)


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


def test_likeness_tells_own_neighbors_from_others():
    generator = torch.Generator().manual_seed(0)
    neighbors = torch.rand(12, 4, 3, 32, 32, generator=generator) * 0.2
    neighbors += torch.rand(12, 1, 3, 1, 1, generator=generator)
    close = photographs.likeness(neighbors.mean(1), neighbors)
    assert close["mean_color.ratio"] > 2
    shuffled = photographs.likeness(neighbors.mean(1).roll(3, 0), neighbors)
    assert shuffled["mean_color.ratio"] < 1.1
