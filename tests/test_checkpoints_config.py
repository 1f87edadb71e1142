"""The yaml of a published checkpoint: its numbers, and files that are no such yaml."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from published_files import configuration, published_state, write_checkpoint
from torch import Tensor

from retrodiff.checkpoints.compvis import load_compvis, read_config
from retrodiff.checkpoints.published import PUBLISHED, Architecture


@pytest.fixture
def config() -> dict[str, Any]:
    return configuration()


@pytest.fixture
def state(config: dict[str, Any]) -> dict[str, Tensor]:
    return published_state(config)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    return partial(write_checkpoint, tmp_path / "model.ckpt")


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.split(".")
    section = config["model"]["params"]
    for name in parents:
        section = section[name]
    section[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("unet_config.target", "ldm.models.Transformer", "another model family: its unet_config"),
        ("first_stage_config.target", "torch.nn.Identity", "family: its first_stage_config"),
        ("unet_config.params.use_scale_shift_norm", True, "use_scale_shift_norm=True"),
        ("unet_config.params.use_spatial_transformer", False, "use_spatial_transformer=False"),
        ("unet_config.params.num_classes", 1000, "num_classes=1000"),
        ("unet_config.params.num_head_channels", -1, "num_head_channels"),
        ("unet_config.params", {}, "another model family"),
        ("unet_config", None, "not the configuration of a latent diffusion model"),
        ("beta_schedule", "cosine", "beta_schedule='cosine'"),
        ("parameterization", "x0", "predicts 'x0'"),
        ("linear_end", 0.5, "do not belong together"),
        ("timesteps", 500, "1000 noise levels"),
    ],
)
def test_a_yaml_of_another_family_says_what_differs(
    path: str,
    value: Any,
    message: str,
    config: dict[str, Any],
    state: dict[str, Tensor],
    save: Callable[..., Path],
) -> None:
    with pytest.raises(ValueError, match=message):
        load_compvis(save(state), changed(config, path, value))


@pytest.mark.parametrize("text", ["just words", "a: [", "model: {params: {}}", "\x00"])
def test_a_file_that_is_no_such_yaml(
    text: str, state: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    path = save(state)
    path.with_suffix(".yaml").write_text(text)
    with pytest.raises(ValueError, match=r"model\.yaml"):
        load_compvis(path)


def test_a_yaml_cannot_run_code(state: dict[str, Tensor], save: Callable[..., Path]) -> None:
    path = save(state)
    path.with_suffix(".yaml").write_text("!!python/object/apply:os.system ['exit 3']")
    with pytest.raises(ValueError, match="no yaml file"):
        load_compvis(path)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models_are_recognized(name: str) -> None:
    known = PUBLISHED[name]
    config = configuration(known.kind)
    unet = config["model"]["params"]["unet_config"]["params"]
    first = config["model"]["params"]["first_stage_config"]["params"]
    first["embed_dim"] = known.unet["in_channels"]
    unet |= {
        "in_channels": known.unet["in_channels"],
        "out_channels": known.unet["out_channels"],
        "num_res_blocks": known.unet["blocks_per_level"],
        "num_head_channels": 32,
        "model_channels": known.unet["channels"],
        "channel_mult": known.unet["multipliers"],
        "attention_resolutions": known.unet["attention_factors"][::-1],
        "context_dim": known.unet["context_width"],
    }
    found = read_config(config)
    assert (found.name, found.scale) == (name, known.scale)
    del unet["num_head_channels"]  # the class-conditional model differs from the paper's here only
    assert read_config(changed(config, "unet_config.params.num_heads", 1)).name is None


def test_an_unpublished_model_has_no_known_scale(config: dict[str, Any]) -> None:
    found = read_config(config)
    assert isinstance(found, Architecture)
    assert (found.name, found.scale) == (None, None)
