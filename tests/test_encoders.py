"""Encoders: preprocessing against independent implementations, identity, saving, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from retrodiff.encoders import (
    Cached,
    CLIPEncoder,
    Preprocessing,
    PromptCut,
    TimmEncoder,
    encoder_from_string,
    load_encoder,
    save_encoder,
    weights_hash,
)
from retrodiff.encoders.preprocessing import CLIP_MEAN, CLIP_STD, Normalize, openai, plain, rdm
from retrodiff.interfaces import Encoder, TextEncoder

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip() -> CLIPEncoder:
    torch.manual_seed(0)
    return CLIPEncoder.from_config(TINY)


@pytest.fixture(scope="module")
def timm() -> TimmEncoder:
    torch.manual_seed(0)
    return TimmEncoder("resnet10t", image_size=32)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 20, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1


# --- preprocessing -------------------------------------------------------------------------------


def bicubic(size: int, to: int) -> np.ndarray:
    """Weights (to, size) of a cubic convolution with a = -0.75, corners aligned (Keys 1981)."""
    weights = np.zeros((to, size))
    for i in range(to):
        at = i * (size - 1) / (to - 1)
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            x, a = abs(at - j), -0.75
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(j, 0), size - 1)] += near if x <= 1 else far if x < 2 else 0
    return weights


@pytest.mark.parametrize("shape", [(20, 28), (300, 256), (224, 100), (225, 450)])
def test_rdm_is_a_straight_bicubic_resize_with_aligned_corners(shape):
    """Written out in float64: no crop, no antialiasing, then CLIP's mean and deviation."""
    images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows, columns = (bicubic(size, 224) for size in shape)
    resized = rows @ images.double().numpy() @ columns.T
    mean, std = (np.array(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    expected = ((resized + 1) / 2 - mean) / std
    found = rdm(224).apply(images)
    assert found.shape == (2, 3, 224, 224)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4, rtol=0)


def test_rdm_and_openai_differ():
    """Neither may stand for the other: one keeps the corners, the other crops them away."""
    image = torch.zeros(1, 3, 64, 128)
    image[..., :4] = 1
    left = [preset(32).apply(image)[..., 0].mean() for preset in (rdm, openai)]
    assert left[0] > left[1] + 0.5


def test_openai_agrees_with_pillow_on_resize_and_crop():
    rows, columns = np.mgrid[0:90, 0:150]
    smooth = np.stack([rows * 2, columns, 128 + 60 * np.sin(rows / 9 + columns / 11)], -1)
    picture = Image.fromarray(smooth.clip(0, 255).astype(np.uint8))
    small = picture.resize((int(32 * 150 / 90), 32), Image.Resampling.BICUBIC)
    left = round((small.width - 32) / 2)
    cropped = np.asarray(small.crop((left, 0, left + 32, 32))) / 255
    expected = torch.tensor((cropped - CLIP_MEAN) / CLIP_STD).permute(2, 0, 1)
    image = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    # Half a step of 8 bits, divided by the standard deviation.
    torch.testing.assert_close(openai(32).apply(image)[0].double(), expected, atol=0.02, rtol=0)


def test_plain_leaves_images_of_the_right_size_alone(images):
    same = images[..., :20]
    assert torch.equal(plain(20).apply(same), same)
    assert plain(8).apply(images).abs().max() <= 1


@pytest.mark.parametrize("preset", [rdm, openai, plain])
def test_presets_expand_one_channel_and_work_on_each_image_alone(preset, images):
    gray = images[:, :1]
    together = preset(16).apply(gray)
    assert together.shape == (5, 3, 16, 16)
    assert torch.equal(together[2:3], preset(16).apply(gray[2:3]))


@pytest.mark.parametrize("preset", [rdm(16), openai(16), plain(16, 1)])
def test_preprocessing_survives_json(preset):
    assert Preprocessing.from_config(json.loads(json.dumps(preset.config()))) == preset


def test_preprocessing_of_ones_own(images):
    mine = Preprocessing("mine", (*plain(16).steps, Normalize((0.5,) * 3, (0.25,) * 3)))
    assert TimmEncoder("resnet10t", preprocessing=mine).fingerprint.preprocessing == "mine"
    torch.testing.assert_close(mine.apply(images), plain(16).apply(images) * 2)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 8, 8), "add the batch axis"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "images / 127.5 - 1"),
        (torch.zeros(1, 4, 8, 8), "4 channels"),
    ],
)
def test_preprocessing_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        rdm(16).apply(bad)


# --- encoders ------------------------------------------------------------------------------------


def test_clip_from_config(clip, images):
    assert isinstance(clip, nn.Module)
    assert isinstance(clip, TextEncoder)
    embedding = clip.encode_image(images)
    assert embedding.shape == (5, clip.dim) == (5, 24)
    assert not embedding.requires_grad
    assert clip.encode_text(["a photo", "the digit seven", "x"]).shape == (3, 24)
    assert clip.encode_text([]).shape == (0, 24)


def test_text_runs_from_start_to_end_token(clip):
    with pytest.warns(PromptCut, match="'a photo of the digit"):
        tokens = clip.tokenize(["a", "a photo of the digit seven and much more than fits in here"])
    assert tokens.shape == (2, 12)
    assert tokens[:, 0].tolist() == [49406, 49406]
    assert tokens[0, 2] == 49407
    assert tokens[1, -1] == 49407


def test_clip_is_trainable(clip, images):
    similarity = clip.image_features(images[:1]) @ clip.text_features(clip.tokenize(["a"])).T
    similarity.sum().backward()
    assert clip.model.visual.conv1.weight.grad.abs().sum() > 0
    clip.zero_grad()


@pytest.mark.parametrize("which", ["clip", "timm"])
def test_embedding_does_not_depend_on_batch_or_mode(which, images, request):
    encoder = request.getfixturevalue(which)
    encoder.train()
    together = encoder.encode_image(images)
    assert encoder.training
    encoder.eval()
    encoder.batch_size, kept = 2, encoder.batch_size
    torch.testing.assert_close(encoder.encode_image(images), together)
    encoder.batch_size = kept
    torch.testing.assert_close(encoder.encode_image(images.flip(0)).flip(0), together)
    torch.testing.assert_close(encoder.encode_prepared(encoder.prepare(images)), together)


def test_timm_encoder(timm, images):
    assert isinstance(timm, Encoder)
    assert not isinstance(timm, TextEncoder)
    assert timm.encode_image(images).shape == (5, timm.dim) == (5, 512)
    one = TimmEncoder("resnet10t", in_chans=1, image_size=8)
    assert one.encode_image(images[:, :1]).shape == (5, 512)
    timm.features(images).sum().backward()
    timm.zero_grad()


def test_fingerprint_follows_the_weights(images):
    torch.manual_seed(3)
    encoder = TimmEncoder("resnet10t", image_size=32)
    first = encoder.fingerprint
    assert first == encoder.fingerprint
    weight = next(encoder.parameters())
    # As averaged weights are written: without a trace in the version counter.
    weight.data.add_(1)
    second = encoder.fingerprint
    assert first.disagreement(second)
    encoder.requires_grad_(False)
    assert encoder.fingerprint == second == encoder.fingerprint
    weight.add_(1)
    assert encoder.fingerprint.weights not in (first.weights, second.weights)


def test_weights_hash_sees_names_shapes_types_and_bytes():
    state = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    same = {"b": state["b"].clone(), "a": state["a"].clone()}
    assert weights_hash(state) == weights_hash(same)
    others = [
        {"a": torch.zeros(3, 2), "b": state["b"]},
        {"a": torch.zeros(2, 3), "c": state["b"]},
        {"a": torch.zeros(2, 3), "b": state["b"].half()},
        {"a": -torch.zeros(2, 3), "b": state["b"]},
    ]
    assert len({weights_hash(s) for s in [state, *others]}) == 5


def test_size_and_activation_are_part_of_the_name():
    quick = CLIPEncoder.from_config({**TINY, "quick_gelu": True})
    plain_gelu = CLIPEncoder.from_config(TINY)
    assert quick.fingerprint.encoder != plain_gelu.fingerprint.encoder
    assert quick.fingerprint.encoder.endswith("@16")


@pytest.mark.parametrize("which", ["clip", "timm"])
def test_save_and_load(which, images, tmp_path, request):
    encoder = request.getfixturevalue(which)
    save_encoder(encoder, tmp_path / "mine")
    again = load_encoder(tmp_path / "mine")
    assert again.fingerprint == encoder.fingerprint
    assert torch.equal(again.encode_image(images), encoder.encode_image(images))
    assert encoder_from_string(str(tmp_path / "mine")).fingerprint == encoder.fingerprint
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [
        "encoder.json",
        "encoder.safetensors",
    ]


def test_load_refuses_mixed_files(clip, tmp_path):
    save_encoder(clip, tmp_path / "a")
    save_encoder(CLIPEncoder.from_config(TINY), tmp_path / "b")
    (tmp_path / "a/encoder.safetensors").write_bytes(
        (tmp_path / "b/encoder.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="not from one encoder"):
        load_encoder(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"no encoder\.json"):
        load_encoder(tmp_path)


def test_damaged_folders_say_so(clip, tmp_path):
    folder = tmp_path / "mine"
    save_encoder(clip, folder)
    weights, described = folder / "encoder.safetensors", folder / "encoder.json"
    content, text = weights.read_bytes(), described.read_text()
    weights.write_bytes(content[:-7])
    with pytest.raises(ValueError, match=r"encoder\.safetensors .*truncated"):
        load_encoder(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"encoder\.safetensors is missing"):
        load_encoder(folder)
    weights.write_bytes(content)
    config = json.loads(text)
    wider = {**config, "config": {**config["config"], "embed_dim": 25}}
    cases = [
        ("{", "not valid JSON"),
        ("[]", "does not describe an encoder"),
        (json.dumps({**config, "format": 99}), "newer format"),
        (json.dumps({**config, "kind": "vq"}), "unknown kind of encoder 'vq'"),
        (json.dumps(wider), "does not fit encoder.json"),
    ]
    for written, message in cases:
        described.write_text(written)
        with pytest.raises(ValueError, match=message) as error:
            load_encoder(folder)
        assert "\n" not in str(error.value)


def test_quick_gelu_mismatch_is_refused():
    with pytest.raises(ValueError, match="ViT-B-32-quickgelu"):
        CLIPEncoder("ViT-B-32", "openai")
    with pytest.raises(ValueError, match="'ViT-B-32'"):
        CLIPEncoder("ViT-B-32-quickgelu", "laion2b_s34b_b79k")


def test_pretrained_weights_are_not_loaded_to_learn_a_width(monkeypatch):
    import huggingface_hub
    import open_clip

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    monkeypatch.setattr(open_clip, "create_model", offline)
    encoder = CLIPEncoder("ViT-L-14-quickgelu", "openai")
    assert encoder.dim == 768
    with pytest.raises(OSError, match=r"'openai'.*ViT-L-14-quickgelu.*pretrained="):
        encoder.encode_text(["a"])


@pytest.mark.parametrize(
    ("cached", "answer", "asked"),
    [
        (False, ConnectionError("no route to host"), 0),  # refused after one request
        (False, "not found", 1),  # the Hub answers: open_clip may look for its files
        (True, ConnectionError("no route to host"), 1),
    ],
)
def test_the_hub_is_asked_once_before_open_clip_asks_often(cached, answer, asked, monkeypatch):
    import huggingface_hub
    import open_clip
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    class Answered(HfHubHTTPError):
        def __init__(self):
            pass

    requests, loads = [], []

    def metadata(url, **_):
        requests.append(url)
        if isinstance(answer, Exception):
            raise answer
        raise Answered

    def snapshot(repo, *, local_files_only):
        assert local_files_only
        if not cached:
            raise LocalEntryNotFoundError("nothing here")
        return "folder"

    def create(*_, **__):
        loads.append(1)
        raise RuntimeError("stop here")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(open_clip, "create_model", create)
    with pytest.raises(OSError, match="go online once"):
        CLIPEncoder("ViT-B-32-quickgelu", "openai").encode_text(["a"])
    assert len(loads) == asked
    assert len(requests) == (0 if cached else 1)
    assert all("vit_base_patch32" in url for url in requests)


def test_pretrained_open_clip_file(tmp_path, monkeypatch):
    import open_clip

    config = tmp_path / "tiny.json"
    config.write_text(json.dumps({**TINY, "quick_gelu": True}))
    open_clip.add_model_config(config)
    fresh = CLIPEncoder("tiny")
    torch.save(fresh.model.state_dict(), tmp_path / "tiny.pt")
    loaded = CLIPEncoder("tiny", str(tmp_path / "tiny.pt"))
    assert loaded.fingerprint == fresh.fingerprint
    assert "quick_gelu" in loaded.fingerprint.encoder
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("open_clip:ViT-B-32", "add a tag"),
        ("open_clip:nothing:openai", "no model 'nothing'"),
        ("open_clip:ViT-B-32:nothing", "tags of it"),
        ("timm:resnet1000", "no model 'resnet1000'"),
        ("/nowhere", "no encoder '/nowhere'"),
    ],
)
def test_encoder_strings_that_name_nothing(text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        encoder_from_string(text)


def test_encoder_string_without_pretrained_weights():
    assert encoder_from_string("timm:resnet10t", pretrained=False, image_size=32).dim == 512


def test_from_config_refuses_a_vocabulary_that_is_too_small():
    config = {**TINY, "text_cfg": {**TINY["text_cfg"], "vocab_size": 100}}
    with pytest.raises(ValueError, match="vocab_size=100 is less than the 514 tokens"):
        CLIPEncoder.from_config(config)


def test_one_string_is_not_a_list_of_prompts(clip):
    with pytest.raises(ValueError, match="expected a list"):
        clip.encode_text("a photo")


# --- cache ---------------------------------------------------------------------------------------


class Counting(Encoder):
    def __init__(self, encoder):
        self.encoder, self.seen = encoder, 0
        self.dim_ = encoder.dim

    @property
    def dim(self):
        return self.encoder.dim

    @property
    def fingerprint(self):
        return self.encoder.fingerprint

    def encode_image(self, images):
        self.seen += len(images)
        return self.encoder.encode_image(images)


def test_cached_asks_once(clip, images):
    counting = Counting(clip)
    cached = Cached(counting)
    twice = torch.cat([images, images[[3, 1]]])
    torch.testing.assert_close(cached.encode_image(twice), clip.encode_image(twice))
    assert counting.seen == 5
    cached.encode_image(images[[4, 0]])
    assert counting.seen == 5
    assert cached.fingerprint == clip.fingerprint


def test_cached_is_never_stale(images):
    encoder = CLIPEncoder.from_config(TINY)
    cached = Cached(encoder)
    cached.encode_image(images)
    next(encoder.parameters()).data.add_(1)
    assert torch.equal(cached.encode_image(images), encoder.encode_image(images))


def test_cached_has_a_text_tower_only_if_its_encoder_has(clip, timm):
    assert isinstance(Cached(clip), TextEncoder)
    assert not isinstance(Cached(timm), TextEncoder)
    texts = ["a", "b", "a"]
    torch.testing.assert_close(Cached(clip).encode_text(texts), clip.encode_text(texts))


def test_cached_forgets_beyond_its_capacity(clip, images):
    counting = Counting(clip)
    cached = Cached(counting, capacity=2)
    cached.encode_image(images)
    cached.encode_image(images[[3, 4]])
    assert counting.seen == 5
    cached.encode_image(images[:1])
    assert counting.seen == 6


def test_a_folder_is_named_by_a_path(clip, tmp_path):
    save_encoder(clip, str(tmp_path / "e"))
    assert load_encoder(Path(tmp_path / "e")).dim == 24
