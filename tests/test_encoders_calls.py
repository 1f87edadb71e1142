"""What goes into encoders and comes out: kinds of images, prompts, devices, autocast, wrappers."""

import warnings

import numpy as np
import open_clip
import pytest
import torch
from parts import small_network
from PIL import Image

from retrodiff.databases import ArrayDatabase
from retrodiff.databases.build.encoding import encode_images, encode_pictures, preparation
from retrodiff.databases.sources.folders import Images
from retrodiff.diffusion import EDMDenoiser
from retrodiff.encoders import Cached, CLIPEncoder, PromptCut, TimmEncoder
from retrodiff.interfaces import Encoder, Fingerprint
from retrodiff.model import Model
from retrodiff.pictures.converting import PixelRange
from retrodiff.testing import check_encoder

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
}


def clip() -> CLIPEncoder:
    torch.manual_seed(0)
    return CLIPEncoder.from_config(TINY)


def small_timm() -> TimmEncoder:
    torch.manual_seed(0)
    return TimmEncoder("test_resnet", image_size=32)


MAKERS = [clip, small_timm, lambda: Cached(clip()), lambda: Cached(small_timm())]
NAMES = ["clip", "timm", "cached clip", "cached timm"]


@pytest.fixture(params=MAKERS, ids=NAMES)
def encoder(request) -> Encoder:
    return request.param()


def pixels() -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, 20, 28), generator=g, dtype=torch.uint8)


def test_contract(encoder):
    check_encoder(encoder, size=24)


def test_images_of_any_kind_mean_the_same(encoder, tmp_path):
    images = pixels()
    floats = images / 127.5 - 1
    expected = encoder.encode_image(floats)
    arrays = images.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array) for array in arrays]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    kinds = [
        images, images.long(), images.int(), floats.double(), floats.bfloat16().float(), arrays,
        pictures, [tmp_path / f"{i}.png" for i in range(3)], list(floats), floats.numpy(),
    ]  # fmt: skip
    for kind in kinds:
        found = encoder.encode_image(kind)
        assert found.dtype == torch.float32
        close = 2e-2 if kind is kinds[4] else 1e-5
        assert (found - expected).norm() <= close * expected.norm()
    mixed = encoder.encode_image([pictures[0], floats[1, :, :13], tmp_path / "2.png"])
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-5)
    one = encoder.encode_image(pictures[1])
    torch.testing.assert_close(one, expected[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 8, 8), torch.nan), "not finite"),
        (torch.full((1, 3, 8, 8), torch.inf), "not finite"),
        (torch.rand(1, 3, 8, 8) * 255, "expected -1 to 1"),
        (torch.full((1, 3, 8, 8), 300), "300"),
        (torch.zeros(3, 8, 8), r"\(b, c, h, w\)"),
        (torch.zeros(1, 2, 8, 8), "channels"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.complex64), "complex64"),
        ("nowhere.png", "nowhere.png"),
        (None, "NoneType"),
    ],
)
def test_images_without_a_clear_meaning(encoder, images, message):
    with pytest.raises(ValueError, match=message) as error:
        encoder.encode_image(images)
    assert "\n" not in str(error.value)


def test_no_image_at_all(encoder):
    assert encoder.encode_image(torch.zeros(0, 3, 8, 8)).shape == (0, encoder.dim)
    assert encoder.encode_image([]).shape == (0, encoder.dim)


@pytest.mark.parametrize("make", [clip, small_timm])
def test_weights_that_are_not_finite(make):
    encoder = make()
    with torch.no_grad():
        list(encoder.parameters())[-1].fill_(torch.nan)
        if make is clip:
            encoder.model.visual.proj.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"NaN or infinity for image 0 \(3 of 3\)"):
        encoder.encode_image(pixels())
    with pytest.raises(ValueError, match="weights damaged"):
        Cached(encoder).encode_prepared(encoder.prepare(pixels()))
    if make is clip:
        encoder.model.text_projection.data.fill_(torch.nan)
        with pytest.raises(ValueError, match="for prompt 0"):
            encoder.encode_text(["a"])


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda e: e, Cached])
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a cat", r"prompts is one string, expected a list: \['a cat'\]"),
        (b"a cat", "prompts is bytes"),
        (5, "prompts is int"),
        ({"a": 1}, "prompts is dict"),
        (["a", 5], r"prompts\[1\] is int, expected a string"),
        (["a", None], r"prompts\[1\] is NoneType"),
        (["a", "b\ud800"], r"prompts\[1\] is no valid Unicode"),
    ],
)
def test_prompts_that_are_no_list_of_strings(prompts, message, wrap):
    encoder = wrap(clip())
    for ask in (encoder.encode_text, *([encoder.tokenize] if wrap is not Cached else [])):
        with pytest.raises(ValueError, match=message) as error:
            ask(prompts)
        assert "\n" not in str(error.value)


def test_lists_of_any_kind():
    encoder = clip()
    expected = encoder.encode_text(["a cat", "a dog"])
    for prompts in (("a cat", "a dog"), np.array(["a cat", "a dog"]), iter(["a cat", "a dog"])):
        assert torch.equal(encoder.encode_text(prompts), expected)
    assert encoder.encode_text(()).shape == (0, 24)


def test_prompts_that_are_cut_are_told_of_once():
    encoder = clip()  # 12 tokens, two of them start and end
    fits = " ".join(["cat"] * 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode_text([fits, "a", ""])
    long, other = fits + " dog", "the " * 30
    message = r"'cat cat .*dog' \(and 1 more\) has more than the 12 tokens"
    with pytest.warns(PromptCut, match=message) as told:
        cut = encoder.encode_text(["a", long, other])
    assert len(told) == 1
    # As many texts at once: products of another number of rows round otherwise.
    assert torch.equal(cut[1], encoder.encode_text(["a", fits, "a"])[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode_text([long, other])
    with pytest.warns(PromptCut, match="one word after another"):
        encoder.encode_text([long, "one word after another " * 9])


def test_other_tokenizers_tell_of_a_cut_too():
    """One that has neither start nor end, pads with 7, and gives a token per letter."""
    from retrodiff.encoders.prompts import tokens_of

    def letters(texts, context_length=6):
        rows = torch.full((len(texts), context_length), 7)
        for row, text in zip(rows, texts, strict=True):
            codes = torch.tensor([ord(c) for c in text[:context_length]], dtype=torch.int64)
            row[: len(codes)] = codes
        return rows

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokens_of(letters, ["abcdef", ""], set()).shape == (2, 6)
    with pytest.warns(PromptCut, match="'abcdefg'"):
        tokens_of(letters, ["abcdef", "abcdefg"], set())


# --- devices and precision ----------------------------------------------------------------------


def test_encoders_move(encoder):
    assert encoder.to("meta") is encoder
    inner = encoder.encoder if isinstance(encoder, Cached) else encoder
    assert inner.device.type == "meta"
    assert all(p.device.type == "meta" for p in inner.parameters())


def test_weights_that_are_not_loaded_yet_move_too(monkeypatch):
    import huggingface_hub

    encoder = CLIPEncoder("ViT-B-32-quickgelu", "openai").to("meta")
    assert encoder.device.type == "meta"
    assert not encoder.loaded
    assert not list(encoder.parameters())
    asked = {}

    def create(name, **options):
        asked.update(options)
        return torch.nn.Linear(2, 2, device=options["device"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: "folder")
    monkeypatch.setattr(open_clip, "create_model", create)
    assert encoder.model.weight.device.type == "meta"
    assert asked["device"].type == "meta"
    assert encoder.loaded


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_embedding(encoder, narrow):
    images, prompts = pixels(), ["a cat", "a dog"]
    image = encoder.encode_image(images)
    ready = encoder.preparation(images)
    text = encoder.encode_text(prompts) if hasattr(encoder, "encode_text") else None
    if isinstance(encoder, Cached):
        encoder._known.clear()
    with torch.autocast("cpu", narrow):
        assert torch.equal(encoder.encode_image(images), image)
        assert torch.equal(encoder.preparation(images), ready)
        assert torch.equal(encoder.encode_prepared(ready), image)
        if text is not None:
            assert torch.equal(encoder.encode_text(prompts), text)


@pytest.mark.parametrize("make", [clip, small_timm])
def test_half_weights_give_float32_embeddings(make):
    encoder = make()
    expected = encoder.encode_image(pixels())
    first = encoder.fingerprint
    narrow = encoder.to(torch.bfloat16)
    found = narrow.encode_image(pixels())
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 0.1 * expected.norm()
    assert narrow.fingerprint.disagreement(first)  # other weights, and they say so


def test_defaults_of_the_process_change_nothing():
    encoder = small_timm()
    expected = encoder.encode_image(pixels())
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(encoder.encode_image(pixels()), expected)
        assert encoder.encode_image([]).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


# --- the protocol's defaults, and what wraps an encoder -----------------------------------------


class Smallest(Encoder):
    """Only what must be written."""

    @property
    def dim(self) -> int:
        return 3

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(encoder="mean", weights="none", preprocessing="none", dim=3)

    def encode_image(self, images):
        return images.mean((2, 3))


def test_an_encoder_needs_three_members():
    encoder = Smallest()
    check_encoder(encoder)
    assert encoder.loaded
    assert encoder.identity == encoder.fingerprint
    assert encoder.preparation is None
    assert encoder.to("cuda") is encoder
    images = pixels() / 127.5 - 1
    assert torch.equal(encoder.encode_prepared(images), images.mean((2, 3)))
    cached = Cached(encoder)
    assert cached.preparation is None
    assert torch.equal(encode_pictures(Images(images), cached), images.mean((2, 3)))


def test_cached_forwards_everything():
    inner = clip()
    cached = Cached(inner)
    members = ("dim", "fingerprint", "identity", "loaded", "preparation")
    assert all(getattr(cached, name) == getattr(inner, name) for name in members)
    assert preparation(cached) is not None
    lazy = Cached(CLIPEncoder("ViT-B-32-quickgelu", "openai"))
    assert not lazy.loaded
    assert lazy.identity.weights == ""
    assert lazy.dim == 512


def test_cached_serves_a_build_as_its_encoder_does(monkeypatch):
    """Through the same two steps, prepared and encoded, and once per picture."""
    inner = small_timm()
    images = torch.cat([pixels(), pixels()[:1]])
    expected = encode_pictures(Images(images), inner)
    seen = []
    monkeypatch.setattr(
        inner,
        "encode_prepared",
        lambda x, run=inner.encode_prepared: (seen.append(len(x)), run(x))[1],
    )
    cached = Cached(inner)
    for _ in range(2):
        found = encode_pictures(Images(images), cached)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert seen == [3]


def test_bright_pictures_are_not_taken_for_another_range():
    """All their pixels are above a half, as floats in [0, 1] are when taken as [-1, 1]."""
    bright = torch.randint(140, 250, (4, 3, 24, 24), dtype=torch.uint8)
    encoder = small_timm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_pictures(Images(bright), encoder)
        encoder.encode_image(bright)
        encode_images(encoder, list(bright))
    with pytest.warns(PixelRange):
        encoder.encode_image(torch.rand(2, 3, 24, 24))


def test_a_model_is_saved_without_the_cache_around_its_encoder(tmp_path, recipe):
    inner = TimmEncoder("test_resnet", image_size=32)
    images = torch.rand(12, 3, 32, 32) * 2 - 1
    database = ArrayDatabase(
        inner.encode_image(images), inner.fingerprint, [{"file": str(i)} for i in range(12)]
    )
    denoiser = EDMDenoiser(small_network(inner.dim))
    model = recipe.encoder(Cached(inner)).database(database).denoiser(denoiser).build()
    model.save(tmp_path / "model")
    again = Model.load(tmp_path / "model", database=database)
    assert isinstance(again.encoder, TimmEncoder)
    assert again.encoder.fingerprint == inner.fingerprint


def test_cached_does_not_mix_what_is_prepared_with_what_is_not():
    """A picture of the network's own size, once as it is and once prepared."""
    cached = Cached(small_timm())
    picture = pixels()[:1, :, :20, :20] / 127.5 - 1
    picture = torch.nn.functional.interpolate(picture, (32, 32), mode="nearest")
    apart = cached.encode_image(picture) - cached.encode_prepared(picture)
    assert apart.abs().max() > 1e-3
    cached.encoder.preprocessing = TimmEncoder(
        "test_resnet", image_size=32, preprocessing="plain"
    ).preprocessing
    assert torch.equal(cached.encode_image(picture), cached.encode_prepared(picture))
