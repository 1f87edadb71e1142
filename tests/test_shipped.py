"""Models that come in packages of their own are found by name, with their database."""

import shutil
import sys
import warnings

import pytest
import torch
from parts import HashingEncoder

from retrodiff import presets
from retrodiff.cli import main
from retrodiff.databases import EmbeddingDatabase, open_database
from retrodiff.databases.build.imports import Part, import_embeddings
from retrodiff.disk import shipped as room
from retrodiff.model import Model


@pytest.fixture
def package(tmp_path, monkeypatch, model):
    """An installed package with a model and, inside of it, its database."""
    monkeypatch.setitem(room.SHIPPED, "small", "shipped_small")
    folder = tmp_path / "site" / "shipped_small"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    stored = tmp_path / "d"
    rows = model.database.embeddings(torch.arange(40)).numpy()
    import_embeddings(stored, [Part(rows)], HashingEncoder().fingerprint, progress=False)
    complete = model.replace(database=EmbeddingDatabase.at(stored))
    complete.save(folder / "model", include_database=True)
    shutil.rmtree(stored)
    monkeypatch.syspath_prepend(str(folder.parent))
    yield folder
    sys.modules.pop("shipped_small", None)


def test_a_name_stands_for_the_folder_in_the_package(package):
    assert room.shipped("small") == package / "model"
    database = open_database("small")
    assert len(database) == 40
    loaded = Model.load("small", encoder=HashingEncoder())
    assert loaded.database.path == package / "model" / "database"
    assert len(loaded.sample(prompts=["a"], seed=0).images) == 1


def test_a_folder_of_that_name_goes_first(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert room.shipped("small") is not None  # a folder of something else
    (tmp_path / "small" / "model.json").write_text("{}")
    assert room.shipped("small") is None
    assert room.shipped("another") is None


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(room.SHIPPED, "small", "shipped_nowhere")
    for opened in (Model.load, open_database):
        with pytest.raises(
            FileNotFoundError, match="not installed: install shipped-nowhere"
        ) as caught:
            opened("small")
        assert "\n" not in str(caught.value)


def test_a_model_with_its_database_is_replaced_as_a_whole(package, model):
    folder = package / "model"
    before = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    assert not any(str(package) in f.read_text("utf-8") for f in folder.glob("*.json"))
    loaded = Model.load(folder, encoder=HashingEncoder())
    loaded.save(folder, overwrite=True, include_database=True)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) == before
    (folder / "database" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        loaded.save(folder, overwrite=True, include_database=True)
    with pytest.raises(ValueError, match="a ArrayDatabase, which lies in no folder"):
        model.save(package / "other", include_database=True)
    assert not (package / "other").exists()


# --- the package of the pictograms, where it is installed --------------------------------------


@pytest.fixture(scope="module")
def pictograms():
    pytest.importorskip("retrodiff_pictograms", reason="pip install packages/pictograms")
    return presets.rdm_pictograms(pretrained=True)


@pytest.mark.parametrize("mode", ["text", "neighbors", "text+neighbors"])
def test_pictograms_are_sampled_in_every_mode(pictograms, mode):
    out = pictograms.sample(prompts=["red apple"], mode=mode, steps=2)
    assert out.images.shape == (1, 3, 64, 64)
    if mode == "neighbors":
        assert "apple" in ", ".join(str(record["title"]) for record in out.neighbors.records[0])


def test_pictograms_without_a_question_come_from_what_is_drawn(pictograms):
    assert pictograms.sample(n=2, steps=2).images.shape == (2, 3, 64, 64)


def test_the_database_of_the_pictograms_tells_license_and_credit(pictograms):
    table = pictograms.database.table(["style", "license", "credit"])
    assert set(table["style"].to_pylist()) == {"noto", "fluent", "twemoji"}
    assert set(table["license"].to_pylist()) == {"Apache-2.0", "MIT", "CC-BY-4.0"}
    assert all(table["credit"].to_pylist())


def test_parts_of_the_pretrained_preset_can_be_others(pictograms):
    noto = pictograms.database.where("style == 'noto'")
    other = presets.rdm_pictograms(pretrained=True, database=noto, k=2)
    assert len(other.database) == len(noto)
    assert other.k == 2
    assert other.proposal is None  # it was of the whole database
    with pytest.raises(ValueError, match="the pretrained network has 96"):
        presets.rdm_pictograms(pretrained=True, channels=192)


def test_a_prompt_of_no_known_word_is_answered_with_a_warning(pictograms):
    with pytest.warns(
        UserWarning, match=r"no word of the prompt 'xyzzy' .* similarity 0\."
    ) as told:
        out = pictograms.sample(prompts=["xyzzy", "red apple"], steps=1)
    assert len(told) == 1
    assert (out.neighbors.indices[0, 1:] >= 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictograms.sample(prompts=["two robots"], steps=1)


def test_the_command_line_knows_pictograms_by_name(pictograms, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "pictograms", "out", "--prompt", "a robot", "--steps", "2"]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2  # the image and the sheet
    search = [
        "database",
        "search",
        "pictograms",
        "--text",
        "guitar",
        "--out",
        "found.png",
        "--k",
        "2",
    ]
    assert main(search) == 0
    assert "guitar" in capsys.readouterr().out
    assert main([*search[:3], "--text", "xyzzy", "--out", "b.png"]) == 0
    assert "no word of the prompt 'xyzzy'" in capsys.readouterr().err


def test_a_database_without_a_package_asks_for_its_encoder(tmp_path, monkeypatch, capsys, package):
    assert main(["database", "search", str(package / "model" / "database"), "--text", "a"]) != 0
    assert "give --encoder" in capsys.readouterr().err


def test_a_database_of_another_encoder_is_refused(pictograms, database):
    with pytest.raises(ValueError, match="encoder"):
        pictograms.replace(database=database)


def test_half_the_bytes_of_a_model_are_loaded_as_float32(model, tmp_path):
    model.save(tmp_path / "whole")
    model.save(tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / n / "weights.safetensors").stat().st_size for n in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = Model.load(tmp_path / "half", encoder=HashingEncoder(), database=model.database)
    before, after = (m.denoiser.state_dict() for m in (model, loaded))
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.half().float()), name
    assert loaded.sample(prompts=["a"], seed=0).images.dtype == torch.float32
