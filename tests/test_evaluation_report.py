"""``retrodiff evaluate`` and its page: folders of any generator, neighbors, bad input."""

from __future__ import annotations

import html.parser
import json
import shutil
import subprocess
import warnings

import pytest
import torch

from retrodiff.cli import main
from retrodiff.encoders import TimmEncoder, save_encoder
from retrodiff.evaluation import Report, evaluate, features_from_string, vendi
from retrodiff.evaluation.run_curves import draw, read_curves
from retrodiff.evaluation.sampled import read_sampled
from retrodiff.evaluation.sets import ImageSet
from retrodiff.model import Model
from retrodiff.model.generated import to_picture

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Pictures of colored discs: training, held out, generated ones with planted copies."""
    room = tmp_path_factory.mktemp("evaluation")
    generator = torch.Generator().manual_seed(7)

    def disc(side=32):
        center = (torch.rand(2, generator=generator) * 0.6 + 0.2) * side
        radius = side * (0.1 + 0.25 * torch.rand(1, generator=generator))
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        inside = (x - center[0]) ** 2 + (y - center[1]) ** 2 < radius**2
        colors = torch.rand(2, 3, 1, 1, generator=generator) * 2 - 1
        return torch.where(inside, colors[0], colors[1])

    for name, n in (("training", 60), ("held-out", 110), ("generated", 60)):
        (room / name).mkdir()
        for i in range(n):
            to_picture(disc()).save(room / name / f"{i:03d}.png")
    for i in range(30):
        shutil.copy(room / "training" / f"{i:03d}.png", room / "generated" / f"copy-{i:03d}.png")
    torch.manual_seed(0)
    save_encoder(TimmEncoder("test_resnet", image_size=32), room / "enc")
    torch.manual_seed(1)
    save_encoder(TimmEncoder("test_vit", image_size=32), room / "judge")
    (room / "run").mkdir()
    lines = [f"{i},{1 / (i + 1):.4f},{2 / (i + 1) if i % 5 == 0 else ''},1e-4,{i * 4},{i}\n"
             for i in range(40)]  # fmt: skip
    text = "step,loss,validation,lr,images,seconds\n" + "".join(lines)
    (room / "run" / "metrics.csv").write_text(text)
    return room


@pytest.fixture
def here(room, monkeypatch):
    monkeypatch.chdir(room)
    return room


@pytest.fixture(scope="module")
def model(room):
    """A model of ten steps over the training pictures, whose database has thumbnails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        build = "database build training d.rdb --encoder enc --thumbnails 32"
        assert main([*build.split(), "--license", "CC0", "--credit", "us"]) == 0
        train = "train training model --database d.rdb --encoder enc --channels 32 --size 8 --steps"
        assert main([*train.split(), "4", "--batch-size", "4"]) == 0
    return room / "model"


def run(command, *more):
    return main(["evaluate", *command.split(), *map(str, more)])


def told(capsys):
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("retrodiff: ")]


def test_a_folder_of_any_generator(here, tmp_path, capsys):
    out = tmp_path / "report"
    command = "--images generated --reference held-out --training training --features enc --run run"
    assert run(command, "--out", out) == 0
    printed = capsys.readouterr().out
    for word in ("KID", "MIND", "precision", "coverage", "Vendi", "AuthPct", "No Fréchet"):
        assert word in printed
    for line in printed.splitlines():
        if "generated against" in line and "near-duplicates" not in line:
            assert "90 generated against" in line
            assert "features timm:test_resnet@32" in line
            assert "sampling not recorded" in line
    report = json.loads((out / "report.json").read_text())
    found = report["copying"]["training"]
    assert found["excess"] == pytest.approx(30 / 90, abs=0.05)
    assert {pair["file"] for pair in found["worst"]} <= {f"copy-{i:03d}.png" for i in range(30)}
    assert set(found["planted_by_kind"]) >= {"crop", "noise", "mirror"}
    page = (out / "report.html").read_text()
    assert page.count("data:image/") > 60
    assert "http" not in page.replace("data:image", "")
    assert "validation loss" in page
    assert run(command, "--out", out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(command, "--out", out, "--overwrite") == 0


def test_sampling_and_evaluating_in_one_go(here, model, tmp_path, capsys):
    out = tmp_path / "report"
    command = f"--model {model} --n 12 --steps 2 --k 3 --reference held-out --features judge"
    assert run(command, "--out", out, "--training", "training") == 0
    printed = capsys.readouterr().out
    assert "k=3" in printed
    assert "steps=2 seed=0" in printed
    assert "near-duplicates of neighbors" in printed
    assert (tmp_path / "report-samples" / "generation.json").is_file()
    report = json.loads((out / "report.json").read_text())
    assert report["generated"]["images"] == 12  # and not the sheet
    assert report["copying"].keys() == {"training", "database", "neighbors"}
    assert report["conditions"].startswith("m=all s=")
    used = report["rows_used"]
    assert sum(row["used"] for row in used) == 12 * 3
    assert {(row["license"], row["credit"]) for row in used} == {("CC0", "us")}
    page = (out / "report.html").read_text()
    assert "Samples and the neighbors that conditioned them" in page
    assert "CC0 (" in page
    # Held-out images were compared with the neighbors that the model's encoder finds.
    assert not any("the model's encoder was not at hand" in note for note in report["notes"])


def test_samples_of_before_their_database_and_its_neighbors(here, model, tmp_path, capsys):
    sample = f"sample {model} {tmp_path}/samples --unconditional --n 10 --steps 2 --k 2"
    assert main(sample.split()) == 0
    command = f"--images {tmp_path}/samples --reference held-out --features enc --database d.rdb"
    assert run(command, "--out", tmp_path / "report") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    notes = " ".join(report["notes"])
    assert "which also conditions the model" in notes
    assert "the model's encoder was not at hand" in notes
    assert report["copying"].keys() == {"database", "neighbors"}
    sampled = read_sampled(tmp_path / "samples")
    assert [len(rows) for rows in sampled.rows] == [2] * 10
    assert sampled.conditions == report["conditions"]
    capsys.readouterr()
    file = tmp_path / "samples" / "generation.json"
    value = json.loads(file.read_text())
    value["images"][0]["neighbors"][0]["row"] = 10**6
    file.write_text(json.dumps(value))
    assert run(command, "--out", tmp_path / "other") == 2
    assert "give the database that was sampled with" in told(capsys)[-1]
    file.write_text("{")
    assert run(command, "--out", tmp_path / "other") == 2
    assert "generation.json is damaged" in told(capsys)[-1]
    value["images"][0]["file"] = "../../secret.png"
    file.write_text(json.dumps(value))
    assert run(command, "--out", tmp_path / "other") == 2
    assert "generation.json is damaged" in told(capsys)[-1]


def test_a_database_for_the_images_of_any_generator(here, model, tmp_path):
    command = "--images generated --reference held-out --features enc --database d.rdb"
    assert run(command, "--out", tmp_path / "report") == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["copying"].keys() == {"database"}
    assert report["copying"]["database"]["excess"] == pytest.approx(30 / 90, abs=0.05)
    assert any("do not say which rows" in note for note in report["notes"])


def test_of_a_large_database_the_neighbors_that_were_used(here, model, tmp_path, monkeypatch):
    monkeypatch.setattr("retrodiff.evaluation.retrieved.LARGEST", 10)
    loaded = Model.load(model)
    made = loaded.sample(n=9, steps=2, k=2)
    encoder = features_from_string("judge")

    def report(**more):
        return evaluate(made, "held-out", encoder, progress=False, **more)

    found = report(conditioning=loaded.encoder)
    assert found.copying.keys() == {"neighbors"}
    assert found.sources.keys() == {"neighbors"}
    assert "too few to tell" in found.verdicts()[0][1]
    assert set(found.neighbors) >= {row for rows in found.sampled.rows for row in rows}
    blind = report()
    assert not blind.copying
    assert any("nothing says which ones held-out" in note for note in blind.notes)
    with pytest.raises(ValueError, match="conditioning and database disagree"):
        report(conditioning=encoder, database="d.rdb")


def test_in_python_with_prompts(recipe, room, tmp_path):
    """The CLIP score, and that it is said when its encoder is the model's own."""
    model = recipe.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made = model.sample(prompts=["a cat", "a dog"] * 6, steps=2)
        report = evaluate(made, room / "held-out", model.encoder, progress=False)
        score = report.score("CLIP score")
        assert "by the encoder that conditions the model" in score.note
        assert any("obeys its condition" in note for note in report.notes)
        other = features_from_string(str(room / "enc"))
        report = evaluate(made, room / "held-out", other, clip=model.encoder, progress=False)
        assert report.score("CLIP score").value == pytest.approx(score.value, abs=0.02 * 100)
        assert report.score("CLIP score").features == model.encoder.fingerprint.encoder
        report = evaluate(made, room / "held-out", other, progress=False)
    assert report.score("CLIP score") is None
    assert any("give an encoder of text" in note for note in report.notes)
    assert any("No copies of the model's database" in note for note in report.notes)
    saved = report.save(tmp_path / "report")
    assert saved.name == "report.html"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images one --reference held-out", "1 generated images: at least 8 are needed"),
        ("--images generated --reference one", "1 reference images: at least 8 are needed"),
        ("--images empty --reference held-out", "empty holds no files"),
        ("--images texts --reference held-out", "texts holds no readable image"),
        ("--images missing --reference held-out", "missing does not exist"),
        ("--reference held-out", "give --images, or --model"),
        ("--images generated --reference held-out --run held-out", "has no metrics.csv"),
        ("--images generated --reference held-out --run bad.csv", "is no table of a training"),
        ("--images generated --reference held-out --judge resnet", "give a classifier of timm"),
        ("--images generated --reference held-out --clip enc --database no.rdb", "no.rdb"),
        ("--images generated --reference held-out --database bare.rdb", "has no pictures at hand"),
    ],
)
def test_bad_input_is_one_line(here, tmp_path, capsys, words, message):
    for folder in ("one", "empty", "texts"):
        (here / folder).mkdir(exist_ok=True)
    shutil.copy("training/000.png", "one")
    (here / "texts" / "a.txt").write_text("no picture")
    (here / "bad.csv").write_text("step,loss\n1,x\n")
    if "bare" in words and not (here / "bare.rdb").exists():
        shutil.copytree("training", "gone")
        build = "database build gone bare.rdb --encoder enc"
        assert main(build.split()) == 0
        shutil.rmtree("gone")
    capsys.readouterr()
    assert run(words, "--features", "enc", "--out", tmp_path / "r") == 2
    assert message in told(capsys)[-1]
    assert not (tmp_path / "r").exists()


def test_few_held_out_images_and_other_sizes_are_said(here, tmp_path):
    from PIL import Image

    for i in range(12):
        (tmp_path / "large").mkdir(exist_ok=True)
        with Image.open(f"held-out/{i:03d}.png") as picture:
            picture.resize((60, 48)).save(tmp_path / "large" / f"{i}.png")
    encoder = features_from_string("enc")
    report = evaluate("generated", tmp_path / "large", encoder, training="training", progress=False)
    assert not report.copying
    notes = " ".join(report.notes)
    assert "12 held-out images cannot set its threshold, at least 100 are needed" in notes
    assert "The reference images (60x48) were cut to the shape of the generated ones" in notes
    assert "brought to 32x32 pixels" in notes
    assert "12 images are too few for 96 features, at least 2,000" in notes


def test_curves(room, tmp_path):
    loss, validation = read_curves(room / "run")
    assert (len(loss.points), len(validation.points)) == (40, 8)
    assert validation.points[1] == (5.0, pytest.approx(2 / 6, abs=1e-4))
    picture = draw([loss, validation])
    assert picture.count("<polyline") == 2
    rows = "".join(f"{i},nan,\n" if i == 7 else f"{i},{5 - i / 1000},\n" for i in range(3000))
    (tmp_path / "metrics.csv").write_text("step,loss,validation\n" + rows)
    [curve] = read_curves(tmp_path)
    assert len(curve.points) == 2999
    assert draw([curve]).count(",") < 1000
    (tmp_path / "one.csv").write_text("step,loss\n0,-1\n")
    assert "<circle" in draw(read_curves(tmp_path / "one.csv"))


def test_names_of_files_cannot_write_html():
    images = ImageSet('"><script>x</script>', torch.randn(3, 4), ("<b>", '"><i>', "c"), (b"x",) * 3)
    page = Report(images, images, "<i>", [vendi(images.features)]).html()
    assert "<script>" not in page
    assert "<i>" not in page
    assert "<b>" not in page


class Checker(html.parser.HTMLParser):
    """Tags that are opened and closed."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong = [], []

    def handle_starttag(self, tag, attrs):
        if tag in ("main", "body", "html", "section", "details", "figure", "div", "table", "ul"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and tag in self.open:
            if self.open.pop() != tag:
                self.wrong.append(tag)


def test_the_page_in_a_browser(here, model, tmp_path):
    """Rendered: pictures are drawn, nothing is fetched, nothing is wider than a small screen."""
    out = tmp_path / "report"
    command = f"--model {model} --n 9 --steps 2 --reference held-out --features enc --run run"
    assert run(command, "--out", out) == 0
    page = (out / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert not checker.wrong
    if CHROMIUM is None:
        pytest.skip("no chromium")
    script = (
        "<script>const i=[...document.images];document.title=JSON.stringify({"
        "images:i.length,drawn:i.filter(x=>x.complete&&x.naturalWidth>0).length,"
        "cards:document.querySelectorAll('.card').length,"
        "wide:document.documentElement.scrollWidth-innerWidth,"
        "fetched:performance.getEntriesByType('resource').filter(r=>!r.name.startsWith('data:'))"
        ".length})</script>"
    )
    (tmp_path / "probed.html").write_text(page.replace("</body>", f"{script}</body>"))
    common = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900",
              f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=2000"]  # fmt: skip
    url = f"file://{tmp_path}/probed.html"
    done = subprocess.run([*common, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    if not title.startswith("{"):
        pytest.skip(f"chromium does not run here: {done.stderr[-200:]}")
    seen = json.loads(title)
    assert seen["images"] == seen["drawn"] > 30
    assert seen["cards"] == 3
    assert seen["wide"] <= 0
    assert seen["fetched"] == 0
