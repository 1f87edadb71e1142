"""What encoders feed their networks: the transforms of timm and open_clip as oracles, and names."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.pretrained import _PRETRAINED
from open_clip.transform import image_transform
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg

from retrodiff.encoders import CLIPEncoder, TimmEncoder, encoder_from_string
from retrodiff.encoders.described import problem
from retrodiff.encoders.preprocessing import Squash, openai
from retrodiff.encoders.timm import timm_name
from retrodiff.encoders.trained import of_open_clip, of_timm, trained
from retrodiff.pictures.converting import to_batch

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
}


def pictures() -> list[Image.Image]:
    """Noise and smooth ones, wide, high, small; no overshoot of a resize leaves 0 to 255.

    Where one does, the order of the two directions matters, in which Pillow's versions differ.
    """
    g = np.random.default_rng(0)
    sides = [(70, 50), (50, 91), (33, 33), (200, 61), (48, 64)]
    noise = [Image.fromarray(g.integers(70, 186, (*side, 3), dtype=np.uint8)) for side in sides]
    rows, columns = np.mgrid[0:120, 0:173]
    smooth = np.stack([rows * 2, columns, 128 + 60 * np.sin(rows / 9 + columns / 11)], -1)
    return [*noise, Image.fromarray(smooth.clip(0, 255).astype(np.uint8))]


def levels_apart(preprocessing, transform, std) -> float:
    """The largest difference of two preprocessings, in steps of 8 bits."""
    worst = 0.0
    for picture in pictures():
        theirs, ours = transform(picture), preprocessing.apply(to_batch(picture))[0]
        assert ours.shape == theirs.shape
        apart = (ours - theirs).abs() * torch.tensor(std)[:, None, None] * 255
        worst = max(worst, float(apart.max()))
    return worst


def timm_configs() -> dict[str, dict]:
    """One configuration of each kind that timm's weights have, at a small size."""
    found = {}
    for name in timm.list_pretrained():
        config = get_pretrained_cfg(name).to_dict()
        square = config["input_size"][1] == config["input_size"][2]
        small = {"input_size": (3, 48, 48) if square else (3, 64, 48)}
        about = resolve_data_config(small, pretrained_cfg=config)
        found.setdefault(repr(about), about)
    return found


def test_every_configuration_of_timm_is_as_timm_transforms():
    configs = timm_configs()
    assert len(configs) > 50
    for about in configs.values():
        height, width = about["input_size"][1:]
        ours = of_timm(about, height if height == width else (height, width))
        # Theirs rounds to 8 bits after each direction: half a step, and another half.
        assert levels_apart(ours, create_transform(**about), about["std"]) < 1.6, about


def test_every_configuration_of_open_clip_is_as_open_clip_transforms():
    configs = {repr(c): c for tags in _PRETRAINED.values() for c in tags.values()}
    seen = set()
    for config in configs.values():
        ours = of_open_clip(config, 48)
        if ours.name in seen:
            continue
        seen.add(ours.name)
        named = {k: config.get(k) for k in ("mean", "std", "resize_mode", "interpolation")}
        theirs = image_transform(48, is_train=False, **named)
        assert levels_apart(ours, theirs, named["std"]) < 1.6, config
    assert "openai-48" in seen
    assert "squash-48-bicubic-half" in seen
    longest = {"resize_mode": "longest", "fill_color": 90, "mean": 0.4, "std": 0.3}
    theirs = image_transform((48, 40), is_train=False, **longest)
    assert levels_apart(of_open_clip(longest, (48, 40)), theirs, (0.3,) * 3) < 1.6


@pytest.mark.parametrize(
    "sides", [((70, 50), (48, 48)), ((33, 40), (60, 50)), ((90, 91), (30, 31))]
)
def test_resizes_are_those_of_pillow_rows_first(sides):
    """Noise from black to white, whose overshoot is cut off after each direction."""
    (h, w), (height, width) = sides
    pixels = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    theirs = picture.resize((width, h), Image.Resampling.BICUBIC)
    theirs = theirs.resize((width, height), Image.Resampling.BICUBIC)
    ours = Squash((height, width)).apply(to_batch(picture))[0].permute(1, 2, 0)
    assert np.abs((ours.numpy() + 1) * 127.5 - np.asarray(theirs)).max() < 1.6


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "test_vit"])
def test_timm_encoders_take_what_their_network_was_trained_on(name):
    encoder = TimmEncoder(name)
    about = resolve_data_config({}, model=encoder.network)
    assert encoder.image_size == about["input_size"][-1]
    assert levels_apart(encoder.preprocessing, create_transform(**about), about["std"]) < 1.6


def test_open_clip_encoders_take_what_their_weights_were_trained_on():
    """Known without the weights."""
    names = {
        ("ViT-B-32-quickgelu", "openai"): "openai-224",
        ("ViT-B-32", "laion2b_s34b_b79k"): "openai-224",
        ("ViT-B-16-SigLIP-384", "webli"): "squash-384-bicubic-half",
        ("MobileCLIP-S1", "datacompdr"): "short-256-bilinear-unit",
        ("ViT-L-14-quickgelu", "dfn2b"): "openai-224",
        ("ViT-H-14-CLIPA-336", "datacomp1b"): "squash-336-bilinear-imagenet",
    }
    for (name, tag), preprocessing in names.items():
        encoder = CLIPEncoder(name, tag)
        assert not encoder.loaded
        assert encoder.identity.preprocessing == preprocessing
        assert encoder.identity.encoder.endswith(f"@{encoder.image_size}")
    assert CLIPEncoder("ViT-B-32-quickgelu", "openai", image_size=96).image_size == 96
    rdm = CLIPEncoder("ViT-B-32-quickgelu", "openai", preprocessing="rdm")
    assert rdm.identity.preprocessing == "rdm-224"


def test_names_tell_preprocessings_apart():
    half = (0.5,) * 3
    made = [
        openai(32),
        trained(32, half, half, "bicubic", "short"),
        trained(32, half, half, "bilinear", "short"),
        trained(32, half, half, "bicubic", "short", crop=0.9),
        trained(32, half, half, "bicubic", "squash"),
        trained(32, half, half, "bicubic", "inside"),
        trained(32, half, (0.25,) * 3, "bicubic", "short"),
        trained((32, 48), half, half, "bicubic", "short"),
        trained(40, half, half, "bicubic", "short"),
    ]
    assert len({p.name for p in made}) == len(made)
    for one in made:
        again = type(one).from_config(json.loads(json.dumps(one.config())))
        assert again == one
        about = {"kind": "timm", "name": "test_vit", "preprocessing": one.config()}
        assert problem(json.loads(json.dumps(about))) is None


def test_preprocessings_that_are_not_known():
    with pytest.raises(ValueError, match=r"'lanczos'.*choose a preprocessing"):
        trained(32, (0.5,) * 3, (0.5,) * 3, "lanczos", "short")
    with pytest.raises(ValueError, match=r"'mine'; known: own .*rdm, openai, plain"):
        TimmEncoder("test_vit", preprocessing="mine")
    with pytest.raises(ValueError, match=r"10000 x 20 pixels.*100 times"):
        openai(32).apply(torch.zeros(1, 3, 20, 10_000))


def test_bytes_and_floats_are_prepared_alike():
    """As a build reads bytes, and a query is floats."""
    for preprocessing in (openai(24), TimmEncoder("test_vit").preprocessing):
        picture = pictures()[0]
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]
        torch.testing.assert_close(
            preprocessing.apply(pixels), preprocessing.apply(to_batch(picture)), atol=1e-6, rtol=0
        )


# --- sizes --------------------------------------------------------------------------------------


def test_a_network_takes_images_of_its_own_size():
    picture = pictures()[0]
    encoder = TimmEncoder("vit_tiny_patch16_384")
    assert encoder.image_size == 384
    assert encoder.encode_image(picture).shape == (1, 192)
    other = TimmEncoder("vit_tiny_patch16_224", image_size=96)
    assert other.encode_image([picture, picture]).shape == (2, 192)
    assert other.fingerprint.encoder == "timm:vit_tiny_patch16_224@96"
    assert TimmEncoder("test_resnet", image_size=np.int64(32)).image_size == 32
    one = TimmEncoder("test_resnet", in_chans=1, image_size=32)
    assert one.encode_image(torch.zeros(2, 1, 40, 40)).shape == (2, one.dim)
    five = TimmEncoder("test_resnet", in_chans=5, image_size=32)
    assert five.encode_image(torch.zeros(2, 5, 40, 40)).shape == (2, five.dim)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_dinov2.lvd142m"])
def test_dinov2_takes_518_pixels(name):
    with torch.device("meta"):
        encoder = TimmEncoder(name, device="meta")
    assert encoder.image_size == 518
    assert encoder.preprocessing.name == "short-518-bicubic-imagenet"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimmEncoder("test_vit", image_size=0), "image_size=0: give a whole number"),
        (lambda: TimmEncoder("test_vit", image_size=2.5), "image_size=2.5: give a whole number"),
        (lambda: TimmEncoder("test_vit", batch_size=0), "batch_size=0: give a whole number"),
        (lambda: TimmEncoder("test_resnet", color=3), r"timm cannot make 'test_resnet'.*color"),
        (lambda: CLIPEncoder("ViT-B-32", image_size=-1), "image_size=-1: give a whole number"),
        (
            lambda: TimmEncoder("maxvit_rmlp_pico_rw_256", image_size=100).encode_image(
                torch.zeros(1, 3, 40, 40)
            ),
            "takes no images of 100 x 100 pixels .*its own image_size=256",
        ),
    ],
)
def test_sizes_that_a_network_does_not_take(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("resnet18", "resnet18"),
        ("resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("hf_hub:timm/vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m"),
        ("hf-hub:someone/resnet18", "hf-hub:someone/resnet18"),
        ("local-dir:some/folder", "local-dir:some/folder"),
    ],
)
def test_names_of_timm(text, name):
    assert timm_name(text) == name


def test_timm_names_on_a_command_line_have_tags_and_sources():
    plain = encoder_from_string("timm:test_resnet.r160_in1k", pretrained=False)
    assert plain.fingerprint.encoder == "timm:test_resnet.r160_in1k@160"
    for text in (
        "timm:hf-hub:timm/test_resnet.r160_in1k",
        "timm:hf_hub:timm/test_resnet.r160_in1k",
        "timm:timm/test_resnet.r160_in1k",
        "hf-hub:timm/test_resnet.r160_in1k",
    ):
        assert encoder_from_string(text, pretrained=False).fingerprint == plain.fingerprint
    small = encoder_from_string(
        "timm:test_resnet,image_size=64,preprocessing=plain", pretrained=False
    )
    assert small.fingerprint.preprocessing == "plain-64"
    assert small.image_size == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timm:ResNet18", r"no model 'ResNet18'; near it: resnet18"),
        ("timm:resnet81", r"no model 'resnet81'; near it: .*resnet18"),
        ("timm:vit_smal_patch14_dinov2", "near it: vit_small_patch14_dinov2"),
        ("timm:resnet18.nothing", "no weights 'nothing' of 'resnet18'; it has: .*a1_in1k"),
        ("timm:resnet10t.nothing", "no weights 'nothing' of 'resnet10t'"),
        ("timm:vit_tiny_patch16_384.x", "no weights 'x'"),
        ("timm:http://host/x", "no source 'http': hf-hub:, hf_hub:, local-dir:"),
        ("open_clip:ViT-B-23:openai", "no model 'ViT-B-23'; near it: .*ViT-B-32"),
        ("open_clip:ViT-B-32", r"add a tag, open_clip:ViT-B-32:TAG \(TAG is one of .*laion400m"),
        ("open_clip:ViT-B-32:openai", "'ViT-B-32-quickgelu'"),
        ("open_clip:http:x", "no model 'http'"),
        ("resnet18.a1_in1k", "do you mean timm:resnet18.a1_in1k"),
        ("ViT-B-32", "do you mean open_clip:ViT-B-32"),
        ("hf-hub:someone/thing", "timm:hf-hub:someone/thing or open_clip:hf-hub:someone/thing"),
        ("folder:/nowhere", "no encoder 'folder:/nowhere': give open_clip:NAME:TAG"),
        ("~/nowhere", "no encoder '~/nowhere'"),
        ("timm:test_vit,image_size=x", "image_size='x' of 'timm:test_vit' is no whole number"),
        ("timm:test_vit,image_size=3,image_size=4", "given twice"),
        ("open_clip:local-dir:/nowhere", "holds no open_clip_config.json"),
    ],
)
def test_names_that_are_not_known(text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        encoder_from_string(text)
    assert "\n" not in str(error.value)


def test_networks_without_weights_say_so():
    without = next(n for n in timm.list_models("vit*") if not timm.list_pretrained(f"{n}.*"))
    with pytest.raises(ValueError, match=r"no weights of .*--no-pretrained"):
        encoder_from_string(f"timm:{without}")


def test_the_hub_is_asked_once_before_timm_asks_often(monkeypatch):
    import huggingface_hub

    asked = []

    def offline(url, **_):
        asked.append(url)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm would ask again"))
    with pytest.raises(OSError, match=r"'resnet18.a1_in1k' \(ConnectionError\): go online once"):
        encoder_from_string("timm:resnet18.a1_in1k")
    with pytest.raises(OSError, match=r"'hf-hub:someone/x' \(ConnectionError\)"):
        encoder_from_string("timm:hf-hub:someone/x", pretrained=False)
    assert ["timm/resnet18.a1_in1k/" in asked[0], "someone/x/" in asked[1]] == [True, True]
    assert len(asked) == 2


def test_a_saved_encoder_by_its_folder(tmp_path):
    from retrodiff.encoders import save_encoder

    encoder = TimmEncoder("test_resnet", image_size=32)
    save_encoder(encoder, tmp_path / "mine")
    for text in (str(tmp_path / "mine"), f"folder:{tmp_path / 'mine'}"):
        assert encoder_from_string(text).fingerprint == encoder.fingerprint
    with pytest.raises(ValueError, match="its image_size cannot be changed"):
        encoder_from_string(str(tmp_path / "mine"), image_size=64)
    with pytest.raises(ValueError, match="weights of its own: leave pretrained=False"):
        encoder_from_string(str(tmp_path / "mine"), pretrained=False)


def local_clip(folder: Path, **text) -> CLIPEncoder:
    torch.manual_seed(0)
    encoder = CLIPEncoder.from_config(TINY)
    folder.mkdir()
    about = {
        "model_cfg": {**TINY, "text_cfg": {**TINY["text_cfg"], **text}},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    torch.save(encoder.model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return encoder


def test_open_clip_of_a_folder_brings_weights_and_preprocessing(tmp_path):
    source = local_clip(tmp_path / "clip")
    encoder = encoder_from_string(f"open_clip:local-dir:{tmp_path / 'clip'}")
    assert encoder.preprocessing.name == "squash-16-bicubic-half"
    assert encoder.dim == 24
    assert not encoder.loaded
    assert torch.equal(encoder.encode_text(["a cat"]), source.encode_text(["a cat"]))
    assert encoder.encode_image(pictures()[0]).shape == (1, 24)
    with pytest.raises(ValueError, match="brings its own weights"):
        CLIPEncoder(f"local-dir:{tmp_path / 'clip'}", "openai")
    with pytest.raises(ValueError, match="brings its own weights"):
        encoder_from_string(f"open_clip:local-dir:{tmp_path / 'clip'}", pretrained=False)


def test_a_tokenizer_that_would_run_code_is_refused(tmp_path):
    local_clip(
        tmp_path / "bad", hf_tokenizer_name="x", tokenizer_kwargs={"trust_remote_code": True}
    )
    with pytest.raises(ValueError, match="run code of its own"):
        CLIPEncoder(f"local-dir:{tmp_path / 'bad'}")
    assert open_clip.get_model_config("ViT-B-32") is not None
