"""The page without a browser: pins, databases, the studio, what is shown, what is downloaded."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from parts import HashingEncoder, small_recipe
from PIL import Image

from retrodiff.bridges.credited import read_credit
from retrodiff.cli import main
from retrodiff.databases import ArrayDatabase
from retrodiff.interfaces import Query
from retrodiff.model import Estimate
from retrodiff.pictures import to_float
from retrodiff.retrieval import NearestNeighbors, Pinned, Uniform
from retrodiff.serving import ServerLimits
from retrodiff.testing import check_retriever, small_database
from retrodiff.ui import LIMITS, Question, Shelf, Shelves, Studio
from retrodiff.ui.cards import Thumbnails, heat_maps, message_html, neighbors_html, samples_html
from retrodiff.ui.layout import Marks, Page
from retrodiff.ui.provenance import archive, credited_files
from retrodiff.ui.question import read_shares

ENCODER = HashingEncoder(8)
NASTY = "<img src=x onerror=alert(1)>.png"


def pictured(rows: int, seed: int, **more: str) -> ArrayDatabase:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (rows, 3, 8, 8), generator=generator, dtype=torch.uint8)
    records = [
        {"file": f"{seed}/{i}.png", "license": ["CC0", "MIT"][i % 2], "number": i, **more}
        for i in range(rows)
    ]
    records[0]["file"] = NASTY
    embeddings = ENCODER.encode_image(to_float(images))
    return ArrayDatabase(embeddings, ENCODER.fingerprint, records, images=images)


@pytest.fixture(scope="module")
def art():
    return pictured(30, 1)


@pytest.fixture(scope="module")
def photos():
    return pictured(20, 2, place="here")


@pytest.fixture(scope="module")
def studio(art, photos):
    model = small_recipe(ENCODER, art).proposal(Uniform()).build()
    shelves = Shelves([Shelf("art", art), Shelf("photos", photos, chosen=False)])
    return Studio(model, shelves, "small")


def asked(**changes) -> Question:
    return Question(**{"prompt": "a bell", "names": ("art",), "n": 2, **changes})


def png(side: int = 16) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 40)).save(out, "PNG")
    return out.getvalue()


# --- core parts that the page needs ---------------------------------------------------------------


def test_pinned_is_a_retriever_like_any_other():
    check_retriever(Pinned(NearestNeighbors(), (3, 5), (7,)))
    check_retriever(Pinned(NearestNeighbors()))
    check_retriever(Pinned(NearestNeighbors(), (3, 5, 7)))


def test_pinned_rows_come_first_and_those_left_out_never():
    database = small_database(rows=40)
    query = Query(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
    plain = database.search(query, 40).indices
    found = Pinned(NearestNeighbors(), (9, 4), (2, 11, 30)).retrieve(query, database, 6).indices
    for mine, ranked in zip(found.tolist(), plain.tolist(), strict=True):
        rest = [row for row in ranked if row not in (9, 4, 2, 11, 30)]
        assert mine == [9, 4, *rest[:4]]


@pytest.mark.parametrize(
    ("rows", "without", "k", "said"),
    [
        ((1, 2, 3), (), 2, "3 rows are pinned, but k=2"),
        ((40,), (), 2, "row 40 is pinned or left out, but the database has 40 rows"),
        ((), tuple(range(39)), 2, "only 1 of the database's 40 rows"),
    ],
)
def test_pinned_says_what_does_not_fit(rows, without, k, said):
    query = Query(torch.ones(1, 8))
    with pytest.raises(ValueError, match=said):
        Pinned(NearestNeighbors(), rows, without).retrieve(query, small_database(rows=40), k)


def test_pinned_refuses_a_row_named_twice():
    with pytest.raises(ValueError, match="names row 3 twice"):
        Pinned(NearestNeighbors(), (3,), (3,))


def test_on_step_sees_the_estimates_and_ends_a_sampling(model):
    model = model.replace(proposal=Uniform())
    seen: list[Estimate] = []
    out = model.sample(n=3, steps=4, batch_size=2, on_step=seen.append)
    assert [(e.rows, e.step, e.steps) for e in seen] == [
        *[([0, 1], step, 4) for step in (1, 2, 3, 4)],
        *[([2], step, 4) for step in (1, 2, 3, 4)],
    ]
    assert seen[0].images().shape == (2, *out.images.shape[1:])
    # The last step of a sampler that ends at sigma 0 is its estimate there.
    assert torch.allclose(seen[3].latents, out.latents[:2], atol=1e-5)

    def stop(estimate: Estimate) -> None:
        raise RuntimeError(f"stopped after {estimate.step}")

    with pytest.raises(RuntimeError, match="stopped after 1"):
        model.sample(n=1, on_step=stop)


# --- databases ------------------------------------------------------------------------------------


def test_shelves_open_one_or_several_with_shares_and_filters(art, photos):
    shelves = Shelves([Shelf("art", art), Shelf("photos", photos, chosen=False)])
    assert shelves.first == ("art",)
    assert shelves.open(["art"]) is art
    both = shelves.open(["photos", "art"], (3, 1))
    assert len(both) == 50
    assert both.shares(4) == [3, 1]
    assert shelves.open(["photos", "art"], (3, 1)) is both
    assert len(shelves.open(["art", "photos"], where="number < 5")) == 10
    # A column that only one of them knows.
    only = shelves.open(["art", "photos"], (1, 1), "place == 'here' and number < 5")
    assert len(only) == 5
    assert {record["file"].split("/")[0] for record in only.records([1, 2])} == {"2"}


def test_the_whole_stands_for_its_parts(art):
    parts = [Shelf(x, art.where(f"license == '{x}'")) for x in ("CC0", "MIT")]
    shelves = Shelves(parts, whole=art)
    assert shelves.open(["MIT", "CC0"]) is art
    assert len(shelves.open(["MIT"])) == 15


@pytest.mark.parametrize(
    ("names", "shares", "where", "said"),
    [
        ([], None, "", "no database is chosen"),
        (["cars"], None, "", "there is no database 'cars', only art"),
        (["art"], (1, 2), "", "1 databases are chosen .art., but 2 shares"),
        (["art"], None, "number ==", "cannot read the filter"),
        (["art"], None, "colour == 1", "unknown column 'colour'"),
        (["art"], None, "number > 999", "no row of art meets number > 999"),
    ],
)
def test_shelves_say_what_does_not_fit(art, names, shares, where, said):
    with pytest.raises(ValueError, match=said):
        Shelves([Shelf("art", art)]).open(names, shares, where)


def test_shelves_refuse_other_encoders_and_equal_names(art):
    with pytest.raises(ValueError, match="disagree: weights"):
        Shelves([Shelf("a", art), Shelf("b", small_database(seed=3))])
    with pytest.raises(ValueError, match="two databases are called a"):
        Shelves([Shelf("a", art), Shelf("a", art)])


@pytest.mark.parametrize(("text", "read"), [("", None), (" 3, 1 ", (3, 1)), ("2:1", (2, 1))])
def test_shares_are_read(text, read):
    assert read_shares(text) == read


def test_shares_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="shares 'many' are no numbers"):
        read_shares("many")


# --- the studio -----------------------------------------------------------------------------------


def last(studio, question):
    *_, end = studio.samples(question)
    return end.done


def test_what_is_shown_as_used_is_what_conditions_the_samples(studio):
    for mode in ("text+neighbors", "neighbors"):
        question = asked(mode=mode, k=4, pinned=(3,), dropped=(1,))
        used = studio.neighbors(question).used
        out = last(studio, question)
        for row in out.neighbors.indices.tolist():
            assert [r for r in row if r >= 0] == used.indices[0].tolist()
        assert used.indices[0, 0] == 3
        assert 1 not in used.indices[0].tolist()


def test_samples_are_those_of_the_model(studio, art):
    out = last(studio, asked(seed=5, steps=2))
    same = studio.model.sample(prompts=["a bell"] * 2, seed=5, steps=2)
    assert torch.equal(out.images, same.images)


def test_further_neighbors_are_the_next_nearest(studio, art):
    found = studio.neighbors(asked(k=3, mode="neighbors"))
    rows = found.used.indices[0].tolist() + found.further.indices[0].tolist()
    query = Query(ENCODER.encode_text(["a bell"]))
    assert rows == art.search(query, 12).indices[0].tolist()
    assert found.further.records[0][0]["file"]


def test_samples_form_step_by_step(studio):
    seen = list(studio.samples(asked(steps=10)))
    assert [f.done is None for f in seen] == [True] * (len(seen) - 1) + [False]
    assert seen[-1].step == 10
    assert all(f.images.shape == seen[-1].images.shape for f in seen)


def test_who_leaves_ends_the_sampling(studio):
    run = studio.samples(asked(steps=200))
    next(run)
    run.close()  # joins the thread
    assert last(studio, asked(steps=1)) is not None


def test_a_picture_is_asked_with_in_place_of_words(studio):
    embedding, small = studio.picture(png())
    assert small.startswith(b"\x89PNG")
    found = studio.neighbors(asked(picture=embedding, mode="neighbors"))
    direct = studio.model.database.search(Query(embedding), 4)
    assert found.used.indices.tolist() == direct.indices.tolist()
    out = last(studio, asked(picture=embedding, mode="neighbors"))
    assert out.query.source == ("a picture",) * 2


def test_unconditional_samples_have_rows_of_their_own(studio):
    out = last(studio, asked(prompt="", mode="unconditional", n=3, names=("photos",)))
    assert len(out) == 3
    assert int(out.neighbors.indices.max()) < 20


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": ""}, "there is nothing to ask"),
        ({"prompt": "x" * 501}, "the prompt has 501 characters"),
        ({"n": 17}, "number of samples=17"),
        ({"steps": 10**6}, "steps=1000000"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"k": 33}, "k=33"),
        ({"mode": "class"}, "cannot be asked in mode 'class'"),
        ({"sampler": "magic"}, "unknown sampler 'magic'"),
        ({"where": "license == 'GPL'"}, "no row of art"),
        ({"pinned": (1, 2, 3, 4, 5)}, "5 rows are pinned, but k=3"),
    ],
)
def test_questions_that_do_not_fit_are_refused_in_a_line(studio, changes, said):
    with pytest.raises(ValueError, match=said) as refused:
        list(studio.samples(asked(**changes)))
    assert "\n" not in str(refused.value)


def test_pictures_are_bounded_and_decoded_safely(studio):
    tight = Studio(studio.model, studio.shelves, limits=replace(LIMITS, upload=100))
    with pytest.raises(ValueError, match=r"more than 0\.0001 MB"):
        tight.picture(b"x" * 101)
    with pytest.raises(ValueError, match="the picture cannot be read"):
        studio.picture(b"no picture at all")
    bomb = bytearray(png())
    bomb[16:24] = (60_000).to_bytes(4) * 2  # the header claims 3.6 billion pixels
    with pytest.raises(ValueError, match="the picture cannot be read"):
        studio.picture(bytes(bomb))


def test_a_model_and_databases_of_other_encoders_are_refused(studio):
    with pytest.raises(ValueError, match="model and databases disagree: weights"):
        Studio(studio.model, Shelves([Shelf("b", small_database(seed=3))]))


def test_attribution_is_recorded_where_rows_condition(studio):
    assert studio.attributed
    assert last(studio, asked()).attribution is not None
    assert last(studio, asked(mode="text")).attribution is None
    assert last(studio, asked(mode="text+neighbors", k=1)).attribution is None


# --- what is shown and downloaded -----------------------------------------------------------------


def test_cards_show_records_as_text(studio):
    question = asked(pinned=(0,), mode="neighbors")
    found = studio.neighbors(question)
    html = neighbors_html(found, Thumbnails(), pinned=(0,), dropped=(1,))
    assert "<img src=x" not in html
    assert "&lt;img src=x onerror=alert(1)&gt;.png" in html
    assert 'data-act="pin" data-row="0" aria-pressed="true"' in html
    assert html.count('data-act="drop"') == 12
    assert "1 left out: take back" in html
    assert "MIT" in html
    assert "CC0" in html
    assert "<b>" not in message_html("<b>")


def test_rows_without_pictures_have_cards(studio):
    bare = small_database(rows=5)
    model = small_recipe(ENCODER, bare).build()
    found = Studio(model, Shelves([Shelf("bare", bare)])).neighbors(asked(names=("bare",)))
    assert neighbors_html(found, Thumbnails()).count("no picture") == 5


def test_heat_maps_follow_the_shares(studio):
    out = last(studio, asked(mode="neighbors", k=3))
    maps = heat_maps(out.attribution, 0)
    assert sorted(maps) == [0, 1, 2]
    assert sum(share for _, share in maps.values()) == pytest.approx(1, abs=1e-3)
    grid = out.attribution.grid[0]
    for j, (uri, _) in maps.items():
        alpha = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).getchannel("A")
        shown = torch.from_numpy(np.array(alpha)).float().view(grid[j].shape)
        order = grid[j].flatten().argsort()
        assert bool((shown.flatten()[order].diff() >= 0).all())
    assert max(torch.tensor([s for _, s in maps.values()])) > 0


def test_downloads_carry_what_they_were_made_from(studio, tmp_path):
    out = last(studio, asked(mode="neighbors", k=3, seed=9))
    files = credited_files(out, "a bell", {"name": "retrodiff, small"})
    assert [file.name for file in files] == ["a-bell-seed9-0.png", "a-bell-seed9-1.png"]
    (tmp_path / files[1].name).write_bytes(files[1].png)
    credit = read_credit(tmp_path / files[1].name)
    assert credit["prompt"] == "a bell"
    assert credit["same_pixels"]
    assert credit["made_by"]["seed"] == 9
    assert credit["made_by"]["name"] == "retrodiff, small"
    assert [r["row"] for r in credit["references"]] == out.neighbors.indices[1].tolist()
    assert sum(r["share"] for r in credit["references"]) == pytest.approx(1, abs=1e-3)
    assert credit["references"][0]["record"]["license"] in ("CC0", "MIT")
    name, about = files[1].sidecar
    assert name == files[1].name + ".json"
    assert json.loads(about)["references"] == credit["references"]
    with zipfile.ZipFile(io.BytesIO(archive(files))) as packed:
        assert packed.namelist() == [n for f in files for n in (f.name, f.sidecar[0])]
    html = samples_html(list(studio.samples(asked()))[-1], "Samples", Thumbnails(), files)
    assert html.count("download=") == 5


# --- callbacks of the page ------------------------------------------------------------------------


def values(**changes) -> list:
    base = {
        "prompt": "a bell", "picture": None, "names": ["art"], "shares": "", "where": "",
        "mode": "neighbors", "k": 4, "guidance": 2.0, "steps": 2, "sampler": "", "seed": 0, "n": 2,
    }  # fmt: skip
    return list({**base, **changes}.values())


def test_marks_hold_for_the_databases_that_they_were_made_in(studio):
    pytest.importorskip("gradio")
    page = Page(studio)
    *_, marks = page.search(Marks(), False, [], "", *values())
    marks = page.mark({"act": "pin", "row": 3}, marks)
    marks = page.mark({"act": "drop", "row": 5}, marks)
    first, second, message, marks = page.search(marks, True, ["photos"], "", *values())
    assert (marks.pinned, marks.dropped) == ((3,), (5,))
    assert "Neighbors: art" in first
    assert "Neighbors: photos" in second
    assert "data-act" not in second
    assert "rd-error" not in message
    assert page.mark({"act": "pin", "row": 3}, marks).pinned == ()
    assert page.mark({"act": "back", "row": -1}, marks).dropped == ()
    assert page.mark({"act": "burn", "row": "3"}, marks) == marks
    *_, marks = page.search(marks, False, [], "", *values(names=["photos"]))
    assert (marks.pinned, marks.dropped) == ((), ())


def test_errors_are_one_line_on_the_page(studio, monkeypatch):
    pytest.importorskip("gradio")
    page = Page(studio)
    *_, message, _ = page.search(Marks(), False, [], "", *values(where="number =="))
    assert "rd-error" in message
    assert "cannot read the filter" in message.lower()
    *_, (_, _, message) = page.sample(Marks(), False, [], "", *values(prompt=""))
    assert "There is nothing to ask" in message

    def broken(question):
        raise KeyError("secret")

    monkeypatch.setattr(studio, "neighbors", broken)
    *_, message, _ = page.search(Marks(), False, [], "", *values())
    assert "secret" not in message
    assert "The page failed to answer" in message


def test_two_databases_are_sampled_with_one_seed(studio):
    pytest.importorskip("gradio")
    *_, (first, second, message) = Page(studio).sample(
        Marks(), True, ["photos"], "number < 9", *values()
    )
    assert "Samples: art" in first
    assert "Samples: photos where number &lt; 9" in second
    assert first.count('class="rd-sample"') == second.count('class="rd-sample"') == 2
    assert "rd-error" not in message


def test_pictures_that_arrive_damaged_are_refused(studio):
    page = Page(studio)
    good = "data:image/png;base64," + base64.b64encode(png()).decode()
    embedding, shown, message = page.picture({"data": good})
    assert embedding.shape == (1, 8)
    assert "Remove the picture" in shown
    assert page.picture({"data": ""})[0] is None
    for event in ({"data": good[:-9] + "!"}, {"data": "data:,abcd"}, {"problem": "too large"}):
        embedding, _, message = page.picture(event)
        assert embedding is None
        assert "rd-error" in message


# --- the command ----------------------------------------------------------------------------------


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert main(["ui"]) == 2
    said = capsys.readouterr().err
    assert said == 'retrodiff: the page needs gradio: pip install "retrodiff[ui]"\n'


def test_limits_of_the_page_hold_a_picture_in_base64():
    assert isinstance(LIMITS, ServerLimits)
    assert LIMITS.body > LIMITS.upload * 4 / 3
