"""Models that come in packages of their own are found by name, with their database."""

import shutil
import sys

import pytest
import torch
from parts import HashingEncoder

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
    assert room.shipped("small") is None
    assert room.shipped("another") is None


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(room.SHIPPED, "small", "shipped_nowhere")
    for opened in (Model.load, open_database):
        with pytest.raises(
            FileNotFoundError, match="shipped_nowhere, which is not installed"
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
