"""What the folder of an encoder may say, and what only a caller may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from retrodiff.disk.files import plain_json
from retrodiff.encoders import Cached, CLIPEncoder, TimmEncoder, load_encoder, save_encoder
from retrodiff.encoders.described import problem
from retrodiff.encoders.preprocessing import PRESETS

TINY: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preprocessing_of_ours_may_be_in_a_file(name: str) -> None:
    steps = plain_json(PRESETS[name](32).config())
    described = {"kind": "timm", "name": "resnet18", "preprocessing": steps}
    assert problem(described) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "hf-hub:timm/resnet18"}, "'hf-hub:timm/resnet18' is none of timm's own"),
        ({"name": "local-dir:/x"}, "none of timm's own"),
        ({"pretrained_cfg": {"url": "http://x"}}, "takes no 'pretrained_cfg' from a file"),
        ({"checkpoint_path": "/x"}, "takes no 'checkpoint_path'"),
        ({"in_chans": "3"}, "takes no in_chans='3'"),
        ({"image_size": 10**6}, "takes no image_size=1000000"),
        ({"kind": "open_clip"}, "takes no 'in_chans'"),
        ({"preprocessing": {"name": "x", "steps": [{"step": "Exec"}]}}, "unknown preprocessing"),
        ({"preprocessing": {"name": "x", "steps": [{"step": "Resize", "size": 1.5}]}}, "size=1.5"),
    ],
)
def test_what_a_file_may_not_say(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = save_encoder(TimmEncoder("test_resnet", image_size=32), tmp_path / "e")
    config = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=said) as error:
        load_encoder(folder)
    assert "\n" not in str(error.value)
    assert "in code: load_encoder(path, name=..., ...)" in str(error.value)


def test_a_caller_may_say_it(tmp_path: Path) -> None:
    encoder = TimmEncoder("test_resnet", image_size=32)
    folder = save_encoder(encoder, tmp_path / "e")
    config = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps({**config, "name": "hf-hub:x/test_resnet"}))
    again = load_encoder(folder, name="test_resnet")
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(again.encode_image(images), encoder.encode_image(images))


def test_what_can_only_be_loaded_with_help_is_said_when_saved(tmp_path: Path) -> None:
    encoder = TimmEncoder("test_resnet", image_size=32, act_layer="relu")
    with pytest.warns(UserWarning, match=r"takes no 'act_layer' from a file"):
        folder = save_encoder(encoder, tmp_path / "e")
    with pytest.raises(ValueError, match="act_layer"):
        load_encoder(folder)
    assert load_encoder(folder, act_layer="relu").fingerprint == encoder.fingerprint


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    encoder = CLIPEncoder.from_config(TINY)
    with torch.no_grad():
        encoder.model.visual.proj[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'visual\.proj' holds numbers that are not finite"):
        load_encoder(save_encoder(encoder, tmp_path / "e"))


def test_a_compiled_encoder_is_saved_as_what_it_is(tmp_path: Path) -> None:
    encoder = CLIPEncoder.from_config(TINY)
    before = encoder.fingerprint
    encoder.clip = torch.compile(encoder.clip)  # type: ignore[assignment]
    assert encoder.fingerprint == before
    assert load_encoder(save_encoder(encoder, tmp_path / "e")).fingerprint == before


def test_folders_are_replaced_when_asked_and_nothing_else_with_them(tmp_path: Path) -> None:
    encoder = CLIPEncoder.from_config(TINY)
    folder = save_encoder(encoder, tmp_path / "e")
    with pytest.raises(FileExistsError, match="exists"):
        save_encoder(encoder, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"also holds notes\.txt"):
        save_encoder(encoder, folder, overwrite=True)
    (folder / "notes.txt").unlink()
    save_encoder(CLIPEncoder.from_config(TINY), folder, overwrite=True)
    load_encoder(folder)


def test_the_encoder_inside_a_cache_is_kept(tmp_path: Path) -> None:
    encoder = TimmEncoder("test_resnet", image_size=32)
    loaded = load_encoder(save_encoder(Cached(Cached(encoder)), tmp_path / "e"))
    assert loaded.fingerprint == encoder.fingerprint
    with pytest.raises(ValueError, match="object cannot be kept in a folder: save_encoder takes"):
        save_encoder(object(), tmp_path / "other")  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()
