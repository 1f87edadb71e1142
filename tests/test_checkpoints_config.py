"""The yaml of a published checkpoint: its numbers, and files that are no such yaml."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from published_files import configuration, published_state, write_checkpoint
from torch import Tensor

from retrodiff.checkpoints.foreign.compvis import load_compvis, read_config
from retrodiff.checkpoints.foreign.published import PUBLISHED, Architecture


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


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # what changes numbers, and was passed over once
        ("first_stage_config.params.ddconfig.tanh_out", True, "tanh_out=True, expected False"),
        ("first_stage_config.params.ddconfig.attn_type", "linear", "attn_type='linear'"),
        ("first_stage_config.params.ddconfig.resamp_with_conv", False, "resamp_with_conv=False"),
        ("first_stage_config.params.ddconfig.double_z", True, "double_z=True, expected False"),
        ("first_stage_config.params.ddconfig.out_ch", 1, "out_ch=1, expected in_channels=3"),
        ("first_stage_config.params.remap", "used.npy", "remap='used.npy'"),
        ("conditioning_key", "hybrid", "conditioning_key='hybrid', expected None or 'crossattn'"),
        ("conditioning_key", "concat", "conditioning_key='concat'"),
        ("conditioning_key", "adm", "conditioning_key='adm'"),
        ("given_betas", [0.1, 0.2], r"given_betas=\[0\.1, 0\.2\]"),
        ("v_posterior", 0.5, "v_posterior=0.5, expected 0"),
        ("num_timesteps_cond", 2, "num_timesteps_cond=2"),
        ("retro_noise", True, "retro_noise=True"),
        ("retrieval_encoder_cfg", {"target": "rdm.NNEncoder"}, "retrieval_encoder_cfg="),
        ("scale_by_std", "yes", "scale_by_std='yes', expected true or false"),
        ("scale_factor", -1, "scale_factor=-1, expected a number"),
        ("channels", 4, "channels=4, expected 3, the channels of the first stage"),
        ("unet_config.params.in_channels", 6, "in_channels=6, expected 3, the channels"),
        ("unet_config.params.out_channels", 6, "out_channels=6, expected 3, the channels"),
        ("unet_config.params.context_dim", None, "context_dim=None"),
        ("unet_config.params.num_res_blocks", [1, 2], r"num_res_blocks=\[1, 2\]"),
        ("unet_config.params.disable_self_attentions", [True, False], "disable_self_attentions"),
        ("unet_config.params.adm_in_channels", 10, "adm_in_channels=10"),
        ("image_size", [8, 12], r"image_size=\[8, 12\]"),
        # what nobody knows
        ("force_zero_snr", True, "has force_zero_snr, which is not known to this version"),
        ("unet_config.params.qk_norm", True, "unet_config has qk_norm, which is not known"),
        ("first_stage_config.params.ddconfig.z_shift", 1, "ddconfig has z_shift, which is not"),
        # numbers that would ask for terabytes
        ("unet_config.params.model_channels", 2**40, "model_channels=1099511627776, expected"),
        ("unet_config.params.channel_mult", [1] * 40, "channel_mult=a list of 40"),
        ("unet_config.params.transformer_depth", 10**9, "transformer_depth=1000000000"),
        ("unet_config.params.attention_resolutions", "x", "attention_resolutions='x'"),
        ("timesteps", 10**12, "timesteps=1000000000000"),
        ("first_stage_config.params.n_embed", 2**40, "n_embed=1099511627776"),
        ("first_stage_config.params.ddconfig.resolution", 0, "resolution=0"),
        ("first_stage_config.params.ddconfig.num_res_blocks", 10**6, "num_res_blocks=1000000"),
    ],
)
def test_a_key_that_changes_numbers_is_refused_by_name(
    path: str, value: Any, message: str, config: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_config(changed(config, path, value))
    assert "\n" not in str(caught.value)


def test_deep_networks_are_refused_before_they_are_built(config: dict[str, Any]) -> None:
    unet = config["model"]["params"]["unet_config"]["params"]
    unet |= {"num_res_blocks": 64, "transformer_depth": 64}
    with pytest.raises(ValueError, match="8,320 blocks, more than 512"):
        read_config(config)


def released(name: str) -> dict[str, Any]:
    """A configuration with all keys of the released ones, and those of its relatives."""
    config = configuration("kl" if name == "text to image" else "vq")
    params = config["model"]["params"]
    config |= {"data": {"target": "main.DataModuleFromConfig"}, "lightning": {"trainer": {}}}
    config["model"]["base_learning_rate"] = 1e-4
    common = {
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "first_stage_key": "image",
        "cond_stage_key": "class_label",
        "image_size": 8,
        "channels": 3,
        "cond_stage_trainable": False,
        "monitor": "val/loss_simple_ema",
        "scale_by_std": False,
        "scheduler_config": {"target": "ldm.lr_scheduler.LambdaLinearScheduler"},
    }
    graph = params["first_stage_config"]["params"]
    graph |= {"monitor": "val/rec_loss", "lossconfig": {"target": "torch.nn.Identity"}}
    graph["ddconfig"]["dropout"] = 0.0
    unet = params["unet_config"]["params"]
    unet |= {"use_scale_shift_norm": False, "resblock_updown": False, "use_checkpoint": True}
    if name == "the paper's":
        common |= {
            "k_nn": 4,
            "query_key": "clip_img_emb",
            "nn_key": "nn_embeddings",
            "nn_memory": "nn_memory/oi_imagenet.p",
            "conditioning_key": "retro_only",
            "ignore_keys": ["unconditional_guidance_vex"],
            "retrieval_cfg": {"target": "rdm.DatasetBuilder", "params": {"k": 20}},
            "retrieval_encoder_cfg": {"target": "torch.nn.Identity"},
            "cond_stage_config": "__is_unconditional__",
        }
    else:
        del unet["num_head_channels"]
        unet |= {"num_heads": 8, "legacy": False, "use_fp16": False}
        common |= {
            "conditioning_key": "crossattn",
            "use_ema": False,
            "cond_stage_config": {"target": "ldm.modules.encoders.modules.ClassEmbedder"},
        }
    params |= common
    return config


@pytest.mark.parametrize("name", ["the paper's", "class-conditional", "text to image"])
def test_every_key_of_the_released_files_is_known(name: str) -> None:
    found = read_config(released(name))
    assert found.unet.get("heads") == (None if name == "the paper's" else 8)
    assert found.unet["size"] == 8


def test_the_size_of_latents_is_the_models_own(config: dict[str, Any]) -> None:
    """Stable diffusion's yaml calls the UNet's image_size unused."""
    assert read_config(changed(config, "image_size", 16)).unet["size"] == 16


def test_a_trained_null_is_warned_about(config: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"p_uncond=0\.1: .*unconditional_guidance_vex"):
        read_config(changed(config, "p_uncond", 0.1))


@pytest.mark.parametrize(("given", "factors"), [([8], [2]), ([16, 8], [1, 2]), ([5], []), ([], [])])
def test_attention_of_the_first_stage(
    given: list[int], factors: list[int], config: dict[str, Any]
) -> None:
    """Of 16 pixels and two levels; resolutions that no level has, have no attention."""
    path = "first_stage_config.params.ddconfig.attn_resolutions"
    assert read_config(changed(config, path, given)).autoencoder["attention_factors"] == factors


# --- what is in the checkpoint, too ------------------------------------------------------------


def test_a_measured_scale_is_read_from_the_checkpoint(
    config: dict[str, Any], state: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    state["scale_factor"] = torch.tensor(0.1234)
    measured = changed(config, "scale_by_std", True)
    assert load_compvis(save(state), measured).scale_factor == pytest.approx(0.1234)
    with pytest.raises(ValueError, match=r"holds scale_factor=0\.1234.*configuration gives 1:"):
        load_compvis(save(state), changed(config, "scale_by_std", False))
    agreed = changed(config, "scale_factor", 0.1234)
    assert load_compvis(save(state), agreed).scale_factor == 0.1234
    state["scale_factor"] = torch.tensor(float("nan"))
    with pytest.raises(ValueError, match="scale_factor of nan: the file is damaged"):
        load_compvis(save(state), agreed)


def test_a_measured_scale_that_is_nowhere_is_asked_for(
    config: dict[str, Any], state: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=r"no tensor scale_factor, but .* scale_by_std: true"):
        load_compvis(save(state), changed(config, "scale_by_std", True))


@pytest.mark.parametrize("kind", ["trained", "zero snr"])
def test_noise_levels_in_the_checkpoint_are_compared(
    kind: str, config: dict[str, Any], state: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    if kind == "trained":
        state["alphas_cumprod"] = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    else:
        root = state["alphas_cumprod"].sqrt()
        state["alphas_cumprod"] = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    with pytest.raises(ValueError, match="do not belong together"):
        load_compvis(save(state), config)


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
