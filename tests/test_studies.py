"""The studies of benchmarks/paper: their tables, a run at toy size, and going on after a kill."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

PAPER = Path(__file__).parents[1] / "benchmarks" / "paper"


@pytest.fixture(scope="module")
def paper():
    """The modules of the studies by name."""
    import importlib

    names = ("scale", "photographs", "embeddings", "training_table", "points", "studies", "tables",
             "text_modes", "drawing", "report", "run")  # fmt: skip
    sys.path.insert(0, str(PAPER))
    pytest.importorskip("matplotlib")
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(PAPER))
        for name in names:
            sys.modules.pop(name, None)


# --- the tables ----------------------------------------------------------------------------------


def test_there_are_nine_studies_and_each_training_serves_one(paper):
    studies = paper["studies"].STUDIES
    assert sorted(study.letter for study in studies) == list("abcdefghi")
    assert len({study.name for study in studies}) == 9
    used = {name for study in studies for name in study.trainings()}
    assert used == set(paper["training_table"].TRAININGS)


def test_the_claim_on_parameters_has_two_seeds(paper):
    trainings = paper["training_table"].TRAININGS
    (study,) = [s for s in paper["studies"].STUDIES if s.letter == "a"]
    seeds = {trainings[name].seed for name in study.trainings()}
    assert seeds == {0, 1}


def test_panels_draw_lines_that_exist(paper):
    for study in paper["studies"].STUDIES:
        labels = [line.label for line in study.lines]
        assert len(set(labels)) == len(labels)
        assert {label for panel in study.panels for label in panel.lines} <= set(labels)
        for line in study.lines:
            assert len(line.at) == len(line.points) > 0


def test_points_that_are_asked_differently_have_names_of_their_own(paper):
    points = {point for study in paper["studies"].STUDIES for point in study.points()}
    asked = {}
    for point in points:
        how = (point.training, point.part, point.k, point.database, point.proposal, point.guidance)
        assert asked.setdefault(point.asked, how) == how
    assert len({(p.asked, p.measured) for p in points}) == len(points)


def test_trainings_that_differ_only_in_retrieval_have_the_same_network_otherwise(paper, toy):
    trainer = toy.trainer
    parameters = {
        name: sum(p.numel() for p in trainer.fresh(paper["training_table"].TRAININGS[name])
                  .denoiser.parameters())
        for name in ("rdm", "ldm", "rdm half", "rdm quarter")
    }  # fmt: skip
    assert parameters["rdm quarter"] < parameters["rdm half"] < parameters["ldm"]
    assert parameters["ldm"] < parameters["rdm"] < 1.25 * parameters["ldm"]


# --- the data ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(paper, tmp_path_factory):
    """The studies at toy size, nothing trained."""
    return studies_in(paper, tmp_path_factory.mktemp("toy"))


def studies_in(paper, folder):
    import argparse

    options = argparse.Namespace(
        scale="toy", runs=folder, photographs=None, device="cpu", only=None,
        tables=folder / "tables", pictures=folder / "pictures",
    )  # fmt: skip
    return paper["run"].Studies(options)


def test_photographs_of_a_parquet_file_are_divided_in_its_order(paper, tmp_path):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    scale, names = paper["scale"].SCALES["toy"], paper["photographs"].CLASSES
    total = scale.database + scale.trained + scale.held_out

    def encoded(i):
        with io.BytesIO() as file:
            Image.new("RGB", (32, 32), (i % 256, i // 256, 7)).save(file, "png")
            return file.getvalue()

    table = {
        "image": [encoded(i) for i in range(total + 3)],
        "label": [names[i % 10] for i in range(total + 3)],
    }
    pq.write_table(pa.table(table), tmp_path / "pictures.parquet")
    for _ in range(2):  # decoded, then from the cache
        made = paper["photographs"].open_photographs(
            scale, tmp_path / "pictures.parquet", tmp_path / "cache"
        )
        seen = [
            int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])
            for part in (made.database, made.trained, made.held_out)
            for image in part.images
        ]
        assert seen == list(range(total))
        assert made.held_out.labels[0] == (scale.database + scale.trained) % 10


def test_crops_are_squares_of_their_pictures(paper):
    grid = torch.arange(32 * 32).view(1, 1, 32, 32).expand(5, 3, 32, 32)
    found = paper["photographs"].crops(grid, 8)
    assert found.shape == (5, 3, 8, 8)
    first = found[:, :, :1, :1]
    assert torch.equal(found - first, grid[:, :, :8, :8])
    assert len(first[:, 0].unique()) > 1


def test_no_picture_is_its_own_neighbor_where_own_rows_are_excluded(paper, toy):
    own = torch.arange(toy.scale.trained)
    for name, excluded in (("rdm own", False), ("rdm own excluded", True)):
        data = toy.trainer.data(paper["training_table"].TRAININGS[name])
        itself = (data.table == own[:, None]).any(1)
        assert bool(itself.any()) is not excluded
        assert excluded or bool(itself.all())


def test_a_smaller_and_a_swapped_database_hold_the_rows_they_are_named_after(paper, toy):
    training = paper["training_table"].TRAININGS["rdm"]
    labels = toy.trainer.embeddings.photographs.database.labels
    vehicles = toy.points.database(training, "vehicles")
    numbers = torch.tensor([r["number"] for r in vehicles.records(torch.arange(len(vehicles)))])
    assert set(labels[numbers].tolist()) <= set(paper["photographs"].numbers("vehicles").tolist())
    assert len(vehicles) == int(torch.isin(labels, paper["photographs"].numbers("vehicles")).sum())
    assert len(toy.points.database(training, "1k")) < len(
        toy.points.database(training, "everything")
    )


# --- a run ---------------------------------------------------------------------------------------


def test_a_toy_run_trains_measures_writes_and_draws(paper, tmp_path, monkeypatch):
    make, point, line = paper["studies"], paper["points"].Point, paper["studies"].line
    rdm = point("rdm", copies=True)
    lines = (
        line("modes", {
            "top": point("rdm", proposal="top 0.1", guidance=2.0),
            "uniform": point("rdm", proposal="uniform", database="vehicles", classes="vehicles"),
            "small": point("rdm", database="1k", k=8, copies=True),
            "crops": point("rdm crops8"),
            "others": point("rdm animals from vehicles", reference="animals", database="animals"),
        }),
        line("apart", {"D and X": rdm, "LDM": (point("ldm", copies=True), point("ldm", part=0))}),
    )  # fmt: skip
    panels = (
        make.Panel(make.FID, "bars", lines=("modes",), bars=True),
        make.Panel(("similarity_trained", "excess"), "bars", lines=("apart",), bars=True),
    )
    study = make.Study("a", "tried", "tried", "", lines, panels, make.ANCHORS)
    monkeypatch.setattr(paper["run"], "STUDIES", (study,))
    arguments = ["--scale", "toy", "--runs", str(tmp_path), "--threads", "1"]
    main = paper["run"].main
    main(["train", *arguments, "--trainings", "rdm"])
    main(["evaluate", *arguments])  # what is there; other points are left for later
    partly = paper["tables"].read_csv(tmp_path / "toy" / "tried.csv")
    assert {row["training"] for row in partly} == {"rdm", *paper["points"].REAL_PICTURES}
    main(["all", *arguments])
    rows = paper["tables"].read_csv(tmp_path / "toy" / "tried.csv")
    assert len(rows) == 8 + 2
    by_place = {row["at"]: row for row in rows}
    for name, row in by_place.items():
        assert row["n"] in (64, paper["scale"].SCALES["toy"].samples), name
        assert row["fid"] >= 0, name
        assert row["fid_error"] >= 0, name
        assert 0 <= row["precision"] <= 1, name
    assert by_place["top"]["guidance"] == 2
    assert by_place["small"]["k"] == 8
    assert 0 <= by_place["uniform"]["share_judged"] <= 1
    assert by_place["uniform"]["share_real"] > 0.5
    assert "similarity_neighbors" in by_place["small"]
    assert by_place["real photographs"]["fid"] < by_place["top"]["fid"]
    assert (tmp_path / "toy" / "tried.png").stat().st_size > 10_000
    sheets = list((tmp_path / "toy" / "points").glob("*/sheet.png"))
    assert len(sheets) == len({p.asked for p in study.points()})
    # Another run finds everything and changes nothing.
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "toy" / "points").rglob("*")}
    main(["evaluate", *arguments])
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "toy" / "points").rglob("*")}
    assert rows == paper["tables"].read_csv(tmp_path / "toy" / "tried.csv")


KILLED = """
import os, sys
sys.path.insert(0, {paper!r})
import training_table as trainings
look = trainings.Clock.look
def looks_and_dies(self, moment):
    look(self, moment)
    if moment.done == 3:
        os._exit(9)
trainings.Clock.look = looks_and_dies
from run import main
main(["train", "--scale", "toy", "--runs", {folder!r}, "--trainings", "rdm", "--threads", "1"])
"""


def test_a_training_that_was_killed_ends_with_the_same_weights(paper, tmp_path):
    from retrodiff.disk.tensors import map_file

    program = KILLED.format(paper=str(PAPER), folder=str(tmp_path / "killed"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    threads = torch.get_num_threads()
    weights = []
    for name in ("killed", "whole"):
        folder = tmp_path / name
        paper["run"].main(
            ["train", "--scale", "toy", "--runs", str(folder), "--trainings", "rdm", "--threads",
             "1"]
        )  # fmt: skip
        at = folder / "toy" / "trainings" / "rdm"
        assert (at / "done.txt").exists()
        weights.append(
            [map_file(f, again="").tensors for f in sorted(at.glob("step */*.safetensors"))]
        )
    torch.set_num_threads(threads)
    assert len(weights[0]) == len(weights[1]) >= 3
    for killed, whole in zip(*weights, strict=True):
        assert killed.keys() == whole.keys()
        assert all(torch.equal(killed[name], whole[name]) for name in killed)


def test_bars_of_the_text_modes_are_drawn_from_their_rows(paper, tmp_path, monkeypatch):
    modes = paper["text_modes"]
    trained = []

    def run(work, settings, seed):  # reports do not say of which seed they are
        trained.append(seed)
        shares = {mode: 0.5 + 0.1 * seed for mode in modes.MODES}
        unseen = {"before_they_are_in_D": shares, "after": shares}
        return SimpleNamespace(report={"n_per_mode": 504, "accuracy": shares, "unseen": unseen})

    monkeypatch.setattr(modes.digits, "run", run)
    for _ in range(2):  # what is there is not made again
        modes.train(tmp_path, seeds=(0, 1))
    assert trained == [0, 1]
    rows = modes.rows(tmp_path)
    assert len(rows) == 2 * 3 * 3
    assert {(row["seed"], row["share"]) for row in rows} == {(0, 0.5), (1, 0.6)}
    paper["tables"].write_csv(tmp_path / "f.csv", rows)
    read = paper["tables"].read_csv(tmp_path / "f.csv")
    assert paper["drawing"].draw_text("text", read, tmp_path / "f.png")
    assert not paper["drawing"].draw_text("text", [], tmp_path / "none.png")


def test_errors_join_sampling_and_trainings(paper):
    rows = [{"fid": 1.0, "fid_error": 0.3, "n": 10}, {"fid": 2.0, "fid_error": 0.5, "n": 10}]
    expected = ((0.09 + 0.25) / 2 + 0.5) ** 0.5
    assert paper["drawing"].error_of("fid", rows) == pytest.approx(expected)
    share = [{"near_trained": 0.2, "n": 100.0}]
    assert paper["drawing"].error_of("near_trained", share) == pytest.approx(0.04)


def test_a_page_shows_what_is_measured_and_says_what_is_not(paper, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n<!-- study:a -->\n<!-- /study -->\n\nmine\n\n<!-- study:f -->\nx\n<!-- /study -->\n"
    )
    (a, f) = (s for s in paper["studies"].STUDIES if s.letter in "af")
    rows = [
        {"line": "LDM", "at": "", "seed": seed, "steps": 10, "fid": 1.0 + seed, "fid_error": 0,
         "precision": 0.5, "precision_error": 0.1, "recall": 0.25, "recall_error": 0, "n": 7,
         "reference_n": 9}
        for seed in (0, 1)
    ]  # fmt: skip
    paper["tables"].write_csv(tmp_path / f"{a.name}.csv", rows)
    write = paper["report"].write_tables
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{a.name}.png").touch()
    write(page, (a, f), tmp_path, tmp_path / "images")
    once = page.read_text()
    assert "| LDM, 10 steps | 2 | 1.5 ± 0.71 | 0.5 ± 0.1 | 0.25 |" in once
    assert "7 samples against 9" in once
    assert f"![{a.title}](images/{a.name}.png)" in once
    assert once.count("Not measured yet.") == 1
    assert "\nmine\n" in once
    write(page, (a, f), tmp_path, tmp_path / "images")
    assert page.read_text() == once


def test_wrong_names_are_refused(paper, capsys):
    for arguments in (["train", "--trainings", "none"], ["plot", "--only", "z"]):
        with pytest.raises(SystemExit):
            paper["run"].main(arguments)
    said = capsys.readouterr().err
    assert "--trainings 'none'" in said
    assert "--only z" in said
