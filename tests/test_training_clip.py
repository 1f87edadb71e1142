"""A small CLIP from captions and teachers: what is right for what, unknown words, files, resume."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from retrodiff.cli import main
from retrodiff.encoders import CLIPEncoder, load_encoder, save_encoder
from retrodiff.encoders.vocabulary import clip_tokenizer
from retrodiff.evaluation import text_recall
from retrodiff.training import ShiftScaleColor, Teachers, fit_clip
from retrodiff.training.captioned import read_captioned
from retrodiff.training.phrasings import Phrasings
from retrodiff.training.teacher_files import teacher_images, teacher_texts

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 8, "vocab_size": 700, "width": 32, "heads": 2, "layers": 1},
}
COLORS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "gray": (0, 0, 0)}


def encoder(seed=0) -> CLIPEncoder:
    torch.manual_seed(seed)
    return CLIPEncoder.from_config(TINY)


def colored(n=64) -> tuple[torch.Tensor, list[str]]:
    """Noisy images of one color each, and its name."""
    names = [list(COLORS)[i % 4] for i in range(n)]
    images = torch.tensor([COLORS[name] for name in names])[:, :, None, None].expand(-1, -1, 8, 8)
    noise = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (0.8 * images + 0.1 * noise).clamp(-1, 1), names


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [514, 700, 6144])
def test_a_smaller_vocabulary_is_the_start_of_clips(size):
    whole, small = open_clip.SimpleTokenizer(context_length=40), clip_tokenizer(size, 40)
    assert small.vocab_size == size
    assert list(small.encoder)[: size - 2] == list(whole.encoder)[: size - 2]
    text = "a kangaroo wearing sunglasses, é 猫!"
    tokens = small([text])[0]
    assert int(tokens.max()) == int(tokens[tokens > 0][-1]) == size - 1  # what CLIP's text pools
    assert small.decode(small.encode(text)) == whole.decode(whole.encode(text))
    assert len(small.encode(text)) >= len(whole.encode(text))


def test_vocabularies_that_cannot_spell():
    with pytest.raises(ValueError, match="vocab_size=513 is less than the 514 tokens"):
        CLIPEncoder.from_config({**TINY, "text_cfg": {**TINY["text_cfg"], "vocab_size": 513}})
    assert torch.equal(clip_tokenizer(49408, 9)(["hi"]), open_clip.SimpleTokenizer()(["hi"], 9))


# --- what is right -------------------------------------------------------------------------------


def test_texts_of_several_images_are_right_for_all_of_them():
    captions = [["apple", "fruit"], "car", ["fruit", "pear"], ["apple", "fruit"]]
    phrasings = Phrasings(captions, 4)
    assert phrasings.texts == ["apple", "fruit", "car", "pear"]
    rows, texts = torch.tensor([0, 1, 2, 3]), torch.arange(4)
    expected = [
        [t in c if isinstance(c, list) else t == c for t in phrasings.texts] for c in captions
    ]
    assert phrasings.match(rows, texts).tolist() == expected
    chosen = phrasings.choose(torch.tensor([0, 2] * 200), torch.Generator().manual_seed(0))
    assert set(chosen[::2].tolist()) == {0, 1}
    assert set(chosen[1::2].tolist()) == {1, 3}
    assert 60 < int((chosen[::2] == 0).sum()) < 140


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ("red", "captions is one text"),
        (["red"], "2 images and 1 captions"),
        (["red", []], r"captions\[1\] is empty"),
        (["red", ["blue", 3]], r"captions\[1\]\[1\] is int"),
    ],
)
def test_captions_that_do_not_fit(captions, message):
    with pytest.raises(ValueError, match=message):
        Phrasings(captions, 2)


def test_recall_counts_as_by_hand():
    g = torch.Generator().manual_seed(0)
    texts, images = torch.randn(7, 5, generator=g), torch.randn(30, 5, generator=g)
    right = torch.rand(7, 30, generator=g) < 0.15
    right[:, 3] = True
    expected = {}
    for k in (1, 5, 40):
        hits = 0
        for t in range(7):
            scores = [float(torch.cosine_similarity(texts[t], one, dim=0)) for one in images]
            best = sorted(range(30), key=lambda i: -scores[i])[:k]
            hits += any(bool(right[t, i]) for i in best)
        expected[k] = hits / 7
    assert text_recall(texts, images, right, (1, 5, 40)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no picture is right for text 2"):
        text_recall(texts, images, right & (torch.arange(7) != 2)[:, None])
    with pytest.raises(ValueError, match=r"right has shape \(7, 29\)"):
        text_recall(texts, images, right[:, :29])


# --- training ------------------------------------------------------------------------------------


def teachers(names: list[str], images: torch.Tensor) -> Teachers:
    """A text teacher that knows synonyms, an image teacher that knows brightness."""
    synonyms = {"crimson": "red", "leafy": "green", "navy": "blue", "ashen": "gray"}
    texts = [*COLORS, *synonyms]
    of = [list(COLORS).index(synonyms.get(text, text)) for text in texts]
    features = torch.eye(4)[of] + 0.01 * torch.arange(8)[:, None]
    bright = images.mean((1, 2, 3))[:, None] + torch.tensor([[0.0, 1.0]])
    return Teachers(images=bright, texts=texts, text_features=features, texts_per_step=16)


def test_a_text_teacher_makes_words_known_that_no_caption_has():
    images, names = colored()
    words = ["crimson", "leafy", "navy", "ashen"]
    right = torch.tensor([[name == color for name in names] for color in COLORS])
    found = {}
    for taught in (True, False):
        clip = encoder()
        fit_clip(
            clip,
            images,
            [[name, f"a {name} one"] for name in names],
            steps=60,
            batch_size=16,
            lr=3e-3,
            augment=ShiftScaleColor(color=0.0),
            teachers=teachers(names, images) if taught else None,
            ema=0.8,
            progress=False,
        )
        seen, unseen = clip.encode_image(images), clip.encode_text(words)
        assert text_recall(clip.encode_text(list(COLORS)), seen, right, (1,))[1] == 1.0
        found[taught] = text_recall(unseen, seen, right, (1,))[1]
    assert found[True] == 1.0 > found[False]


def test_an_image_teacher_keeps_what_captions_leave_out():
    """Every picture has the same caption: only the teacher tells them apart."""
    images, _ = colored()
    target = images.mean((2, 3))
    errors = {}
    for weight in (0.0, 1.0):
        clip = encoder()
        fit_clip(
            clip,
            images,
            ["thing"] * len(images),
            steps=60,
            batch_size=16,
            lr=3e-3,
            teachers=Teachers(images=target, image_weight=weight),
            progress=False,
        )
        x = torch.nn.functional.normalize(clip.encode_image(images)).double()
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        penalty = 1e-3 * torch.eye(x.shape[1])
        fitted = x @ torch.linalg.solve(x.T @ x + penalty, x.T @ target.double())
        errors[weight] = float((fitted - target).square().mean() / target.var())
    assert errors[1.0] < 0.5 * errors[0.0]


def test_a_resumed_training_ends_with_the_same_weights(tmp_path):
    images, names = colored(16)

    def trained(steps: int, name: str, **more) -> CLIPEncoder:
        clip = encoder()
        about = {"lr": 1e-3, "batch_size": 8, "progress": False, "ema": 0.5, **more}
        known = teachers(names, images)
        fit_clip(
            clip, images, names, steps=steps, checkpoint=tmp_path / name, teachers=known, **about
        )
        return clip

    at_once = trained(6, "once")
    trained(3, "twice")
    resumed = trained(6, "twice", resume=True)
    for one, other in zip(at_once.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    clip = encoder()
    with pytest.raises(ValueError, match="captions"):
        fit_clip(
            clip, images, names[::-1], steps=9, batch_size=8, lr=1e-3, ema=0.5, progress=False,
            checkpoint=tmp_path / "twice", resume=True, teachers=teachers(names, images),
        )  # fmt: skip


def test_teachers_that_do_not_fit():
    images, names = colored(8)
    with pytest.raises(ValueError, match="3 texts, but 0 rows of text_features"):
        Teachers(texts=["a", "b", "c"])
    with pytest.raises(ValueError, match="row 1 of the teacher's images is not finite"):
        Teachers(images=torch.tensor([[1.0], [float("nan")]]))
    known = Teachers(images=torch.randn(7, 2))
    with pytest.raises(ValueError, match="8 images and 7 rows of the teacher's features"):
        fit_clip(encoder(), images, names, steps=1, batch_size=2, lr=1e-3, teachers=known)


def test_augmented_pictures_stay_pictures():
    images, _ = colored(8)
    g = torch.Generator().manual_seed(0)
    changed = ShiftScaleColor(shift=0.2, scale=0.3, color=0.3, flip=True)(images, g)
    assert changed.shape == images.shape
    assert float(changed.abs().max()) <= 1
    assert not torch.equal(changed, images)
    same = ShiftScaleColor(shift=0, scale=0, color=0)(images, g)
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)
    white = torch.ones(2, 3, 8, 8)
    assert float(ShiftScaleColor(color=0)(white, g).min()) == pytest.approx(1)  # the border repeats
    ramp = torch.linspace(-1, 1, 8).expand(64, 3, 8, 8)
    mirrored = ShiftScaleColor(shift=0, scale=0, color=0, flip=True)(ramp, g)
    backwards = (mirrored[:, 0, 0, 0] > 0).float().mean()
    assert 0.3 < float(backwards) < 0.7


def test_weights_are_kept_in_a_narrower_type(tmp_path):
    clip = encoder()
    save_encoder(clip, tmp_path / "half", dtype=torch.float16)
    save_encoder(clip, tmp_path / "full")
    size = [(tmp_path / name / "encoder.safetensors").stat().st_size for name in ("half", "full")]
    assert size[0] < 0.6 * size[1]
    loaded = load_encoder(tmp_path / "half")
    assert loaded.encode_text(["red"]).dtype == torch.float32
    torch.testing.assert_close(
        loaded.encode_text(["red"]), clip.encode_text(["red"]), atol=1e-2, rtol=1e-2
    )
    with torch.no_grad():
        clip.model.text_projection[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"text_projection has values too large.*bfloat16"):
        save_encoder(clip, tmp_path / "other", dtype=torch.float16)


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Forty pictures of four colors, all but the last two with captions."""
    images, names = colored(40)
    home = tmp_path / "pictures"
    home.mkdir()
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        pixels = ((image + 1) * 127.5).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((16, 16)).save(home / f"{i:02}.png")
        if i < 38:
            (home / f"{i:02}.txt").write_text(f"{name}\n\na  {name} square\n")
    return home


def test_captions_lie_beside_pictures(folder):
    with pytest.warns(UserWarning, match=r"^2 of 40 pictures have no caption.*38\.png, 39\.png$"):
        pairs = read_captioned(folder, ["txt"], 8, progress=False)
    assert pairs.images.shape == (38, 3, 8, 8)
    assert pairs.captions[1] == ["green", "a green square"]
    assert pairs.count == 78


def test_captions_stand_in_tables_and_columns(folder, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [{"file_name": f"{i:02}.png", "text": f"number {i}"} for i in range(40)]
    table = tmp_path / "captions.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "more.csv").write_text("file,caption\n03.png,three\n03.png,drei\n")
    pairs = read_captioned(folder, [str(table), str(tmp_path / "more.csv")], 8, progress=False)
    assert len(pairs) == 40
    assert pairs.captions[3] == ["number 3", "three", "drei"]

    content = [(folder / f"{i:02}.png").read_bytes() for i in range(3)]
    columns = {"image": content, "title": ["one", None, " "], "words": ["eins", "zwei", None]}
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    with pytest.warns(UserWarning, match="1 of 3 pictures have no caption"):
        pairs = read_captioned(tmp_path / "set.parquet", ["title", "words"], 8, progress=False)
    assert pairs.captions == [["one", "eins"], ["zwei"]]
    with pytest.raises(
        ValueError, match="no column 'captoin' with captions; columns: title, words"
    ):
        read_captioned(tmp_path / "set.parquet", ["captoin"], 8, progress=False)


def test_captions_that_cannot_be_found(folder, tmp_path):
    (tmp_path / "odd.csv").write_text("picture,caption\n1.png,one\n")
    (tmp_path / "odd.jsonl").write_text("[1]\n")
    (tmp_path / "other.csv").write_text("file,caption\nother.png,one\n")
    for place, message in (
        ("odd.csv", "row 1: none of the columns file, file_name"),
        ("odd.jsonl", "holds a line that is no object"),
        ("none.csv", "is missing: give a table of captions"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_captioned(folder, [str(tmp_path / place)], 8, progress=False)
    with pytest.raises(ValueError, match=r"none of 40 pictures has a caption in .*other\.csv"):
        read_captioned(folder, [str(tmp_path / "other.csv")], 8, progress=False)


def test_features_of_teachers_are_read_from_files(folder, tmp_path):
    with pytest.warns(UserWarning, match="no caption"):
        pairs = read_captioned(folder, ["txt"], 8, progress=False)
    features = torch.randn(38, 3)
    names = pairs.names[::-1]
    np.savez(tmp_path / "a.npz", features=features.numpy(), names=np.array(names))
    save_file({"features": features}, tmp_path / "a.safetensors", {"names": json.dumps(names)})
    for name in ("a.npz", "a.safetensors"):
        assert torch.equal(teacher_images(tmp_path / name, pairs), features.flip(0))
        assert teacher_texts(tmp_path / name)[0] == names
    every = torch.arange(78.0)[:, None]
    save_file({"features": every}, tmp_path / "b.safetensors")
    assert teacher_images(tmp_path / "b.safetensors", pairs)[:, 0].tolist() == pairs.numbers
    np.savez(tmp_path / "c.npz", features=features.numpy(), names=np.array([object()] * 38))
    for name, message in (
        ("c.npz", "cannot be read as npz"),
        ("none.npz", "is missing"),
        ("none.safetensors", "is missing"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            teacher_images(tmp_path / name, pairs)
    with pytest.raises(ValueError, match="has features, but no names"):
        teacher_texts(tmp_path / "b.safetensors")
    save_file({"features": every[:5]}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="has 5 rows, but there are 78 pictures"):
        teacher_images(tmp_path / "d.safetensors", pairs)
    named = {"names": json.dumps([f"{i}" for i in range(5)])}
    save_file({"features": every[:5]}, tmp_path / "e.safetensors", named)
    with pytest.raises(ValueError, match=r"no features of 38 pictures, 00\.png for example"):
        teacher_images(tmp_path / "e.safetensors", pairs)


def test_the_command_trains_and_reports(folder, tmp_path, capsys):
    texts = ["red", "scarlet", "green", "blue", "gray"]
    features = torch.eye(4)[[0, 0, 1, 2, 3]]
    save_file({"features": features}, tmp_path / "t.safetensors", {"names": json.dumps(texts)})
    command = ["train-encoder", str(folder), str(tmp_path / "out"), "--captions", "txt"]
    command += ["--size", "32", "--dim", "16", "--vocabulary", "600", "--held-out", "0.6"]
    command += ["--steps", "4", "--batch-size", "8"]
    command += ["--teacher-texts", str(tmp_path / "t.safetensors")]
    assert main(command) == 0
    said, told = capsys.readouterr()
    assert "2 of 40 pictures have no caption and are left out: 38.png, 39.png" in told
    assert "recall of 4 captions among 22 held-out images" in said
    assert "trained on 16 images with 8 captions for 4 steps" in said
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out"]
    loaded = load_encoder(tmp_path / "out")
    assert loaded.encode_text(["red"]).shape == (1, 16)
    assert main(command) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*command[:3], "--teacher-texts", "t.npz"]) == 2
    assert "need --captions" in capsys.readouterr().err


def test_the_command_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, capsys):
    from retrodiff.training import contrastive

    def command(name: str, *more: str) -> int:
        how = ["--captions", "txt", "--size", "32", "--vocabulary", "600", "--steps", "4"]
        how += ["--batch-size", "4", "--checkpoint-every", "1", *more]
        return main(["train-encoder", str(folder), str(tmp_path / name), *how])

    real = contrastive.pixels
    calls = []

    def stopped(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    assert command("once") == 0
    with monkeypatch.context() as patch:
        patch.setattr(contrastive, "pixels", stopped)
        assert command("twice") == 130
    assert (tmp_path / "twice.training.safetensors").is_file()
    assert command("twice", "--seed", "1", "--resume") == 2
    assert "belongs to a training with" in capsys.readouterr().err
    assert command("twice", "--resume") == 0
    content = [(tmp_path / n / "encoder.safetensors").read_bytes() for n in ("once", "twice")]
    assert content[0] == content[1]
    assert not (tmp_path / "twice.training.safetensors").exists()
