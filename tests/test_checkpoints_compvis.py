"""Checkpoints in the published layout: every tensor arrives, or is named."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from published_files import configuration, published_state, write_checkpoint
from torch import Tensor

from retrodiff.checkpoints.foreign.compvis import ema_name, load_compvis
from retrodiff.checkpoints.foreign.tensor_names import published_autoencoder, published_unet
from retrodiff.checkpoints.foreign.transfer import their_names


@pytest.fixture
def config() -> dict[str, Any]:
    return configuration()


@pytest.fixture
def state(config: dict[str, Any]) -> dict[str, Tensor]:
    return published_state(config)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    return partial(write_checkpoint, tmp_path / "model.ckpt")


@pytest.mark.parametrize("kind", ["vq", "kl"])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_every_tensor_arrives(kind: str, weights: Any, save: Callable[..., Path]) -> None:
    config = configuration(kind)
    state = published_state(config)
    model = load_compvis(save(state), config, weights=weights)
    names = their_names(model.unet, published_unet(model.unet.config()))
    for own, tensor in model.unet.state_dict().items():
        key = ema_name(names[own]) if weights == "ema" else f"model.diffusion_model.{names[own]}"
        assert torch.equal(tensor, state[key].reshape(tensor.shape)), own
    names = their_names(model.autoencoder, published_autoencoder(model.autoencoder.config()))
    for own, tensor in model.autoencoder.state_dict().items():
        assert torch.equal(tensor, state[f"first_stage_model.{names[own]}"].reshape(tensor.shape))
    assert model.weights == weights
    assert model.context_width == 12
    assert (model.schedule.length, model.schedule.beta_start, model.schedule.beta_end) == (
        1000, 0.0015, 0.0195,
    )  # fmt: skip
    assert not model.unet.training


def test_yaml_is_read_from_a_file_or_from_beside_the_checkpoint(
    config: dict[str, Any], state: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    path = save(state)
    with pytest.raises(ValueError, match=r"hand in config=.* or preset="):
        load_compvis(path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    assert load_compvis(path).context_width == 12
    path.with_name("other.yaml").write_text("{}")
    assert load_compvis(path).context_width == 12
    assert load_compvis(path, path.with_suffix(".yaml")).context_width == 12
    with pytest.raises(FileNotFoundError):
        load_compvis(path, path.with_name("absent.yaml"))


def test_weights_keep_nothing_of_the_file(
    config: dict[str, Any], state: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    path = save(state)
    before = path.read_bytes()
    model = load_compvis(path, config)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.fill_(3)
    assert path.read_bytes() == before


def test_half_precision_file_and_network(
    config: dict[str, Any], state: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    path = save({name: tensor.half() for name, tensor in state.items()})
    assert load_compvis(path, config).unet.dtype == torch.float32
    model = load_compvis(path, config, dtype=torch.bfloat16)
    assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16}


def test_safetensors_with_the_same_names(
    config: dict[str, Any], state: dict[str, Tensor], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file(state, tmp_path / "model.safetensors")
    model = load_compvis(tmp_path / "model.safetensors", config)
    assert torch.equal(model.unet.conv_out.weight, state[ema_name("out.2.weight")])


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_first_stage_in_a_file_of_its_own(
    prefix: str, config: dict[str, Any], state: dict[str, Tensor], tmp_path: Path
) -> None:
    start = "first_stage_model."
    rest = {k: v for k, v in state.items() if not k.startswith(start)}
    own = {prefix + k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    torch.save({"state_dict": rest}, tmp_path / "unet.ckpt")
    torch.save({"state_dict": own}, tmp_path / "first_stage.ckpt")
    with pytest.raises(ValueError, match="first_stage="):
        load_compvis(tmp_path / "unet.ckpt", config)
    model = load_compvis(tmp_path / "unet.ckpt", config, first_stage=tmp_path / "first_stage.ckpt")
    expected = state["first_stage_model.quantize.embedding.weight"]
    assert torch.equal(model.autoencoder.codebook.weight, expected)  # type: ignore[union-attr]


def test_without_averaged_weights_it_asks(
    config: dict[str, Any], state: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    path = save({k: v for k, v in state.items() if not k.startswith("model_ema.")})
    with pytest.raises(ValueError, match="weights='raw'"):
        load_compvis(path, config)
    assert load_compvis(path, config, weights="raw").weights == "raw"


# --- relatives: class-conditional and text-conditional ------------------------------------------


def relative_of_the_family(kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A yaml and the tensors of a class-conditional (VQ) or text-conditional (KL) model."""
    config = configuration("kl" if kind == "text" else "vq")
    params = config["model"]["params"]
    unet = params["unet_config"]["params"]
    del unet["num_head_channels"]
    unet |= {"num_heads": 1 if kind == "class" else 8, "legacy": kind == "class"}
    params |= {"conditioning_key": "crossattn", "num_timesteps_cond": 1}
    if kind == "class":
        params["cond_stage_config"] = {"target": "ldm.modules.encoders.modules.ClassEmbedder"}
    else:
        unet["use_linear_in_transformer"] = True
        params |= {"scale_by_std": True, "use_ema": False}
        params["cond_stage_config"] = {"target": "ldm.modules.encoders.modules.BERTEmbedder"}
    state = published_state(config)
    if kind == "class":
        state["cond_stage_model.embedding.weight"] = torch.randn(11, 12)
    else:
        state = {k: v for k, v in state.items() if not k.startswith("model_ema.")}
        state = {k: v[..., 0, 0] if k.endswith(("proj_in.weight", "proj_out.weight"))
                 and "diffusion_model" in k else v for k, v in state.items()}  # fmt: skip
        state["scale_factor"] = torch.tensor(0.25)
        state["cond_stage_model.transformer.token_emb.weight"] = torch.randn(30, 12)
    return config, state


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class", "text"])
def test_relatives_load_and_agree_with_diffusers(kind: str, save: Callable[..., Path]) -> None:
    from test_unet import diffusers_twin, relative

    config, state = relative_of_the_family(kind)
    state = {k: v / v[0].numel() ** 0.5 if v.ndim > 1 else v for k, v in state.items()}
    model = load_compvis(save(state), config, weights="ema" if kind == "class" else "raw")
    assert model.unet.config()["heads"] == (1 if kind == "class" else 8)
    x, t, context = torch.randn(2, 3, 8, 8), torch.tensor([3, 801]), torch.randn(2, 5, 12)
    expected = diffusers_twin(model.unet)(x, t, context).sample
    assert relative(model.unet(x, t, context), expected) < 1e-5
    assert model.scale_factor == (1.0 if kind == "class" else 0.25)


def test_the_tokens_of_classes_come_with_a_class_conditional_model(
    save: Callable[..., Path],
) -> None:
    from retrodiff import presets
    from retrodiff.interfaces import Query

    config, state = relative_of_the_family("class")
    model = load_compvis(save(state), config)
    table = state["cond_stage_model.embedding.weight"]
    assert torch.equal(model.classes, table)
    built = presets.from_published(model, scale="raw").defaults(steps=2).build()
    out = built.sample(query=Query(model.classes[[3, 7]]), mode="text", progress=False)
    assert torch.equal(out.neighbors.embeddings[:, 0], table[[3, 7]])
    other, text = relative_of_the_family("text")
    assert load_compvis(save(text), other, weights="raw").classes is None
    state["cond_stage_model.embedding.weight"] = torch.full((11, 12), torch.nan)
    with pytest.raises(ValueError, match=r"embedding\.weight that is not of finite numbers"):
        load_compvis(save(state), config)


# --- what does not fit -------------------------------------------------------------------------


def test_wrong_tensors_are_named_ten_at_most(
    config: dict[str, Any], state: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    extra = {**state, "first_stage_model.encoder.new.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 tensors: extra first_stage_model\.encoder\.new"):
        load_compvis(save(extra), config)
    unknown = {**state, "adapter.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"extra adapter\.weight"):
        load_compvis(save(unknown), config)
    misshapen = {**state, ema_name("out.2.bias"): torch.zeros(5)}
    with pytest.raises(ValueError, match=r"out2bias has shape \(5,\) for \(3,\)"):
        load_compvis(save(misshapen), config)
    missing = {k: v for k, v in state.items() if "attn1" not in k or "model_ema" not in k}
    with pytest.raises(ValueError, match=r"20 tensors: missing model_ema.*; and 10 more") as caught:
        load_compvis(save(missing), config)
    assert str(caught.value).count("missing") == 10
    assert "\n" not in str(caught.value)


def test_a_preset_of_another_size_does_not_fit(
    state: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=r"does not fit .* preset"):
        load_compvis(save(state), preset="rdm_ffhq")
    with pytest.raises(ValueError, match="'rdm' is none of rdm_imagenet, rdm_ffhq, rdm_768"):
        load_compvis(save(state), preset="rdm")


def test_not_a_checkpoint_at_all(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.ckpt"):
        load_compvis(tmp_path / "absent.ckpt", config)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="not tensors by name"):
        load_compvis(tmp_path / "list.ckpt", config)
    torch.save({"a": 1}, tmp_path / "numbers.ckpt")
    with pytest.raises(ValueError, match="no tensors by name"):
        load_compvis(tmp_path / "numbers.ckpt", config)
