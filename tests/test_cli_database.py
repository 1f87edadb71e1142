"""The commands ``retrodiff database ...`` on real photographs, as a user would type them."""

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from retrodiff.cli.database import add_parser
from retrodiff.databases import open_database, opening
from retrodiff.encoders import CLIPEncoder, save_encoder
from retrodiff.indexes import Annoy

skimage_data = pytest.importorskip("skimage.data")


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(dest="command", required=True))
    options = parser.parse_args(["database", *map(str, words)])
    return options.run(options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for name, label in (("astronaut", "people"), ("chelsea", "animals"), ("coffee", "things")):
        (root / label).mkdir()
        image = getattr(skimage_data, name)()
        Image.fromarray(np.ascontiguousarray(image[::2, ::2])).save(root / label / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    tower = {"layers": 1, "width": 32}
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 16, "patch_size": 4, "head_width": 16, **tower},
        "text_cfg": {"context_length": 8, "heads": 2, **tower},
    }
    path = tmp_path_factory.mktemp("encoder")
    save_encoder(CLIPEncoder.from_config(config), path)
    return path


@pytest.fixture(scope="module")
def built(photos, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "photos.rdb"
    options = ["--patch-size", 48, "--stride", 24, "--license", "CC0", "--credit", "NASA"]
    assert run("build", photos, out, "--encoder", encoder, *options) == 0
    return out


def test_build_info_and_verify(built, capsys):
    assert run("info", built) == 0
    text = capsys.readouterr().out
    assert "clip:" in text
    assert "file, label, license, credit, box, resized" in text
    assert run("verify", built) == 0
    assert "as it was written" in capsys.readouterr().out
    assert len(open_database(built)) > 100


def test_search_shows_what_was_found(built, encoder, photos, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    patch = open_database(built).image(30)
    pixels = ((patch + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "query.png")
    options = ["--image", tmp_path / "query.png", "--text", "a cat", "-k", 4, "--out", out]
    assert run("search", built, "--encoder", encoder, *options) == 0
    text = capsys.readouterr().out
    assert "row 30: 1.000" in text
    assert "CC0" not in text
    with Image.open(out) as sheet:
        assert sheet.width > 5 * 128
    only = [*options, "--where", "label == 'people'"]
    drawn = out.read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        run("search", built, "--encoder", encoder, *only)
    assert out.read_bytes() == drawn
    only.append("--overwrite")
    assert run("search", built, "--encoder", encoder, *only) == 0
    assert "animals/" not in capsys.readouterr().out


def test_a_small_database_is_shown_whole_and_names_are_not_cut(
    encoder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("few").mkdir()
    names = [f"a rather long name of a picture, number {i}.png" for i in range(3)]
    for i, name in enumerate(names):
        Image.new("RGB", (40, 30), (80 * i, 20, 90)).save(tmp_path / "few" / name)
    assert run("build", "few", "few.rdb", "--encoder", encoder) == 0
    capsys.readouterr()
    assert run("search", "few.rdb", "--encoder", encoder, "--text", "a cat") == 0
    told = capsys.readouterr().out
    assert all(told.count(name) == 1 for name in names)
    with pytest.raises(ValueError, match="k=4"):
        run("search", "few.rdb", "--encoder", encoder, "--text", "a cat", "-k", 4)


def test_a_second_search_keeps_the_first_sheet(built, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert run("search", built, "--encoder", encoder, "--text", "a cat", "-k", 2) == 0
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["neighbors-2.png", "neighbors-3.png", "neighbors.png"]


def test_index(built, capsys):
    assert run("index", built, "annoy:trees=10,components=16") == 0
    assert "recall@20" in capsys.readouterr().out
    assert run("info", built) == 0
    assert "index annoy" in capsys.readouterr().out


def test_commands_that_do_not_search_need_no_index(photos, encoder, tmp_path, monkeypatch):
    out = tmp_path / "d.rdb"
    assert run("build", photos, out, "--encoder", encoder) == 0
    assert run("index", out, "annoy:trees=10,components=16") == 0
    monkeypatch.setattr(opening, "EXACT_ROWS", 1)
    monkeypatch.setattr(opening, "TARGET", 0.0)
    assert open_database(out).recipe.name == "annoy"

    def missing(*_):
        raise ValueError("annoy is not installed")

    monkeypatch.setattr(Annoy, "load", missing)  # a warning would be an error
    for words in (
        ("info", out),
        ("verify", out),
        ("delete", out, "label == 'people'"),
        ("append", photos / "people", out, "--encoder", encoder),
    ):
        assert run(*words) == 0


def test_append_and_delete(photos, encoder, tmp_path, capsys):
    out = tmp_path / "d.rdb"
    assert run("build", photos / "people", out, "--encoder", encoder, "--thumbnails", 32) == 0
    assert run("append", photos, out, "--encoder", encoder) == 0
    assert len(open_database(out)) == 4
    assert run("delete", out, "label == 'people' or label == 'things'") == 0
    assert "2 rows deleted, 2 left" in capsys.readouterr().out
    assert open_database(out).image(1).shape[0] == 3


def test_skipped_files_are_named_in_one_line(photos, encoder, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.txt").write_text("a")
    picture = photos / "people/astronaut.png"
    (tmp_path / "photos/b.png").write_bytes(picture.read_bytes())
    assert run("build", tmp_path / "photos", tmp_path / "d", "--encoder", encoder) == 0
    assert "1 skipped: a.txt (not an image)\n" in capsys.readouterr().err


def test_timm_with_random_weights_is_the_same_every_time(photos, tmp_path):
    for name in ("a", "b"):
        options = ["--encoder", "timm:resnet10t", "--no-pretrained"]
        assert run("build", photos, tmp_path / name, *options) == 0
    a, b = (open_database(tmp_path / name).fingerprint for name in ("a", "b"))
    assert a == b


def test_other_sources(encoder, photos, tmp_path, capsys):
    pixels = [(photos / f).read_bytes() for f in ("people/astronaut.png", "animals/chelsea.png")]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w") as tar:
        for number, data in enumerate(pixels):
            for ending, content in ((".png", data), (".txt", b"a picture")):
                about = tarfile.TarInfo(f"{number}{ending}")
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    pq.write_table(pa.table({"jpg": pixels, "id": [1, 2]}), tmp_path / "a.parquet")
    options = ["--encoder", encoder]
    assert run("build", tmp_path / "tars", tmp_path / "t", *options, "--credit", "NASA") == 0
    assert open_database(tmp_path / "t").column("caption").tolist() == ["a picture"] * 2
    column = ["--image-column", "jpg"]
    assert run("build", tmp_path / "a.parquet", tmp_path / "p", *options, *column) == 0
    with pytest.raises(ValueError, match="has no column 'image'; columns: jpg, id"):
        run("build", tmp_path / "a.parquet", tmp_path / "q", *options)
    with pytest.raises(ValueError, match="row 0 has id 1, which a row of the database has too"):
        run("append", tmp_path / "a.parquet", tmp_path / "p", *options, *column)
    assert run("append", tmp_path / "tars", tmp_path / "p", *options) == 0
    assert "4 rows" in capsys.readouterr().out


def test_import(built, encoder, tmp_path, capsys):
    original = open_database(built)
    rows = original.embeddings(torch.arange(len(original))).numpy()
    (tmp_path / "npy").mkdir()
    for i in range(3):
        np.save(tmp_path / f"npy/{i}.npy", rows[i * 50 : (i + 1) * 50])
    assert run("import", tmp_path / "npy", tmp_path / "a", "--encoder", encoder) == 0
    assert "150 rows, raw scale" in capsys.readouterr().out
    imported = open_database(tmp_path / "a")
    assert imported.fingerprint.disagreement(original.fingerprint) is None
    assert np.array_equal(imported.embeddings(torch.arange(150)).numpy(), rows[:150])
    for word in ("--resume", "--overwrite"):
        assert run("import", tmp_path / "npy", tmp_path / "a", "--encoder", encoder, word) == 0
    with pytest.raises(FileExistsError, match="--overwrite"):
        run("import", tmp_path / "npy", tmp_path / "a", "--encoder", encoder)
    unit = rows[:9] / np.linalg.norm(rows[:9], axis=1, keepdims=True)
    np.save(tmp_path / "unit.npy", unit)
    other = ["--encoder", "name:ours v2"]
    assert run("import", tmp_path / "unit.npy", tmp_path / "b", *other) == 0
    assert open_database(tmp_path / "b").fingerprint.encoder == "ours v2"
    assert open_database(tmp_path / "b").fingerprint.scale == "unit"
    with pytest.raises(ValueError, match="says scale='unit'"):
        run("import", tmp_path / "npy/0.npy", tmp_path / "c", *other, "--scale", "unit")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "{photos}", "{built}"], "--overwrite"),
        (["build", "{photos}", "{built}x", "--stride", "4"], "need --patch-size"),
        (["build", "{photos}/none", "{built}x"], "does not exist"),
        (["import", "{photos}", "{built}x"], "holds no embeddings"),
        (["search", "{built}"], "give --text or --image"),
        (["search", "{built}", "--text", "a", "-k", "999999"], "k=999999"),
        (["search", "{built}", "--text", "a", "--where", "x == 1"], "unknown column 'x'"),
    ],
)
def test_refusals(words, message, photos, built, encoder):
    words = [word.format(photos=photos, built=built) for word in words]
    with pytest.raises((ValueError, OSError), match=message) as error:
        run(*words, "--encoder", encoder)
    assert "\n" not in str(error.value)


def test_search_refuses_another_encoder_and_one_without_text(built, photos, tmp_path):
    timm = ["--encoder", "timm:resnet10t", "--no-pretrained"]
    with pytest.raises(ValueError, match=r"dim=512 against dim=32: give the encoder .*\(clip:"):
        run("search", built, "--text", "a", *timm)
    run("build", photos, tmp_path / "t", *timm)
    with pytest.raises(ValueError, match="no text tower"):
        run("search", tmp_path / "t", "--text", "a", *timm)
