"""References are chosen, explained, credited; no pipeline is needed for that."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from parts import HashingEncoder
from PIL import Image, PngImagePlugin

from retrodiff.bridges import (
    ReferenceDatabase,
    ReferenceRetriever,
    caption_database,
    read_credit,
    references,
    save_credited,
)
from retrodiff.cli import main
from retrodiff.databases import ArrayDatabase, ImageFolder, Union, build_database, open_database
from retrodiff.encoders import CLIPEncoder
from retrodiff.interfaces import unit

ROWS = 30


@pytest.fixture
def encoder():
    return HashingEncoder()


@pytest.fixture
def database(encoder):
    """Pictures of 20 x 30 pixels; every second one is free, every third has a caption."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(ROWS, 3, 20, 30, generator=generator) * 2 - 1
    records = [
        {
            "file": f"{i}.png",
            "license": "CC0" if i % 2 else "none",
            "caption": f"thing {i}" if i % 3 == 0 else None,
        }
        for i in range(ROWS)
    ]
    embeddings = torch.randn(ROWS, encoder.dim, generator=generator)
    return ArrayDatabase(embeddings, encoder.fingerprint, records, images=images)


@pytest.fixture
def folder(tmp_path, encoder):
    """A database on disk whose pictures are files, with thumbnails."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        pixels = rng.integers(0, 255, (40, 40 + 20 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    source = ImageFolder(tmp_path / "pictures", columns={"license": "CC BY 4.0", "credit": "Jo"})
    build_database(tmp_path / "d.rdb", source, encoder, thumbnails=16, progress=False)
    return tmp_path


def rows(chosen):
    return [one.row for one in chosen.references]


def nearest(database, encoder, prompt, among=None):
    """Rows by float64 cosine."""
    asked = encoder.encode_text([prompt])[0].double()
    cosines = torch.nn.functional.cosine_similarity(
        database.embeddings(torch.arange(len(database))).double(), asked[None], dim=-1
    )
    order = cosines.argsort(descending=True).tolist()
    return [row for row in order if among is None or row in among], cosines


# --- what is chosen ------------------------------------------------------------------------------


def test_without_diversity_the_nearest_are_taken(database, encoder):
    retriever = ReferenceRetriever(encoder, diversity=0, copies=1)
    for prompt, chosen in zip("ab", retriever.choose(database, ["a", "b"], 4), strict=True):
        order, cosines = nearest(database, encoder, prompt)
        assert rows(chosen) == order[:4]
        assert [one.rank for one in chosen.references] == [1, 2, 3, 4]
        for one in chosen.references:
            assert one.similarity == pytest.approx(float(cosines[one.row]), abs=1e-5)
        expected = [database.image(row) for row in rows(chosen)]
        for picture, image in zip(chosen.images, expected, strict=True):
            assert np.array_equal(
                np.asarray(picture), ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            )


def test_a_filter_leaves_only_its_rows_numbered_as_before(database, encoder):
    retriever = ReferenceRetriever(encoder, diversity=0, copies=1)
    [chosen] = retriever.choose(database, "a", 5, where="license in ('CC0', 'CC BY 4.0')")
    free = set(range(1, ROWS, 2))
    assert rows(chosen) == nearest(database, encoder, "a", free)[0][:5]
    assert all(one.record["license"] == "CC0" for one in chosen.references)
    assert chosen.counts == (ROWS, ROWS // 2, ROWS // 2)


def test_diversity_by_the_formula(database, encoder):
    """Maximal marginal relevance in plain float64, on similarities of the pool's own spread."""
    diversity, k, n = 0.4, 5, 12
    retriever = ReferenceRetriever(encoder, diversity=diversity, copies=1, top=n)
    [chosen] = retriever.choose(database, "a", k)
    order, cosines = nearest(database, encoder, "a")
    pool = order[:n]
    vectors = unit(database.embeddings(torch.tensor(pool)).double())
    between = vectors @ vectors.T
    relevance = cosines[pool]
    off = between[~torch.eye(n, dtype=torch.bool)]
    relevance = relevance * off.std() / relevance.std()
    taken = [0]
    while len(taken) < k:
        score = (1 - diversity) * relevance - diversity * between[:, taken].amax(1)
        score[taken] = -math.inf
        taken.append(int(score.argmax()))
    assert rows(chosen) == [pool[i] for i in taken]
    assert rows(chosen) != pool[:k]


def test_more_diversity_gives_references_less_like_each_other(database, encoder):
    def likeness(diversity):
        [chosen] = ReferenceRetriever(encoder, diversity=diversity).choose(database, "a", 4)
        vectors = unit(chosen.embeddings)
        return float((vectors @ vectors.T).fill_diagonal_(0).mean())

    assert likeness(0.9) < likeness(0.0)


def test_near_copies_are_left_out_and_named(encoder):
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(6, 8, generator=generator)
    twice = torch.cat([plain, plain + 1e-3 * torch.randn(6, 8, generator=generator)])
    images = torch.zeros(12, 3, 4, 4)
    database = ArrayDatabase(twice, encoder.fingerprint, images=images)
    [chosen] = ReferenceRetriever(encoder, diversity=0).choose(database, "a", 6)
    assert len({row % 6 for row in rows(chosen)}) == 6
    assert any("a copy of" in line for line in chosen.left_out)
    assert "a copy of" in chosen.explain()
    with pytest.warns(UserWarning, match="6 of the 12 rows can be taken.*6 are copies of others"):
        [fewer] = ReferenceRetriever(encoder, diversity=0).choose(database, "a", 8)
    assert len(fewer) == 6


def test_pictures_too_small_or_of_the_wrong_shape_are_left_out(folder, encoder):
    database = open_database(folder / "d.rdb")
    with Image.open(folder / "pictures" / "3.png") as opened:
        assert database.size(3) == opened.size == (100, 40)
    retriever = ReferenceRetriever(encoder, copies=1, aspect=(1.4, 2.6), diversity=0)
    [chosen] = retriever.choose(database, "a", 3)
    assert sorted(rows(chosen)) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"none of the 6 rows can be taken.*lower min_side"):
        ReferenceRetriever(encoder, min_side=41).choose(database, "a", 1)


def test_columns_of_sizes_are_believed(encoder):
    records = [{"width": 100 * i, "height": 100} for i in range(1, 5)]
    database = ArrayDatabase(
        torch.randn(4, 8), encoder.fingerprint, records, images=torch.zeros(4, 3, 4, 4)
    )
    [chosen] = ReferenceRetriever(encoder, copies=1, aspect=(2, 9)).choose(database, "a", 3)
    assert sorted(rows(chosen)) == [1, 2, 3]


def test_several_phrasings_are_merged_by_rank(database, encoder):
    phrasings = ["a painting of {}", "{} at night"]
    retriever = ReferenceRetriever(encoder, diversity=0, copies=1, phrasings=phrasings)
    [chosen] = retriever.choose(database, "a", 5)
    score = dict.fromkeys(range(ROWS), 0.0)
    for text in ("a", "a painting of a", "a at night"):
        for rank, row in enumerate(nearest(database, encoder, text)[0], 1):
            score[row] += 1 / (60 + rank)
    assert rows(chosen) == sorted(score, key=lambda row: -score[row])[:5]


def test_captions_and_pictures_are_merged_by_rank(database, encoder):
    captions = caption_database(database, encoder, progress=False)
    assert len(captions) == ROWS // 3
    with_captions = ReferenceDatabase(database, captions)
    retriever = ReferenceRetriever(encoder, diversity=0, copies=1)
    [chosen] = retriever.choose(with_captions, "thing 9", 5)
    by_picture = nearest(database, encoder, "thing 9")[0]
    asked = encoder.encode_text(["thing 9"])[0]
    named = [row for row in range(ROWS) if row % 3 == 0]
    cosine = {
        row: float(torch.cosine_similarity(asked, encoder.encode_text([f"thing {row}"])[0], dim=0))
        for row in named
    }
    by_caption = sorted(named, key=lambda row: -cosine[row])
    by_caption += [row for row in by_picture if row not in named]
    score = dict.fromkeys(range(ROWS), 0.0)
    for order in (by_picture, by_caption):
        for rank, row in enumerate(order, 1):
            score[row] += 1 / (60 + rank)
    best = sorted(score, key=lambda row: -score[row])[:5]
    assert rows(chosen) == best
    assert by_caption[0] == 9
    assert best != by_picture[:5]


def test_captions_under_a_filter_and_on_disk(database, encoder, tmp_path):
    made = caption_database(database, encoder, folder=tmp_path / "c.rdb", progress=False)
    kept = open_database(tmp_path / "c.rdb")
    assert kept.fingerprint == made.fingerprint
    retriever = ReferenceRetriever(encoder, copies=1)
    both = ReferenceDatabase(database, kept)
    [chosen] = retriever.choose(both, "thing 9", 4, where="license == 'CC0'")
    assert all(row % 2 for row in rows(chosen))
    [captioned] = retriever.choose(both, "thing 9", 1, where="caption == 'thing 9'")
    assert rows(captioned) == [9]


def test_a_union_and_a_list_of_databases(database, encoder):
    retriever = ReferenceRetriever(encoder, diversity=0, copies=1)
    first = database.subset(torch.arange(10))
    second = database.subset(torch.arange(10, 20))
    [joined] = retriever.choose(Union(first, second), "a", 3)
    assert rows(joined) == nearest(database, encoder, "a", set(range(20)))[0][:3]
    one, other = retriever.choose([first, second], ["a", "a"], 2)
    assert rows(one) == nearest(database, encoder, "a", set(range(10)))[0][:2]
    assert [row + 10 for row in rows(other)] == nearest(database, encoder, "a", set(range(10, 20)))[
        0
    ][:2]


def test_explain_says_what_was_taken_and_why_not_more(database, encoder):
    [chosen] = ReferenceRetriever(encoder, min_side=1).choose(
        database, "a\x1b[2J", 2, where="license == 'CC0'"
    )
    text = chosen.explain()
    assert text.splitlines()[0].startswith("'a\\\\x1b[2J': 2 of 30 rows; license == 'CC0': 15 rows")
    assert f"1. {chosen.references[0].name}: similarity" in text
    assert "to the nearest reference above" in text


# --- files that are gone -------------------------------------------------------------------------


def test_originals_are_taken_and_thumbnails_only_with_a_warning(folder, encoder):
    database = open_database(folder / "d.rdb")
    retriever = ReferenceRetriever(encoder, copies=1)
    [chosen] = retriever.choose(database, "a", 6)
    for one, picture in zip(chosen.references, chosen.images, strict=True):
        with Image.open(folder / "pictures" / one.record["file"]) as original:
            assert np.array_equal(np.asarray(picture), np.asarray(original))
    gone = chosen.references[0].record["file"]
    (folder / "pictures" / gone).unlink()
    with pytest.warns(UserWarning, match=rf"{gone}: its thumbnail of 16 x \d+ pixels"):
        [again] = retriever.choose(database, "a", 6)
    assert not again.references[0].original
    assert max(again.images[0].size) == 16
    assert "thumbnail" in again.explain()
    with pytest.raises(FileNotFoundError, match=r"strict=True takes original files only"):
        ReferenceRetriever(encoder, copies=1, strict=True).choose(database, "a", 6)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, d: r.choose(d, "a", 2, where="license == 'MIT'"), "leaves none of the 30 rows"),
        (lambda r, d: r.choose(d, "a", 2, where="owner == 'Jo'"), "unknown column 'owner'"),
        (lambda r, d: r.choose([d], ["a", "b"], 2), "2 prompts, but 1 databases"),
        (lambda r, d: r.choose(d, [], 2), "prompts is empty"),
        (lambda r, d: r.choose(d, ["a", 3], 2), r"prompts\[1\] is int"),
        (lambda r, d: r.choose(d, "a", 0), "k=0"),
        (lambda r, d: ReferenceRetriever(HashingEncoder(seed=1)).choose(d, "a", 1), "disagree"),
        (lambda r, d: ReferenceRetriever(HashingEncoder(16)).choose(d, "a", 1), "dim=16"),
        (lambda r, d: ReferenceRetriever(r.encoder, diversity=2), "diversity=2"),
        (lambda r, d: ReferenceRetriever(r.encoder, aspect=(2, 1)), "must not exceed"),
        (lambda r, d: ReferenceRetriever(r.encoder, aspect=1.5), "least and the greatest"),
        (lambda r, d: ReferenceRetriever(r.encoder, phrasings=["night"]), "where the prompt goes"),
        (lambda r, d: ReferenceRetriever(torch.nn.Identity()), "places no text"),
        (lambda r, d: caption_database(d, r.encoder, "title"), "column='title' is unknown"),
        (lambda r, d: ReferenceDatabase(torch.zeros(3)), "has no pictures"),
    ],
)
def test_bad_input_is_one_line(database, encoder, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(ReferenceRetriever(encoder), database)
    assert "\n" not in str(caught.value)


def test_captions_of_another_database_are_refused(database, encoder):
    captions = caption_database(database, encoder, progress=False)
    with pytest.raises(ValueError, match="captions are of row 27"):
        ReferenceDatabase(database.subset(torch.arange(10)), captions)


def test_no_references_more_than_rows_that_differ(encoder):
    """A picture that points away from the prompt is taken all the same: the nearest is nearest."""
    away = -encoder.encode_text(["a"])
    database = ArrayDatabase(away, encoder.fingerprint, images=torch.zeros(1, 3, 4, 4))
    [chosen] = ReferenceRetriever(encoder).choose(database, "a", 1)
    assert chosen.references[0].similarity == pytest.approx(-1, abs=1e-3)


# --- kept retrievers -----------------------------------------------------------------------------


def tiny_clip():
    torch.manual_seed(0)
    config = {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 16,
            "layers": 1,
            "width": 16,
            "patch_size": 8,
            "head_width": 8,
        },
        "text_cfg": {"context_length": 64, "vocab_size": 514, "width": 16, "heads": 2, "layers": 1},
    }
    return CLIPEncoder.from_config(config)


def test_a_retriever_comes_back_from_its_folder(tmp_path):
    retriever = ReferenceRetriever(
        tiny_clip(), diversity=0.5, min_side=64, aspect=(0.5, math.inf), phrasings=["old {}"]
    )
    retriever.save_pretrained(tmp_path / "r")
    again = ReferenceRetriever.from_pretrained(str(tmp_path), subfolder="r", variant=None)
    assert repr(again) == repr(retriever)
    assert again.encoder.fingerprint == retriever.encoder.fingerprint
    with pytest.raises(FileExistsError):
        retriever.save_pretrained(tmp_path / "r")


def test_a_named_encoder_is_kept_by_its_name(tmp_path):
    retriever = ReferenceRetriever(CLIPEncoder("ViT-B-32-quickgelu", "openai"), top=7)
    folder = retriever.save_pretrained(tmp_path / "r")
    assert [file.name for file in folder.iterdir()] == ["reference_retriever.json"]
    again = ReferenceRetriever.from_pretrained(str(folder))
    assert again.top == 7
    assert again.encoder.identity == retriever.encoder.identity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": None}, "holds no settings"),
        ({"format": 9}, "newer than 1"),
        ({"settings": {"diversity": 7}}, "diversity=7"),
        ({"encoder": {"kind": "open_clip", "name": "hf-hub:evil/model"}}, "cannot be taken from a"),
    ],
)
def test_a_retriever_of_a_stranger_is_checked(tmp_path, change, message):
    ReferenceRetriever(CLIPEncoder("ViT-B-32-quickgelu", "openai")).save_pretrained(tmp_path / "r")
    file = tmp_path / "r" / "reference_retriever.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        ReferenceRetriever.from_pretrained(str(tmp_path / "r"))


def test_a_database_opens_as_diffusers_asks_for_it(folder):
    opened = ReferenceDatabase.from_pretrained(
        str(folder), subfolder="d.rdb", variant=None, revision=None, torch_dtype=torch.float16
    )
    assert len(opened) == 6


# --- credit --------------------------------------------------------------------------------------


@pytest.fixture
def chosen(folder, encoder):
    [chosen] = ReferenceRetriever(encoder, copies=1).choose(open_database(folder / "d.rdb"), "a", 2)
    return chosen


def credited(chosen, path):
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    return save_credited(image, path, chosen, {"name": "Painter", "steps": 3})


def test_a_picture_carries_its_references(chosen, tmp_path):
    path = credited(chosen, tmp_path / "a.png")
    with Image.open(path) as opened:
        inside = json.loads(opened.text["retrodiff"])
        assert np.array_equal(np.asarray(opened).ravel(), np.arange(192))
    beside = json.loads((tmp_path / "a.png.json").read_text())
    assert inside == beside
    found = read_credit(path)
    assert found["same_pixels"] is True
    assert found["source"] == "the picture"
    assert found["prompt"] == "a"
    assert found["made_by"] == {"name": "Painter", "steps": 3}
    assert [one["row"] for one in found["references"]] == rows(chosen)
    for one, reference in zip(found["references"], chosen.references, strict=True):
        assert one["similarity"] == reference.similarity
        assert one["record"] == dict(reference.record)
        assert one["record"]["license"] == "CC BY 4.0"
    assert str(tmp_path.parent) not in json.dumps(inside)


def test_the_file_beside_serves_where_the_chunk_is_lost(chosen, tmp_path):
    path = credited(chosen, tmp_path / "a.png")
    with Image.open(path) as opened:
        plain = Image.fromarray(np.asarray(opened))
    plain.save(path)
    assert read_credit(path)["source"] == "a.png.json"
    assert read_credit(path)["same_pixels"] is True
    plain.putpixel((0, 0), (255, 0, 0))
    plain.save(path)
    assert read_credit(path)["same_pixels"] is False


def test_the_command_prints_similarity_name_license_and_credit(chosen, tmp_path, capsys):
    path = credited(chosen, tmp_path / "a.png")
    assert main(["credit", str(path)]) == 0
    head, first, _ = capsys.readouterr().out.splitlines()
    assert head == f"{path}: 'a', made by Painter"
    one = chosen.references[0]
    assert first == f"  {one.similarity:.3f}  {one.record['file']}  CC BY 4.0  Jo"
    assert main(["credit", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "a"


def test_pictures_of_our_own_models_are_known_by_their_folder(model, tmp_path, capsys):
    model.sample(prompts=["a"], mode="neighbors", seed=0).save(tmp_path / "samples")
    assert main(["credit", str(tmp_path / "samples" / "00000.png")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("'a', made by retrodiff")
    assert len(out) == 1 + model.k


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds no list of references"),
        ('{"references": [{"row": 1}]}', "holds no list of references"),
        ('{"references": [], "format": 2}', "newer than 1"),
        ("[" * 5000, "nested too deep|not valid JSON"),
    ],
)
def test_a_damaged_text_is_one_line(tmp_path, chunk, message, capsys):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("retrodiff", chunk)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match=message):
        read_credit(tmp_path / "a.png")
    assert main(["credit", str(tmp_path / "a.png")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_strangers_text_moves_no_cursor(tmp_path, capsys):
    record = {"file": "\x1b[2Jx", "license": "\x1b]0;y\x07", "credit": "a\nb"}
    text = json.dumps({"prompt": "\x1b[1A", "references": [_reference(record)]})
    info = PngImagePlugin.PngInfo()
    info.add_itxt("retrodiff", text)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    assert main(["credit", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 2


def _reference(record):
    return {"row": 1, "similarity": 0.5, "record": record}


def test_a_picture_without_references_and_a_missing_one(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="carries no references"):
        read_credit(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_credit(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="is no picture"):
        read_credit(tmp_path / "c.png")
    with pytest.raises(ValueError, match="is a PNG file"):
        save_credited(Image.new("RGB", (2, 2)), tmp_path / "a.jpg", None)


def test_long_values_are_cut(encoder, tmp_path):
    record = {"file": "a.png", "text": "x" * 10**6}
    database = ArrayDatabase(
        torch.ones(1, 8), encoder.fingerprint, [record], images=torch.zeros(1, 3, 4, 4)
    )
    [chosen] = ReferenceRetriever(encoder).choose(database, "a", 1)
    path = credited(chosen, tmp_path / "a.png")
    assert len(read_credit(path)["references"][0]["record"]["text"]) == 2000


# --- any callable --------------------------------------------------------------------------------


class Painter:
    """Takes references as FLUX.2 does; the picture is the mean of their colors."""

    def __call__(self, image=None, prompt=None, generator=None, steps=1, output_type="pil"):
        means = [np.asarray(one).reshape(-1, 3).mean(0) for one in image]
        color = tuple(int(x) for x in np.mean(means, 0))
        self.seen = [*getattr(self, "seen", []), (prompt, generator, steps)]
        return ([Image.new("RGB", (4, 4), color)],)


def test_one_call_for_each_prompt_and_the_folder_it_is_saved_in(database, encoder, tmp_path):
    painter = Painter()
    out = references(painter, database, ["a", "b"], 2, retriever=encoder, generator=[1, 2], steps=7)
    assert painter.seen == [("a", 1, 7), ("b", 2, 7)]
    assert [one.prompt for one in out.chosen] == ["a", "b"]
    folder = out.save(tmp_path / "out")
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["00000.png", "00000.png.json", "00001.png", "00001.png.json", "pictures.json"]
    assert read_credit(folder / "00001.png")["prompt"] == "b"
    assert read_credit(folder / "00001.png")["made_by"] == {"name": "Painter", "steps": 7}
    with pytest.raises(FileExistsError, match="exists"):
        out.save(folder)
    out.save(folder, overwrite=True)


class NoImages:
    def __call__(self, prompt, ip_adapter_image_embeds=None): ...


class FromImage:
    def __call__(self, prompt, image, strength=0.8): ...


@pytest.mark.parametrize(
    ("pipeline", "options", "message"),
    [
        (NoImages(), {}, "NoImages takes no image=.*or ip_adapter"),
        (FromImage(), {}, "picture to start from"),
        (Painter(), {"output_type": "pt"}, "output_type='pt'"),
        (Painter(), {"image": []}, "image= is what references are"),
        (Painter(), {"generator": [1]}, "2 pictures, but 1 generators"),
        (Painter(), {"retriever": 3}, "retriever=int"),
    ],
)
def test_a_pipeline_that_takes_no_references_is_refused(
    database, encoder, pipeline, options, message
):
    with pytest.raises(ValueError, match=message):
        references(pipeline, database, ["a", "b"], 2, **{"retriever": encoder, **options})
