"""Checkpoints in the published layout: made here, and damaged in every way they come."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from retrodiff.checkpoints.compvis import ema_name, load_compvis, read_config
from retrodiff.checkpoints.names import published_autoencoder, published_unet
from retrodiff.checkpoints.pickled import read_pickled
from retrodiff.checkpoints.published import PUBLISHED, Architecture
from retrodiff.checkpoints.transfer import their_names


def configuration(kind: str = "vq") -> dict[str, Any]:
    """A miniature of the published yaml."""
    kl = kind == "kl"
    unet = {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "attention_resolutions": [2],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "num_head_channels": 16,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 12,
    }
    graph = {
        "double_z": kl,
        "z_channels": 3,
        "resolution": 16,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [8] if kl else [],
    }
    first_stage = "AutoencoderKL" if kl else "VQModelInterface"
    params = {"embed_dim": 3, "ddconfig": graph} | ({} if kl else {"n_embed": 20})
    return {
        "model": {
            "target": "rdm.models.diffusion.ddpm.MinimalRETRODiffusion",
            "params": {
                "linear_start": 0.0015,
                "linear_end": 0.0195,
                "timesteps": 1000,
                "unet_config": {"target": "ldm.modules.openaimodel.UNetModel", "params": unet},
                "first_stage_config": {
                    "target": f"ldm.models.autoencoder.{first_stage}",
                    "params": params,
                },
            },
        }
    }


def published_state(config: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of such a model under their published names; raw, averaged and first stage."""
    torch.manual_seed(0)
    unet, autoencoder = read_config(config).build()
    state: dict[str, Tensor] = {}
    for own, name in their_names(unet, published_unet(unet.config())).items():
        tensor = unet.state_dict()[own]
        if own.rpartition(".")[0].endswith(("proj_in", "proj_out")) and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # published as 1x1 convolutions
        state[f"model.diffusion_model.{name}"] = torch.randn(tensor.shape)
        state[ema_name(name)] = torch.randn(tensor.shape)
    names = their_names(autoencoder, published_autoencoder(autoencoder.config()))
    for own, name in names.items():
        tensor = autoencoder.state_dict()[own]
        if ".to_" in own and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        state[f"first_stage_model.{name}"] = torch.randn(tensor.shape)
    state["betas"] = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    state["alphas_cumprod"] = (1 - state["betas"]).cumprod(0)
    state["model_ema.decay"] = torch.tensor(0.9999)
    state["first_stage_model.loss.discriminator.main.0.weight"] = torch.zeros(2, 2)
    return state


@pytest.fixture
def config() -> dict[str, Any]:
    return configuration()


@pytest.fixture
def state(config: dict[str, Any]) -> dict[str, Tensor]:
    return published_state(config)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(state: Any, **more: Any) -> Path:
        path = tmp_path / "model.ckpt"
        torch.save({"state_dict": state, **more}, path)
        return path

    return write


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
    assert (model.schedule.length, model.schedule.start, model.schedule.end) == (
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


# --- junk that training leaves behind, and code ------------------------------------------------


class Callback:
    """Stands for a class that the reader cannot import."""


def forged(path: Path, module: str, name: str, arguments: tuple[Any, ...]) -> Path:
    """A checkpoint whose pickle calls ``module.name(*arguments)``."""
    called = pickle.dumps(arguments, protocol=2)[2:-1]  # without header and STOP
    code = b"\x80\x02" + f"c{module}\n{name}\n".encode() + called + b"R."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", code)
    return path


def test_trainer_state_is_passed_over(
    config: dict[str, Any], state: dict[str, Tensor], save: Callable[..., Path], tmp_path: Path
) -> None:
    import argparse

    callback = Callback()
    callback.__dict__["best"] = torch.tensor(1.0)
    path = save(
        OrderedDict(state),
        callbacks={Callback: {"best_model_score": torch.tensor(0.3)}, "object": callback},
        optimizer_states=[{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{}]}],
        hyper_parameters=argparse.Namespace(path=Path("runs"), kind=torch.float32),
        lr_schedulers=[],
        device=torch.device("cpu"),
        seen={1, 2},
        blob=b"\x00\xff",
    )
    load_compvis(path, config)
    content = read_pickled(path)
    assert content["seen"] == {1, 2}
    assert content["blob"] == b"\x00\xff"
    (key, value), _ = content["callbacks"].items()
    assert key is not Callback
    assert value["best_model_score"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("subprocess", "Popen"),
        ("torch.hub", "load"),
        ("torch.utils._config_module", "load_config"),
        ("numpy.testing._private.utils", "runstring"),
        ("retrodiff.checkpoints.pickled", "read_pickled"),
    ],
)
def test_a_checkpoint_that_carries_code_is_refused(module: str, name: str, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    path = forged(tmp_path / "evil.ckpt", module, name, (f"touch {witness}",))
    with pytest.raises(ValueError, match=rf"wants to call {module}\.{name} .*nothing was run"):
        load_compvis(path, preset="rdm_imagenet")
    assert not witness.exists()


def test_code_hidden_among_the_weights_is_refused(
    config: dict[str, Any], state: dict[str, Tensor], save: Callable[..., Path], tmp_path: Path
) -> None:
    witness = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {witness}",)

    with pytest.raises(ValueError, match=r"wants to call (posix|nt)\.system"):
        load_compvis(save(state, callbacks=[Trap()]), config)
    assert not witness.exists()


def test_reading_imports_nothing(tmp_path: Path) -> None:
    path = forged(tmp_path / "m.ckpt", "pytorch_lightning.callbacks", "ModelCheckpoint", ())
    (tmp_path / "pytorch_lightning.py").write_text("raise SystemExit('imported')")
    code = (
        "import sys; from pathlib import Path;"
        "from retrodiff.checkpoints.pickled import read_pickled;"
        f"read_pickled(Path({str(path)!r})); assert 'pytorch_lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_agrees_with_torch_load(state: dict[str, Tensor], save: Callable[..., Path]) -> None:
    odd = {
        "transposed": torch.randn(4, 6).T,
        "slice": torch.randn(10)[2:7],
        "shared": state["betas"],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        **{str(d): torch.ones(3, dtype=d) for d in (torch.bfloat16, torch.float64, torch.bool)},
    }
    path = save({**state, **odd})
    expected = torch.load(path, weights_only=True)["state_dict"]
    found = read_pickled(path)["state_dict"]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor.detach()), name


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_says_so(
    keep: float, config: dict[str, Any], state: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    path = save(state)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(ValueError, match="is truncated"):
        load_compvis(path, config)


def test_a_damaged_pickle_says_so(config: dict[str, Any], tmp_path: Path) -> None:
    for number, code in enumerate([b"", b"\x80\x02", b"\x80\x02}q\x00X\xff\xff", b"\x80\x02Nb."]):
        path = tmp_path / f"{number}.ckpt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/data.pkl", code)
        with pytest.raises(ValueError, match=r"(damaged|no tensors|not tensors)"):
            load_compvis(path, config)


def test_a_tensor_cannot_reach_out_of_its_data(tmp_path: Path) -> None:
    from retrodiff.checkpoints.pickled import CALLS

    rebuild = CALLS["torch._utils", "_rebuild_tensor_v2"]
    storage = torch.arange(6)
    assert rebuild(storage, 2, (2, 2), (2, 1), False, None).tolist() == [[2, 3], [4, 5]]
    for offset, size, stride in [(3, (2, 2), (2, 1)), (0, (7,), (1,)), (-1, (2,), (1,))]:
        with pytest.raises(ValueError, match="reaches out"):
            rebuild(storage, offset, size, stride)


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


def test_not_a_checkpoint_at_all(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.ckpt"):
        load_compvis(tmp_path / "absent.ckpt", config)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="not tensors by name"):
        load_compvis(tmp_path / "list.ckpt", config)
    torch.save({"a": 1}, tmp_path / "numbers.ckpt")
    with pytest.raises(ValueError, match="no tensors by name"):
        load_compvis(tmp_path / "numbers.ckpt", config)


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models_are_recognized(name: str) -> None:
    known = PUBLISHED[name]
    config = configuration(known.kind)
    unet = config["model"]["params"]["unet_config"]["params"]
    unet |= {
        "in_channels": known.unet["in_channels"],
        "model_channels": known.unet["channels"],
        "channel_mult": known.unet["multipliers"],
        "attention_resolutions": known.unet["attention_factors"][::-1],
        "context_dim": known.unet["context_width"],
    }
    found = read_config(config)
    assert (found.name, found.scale) == (name, known.scale)


def test_an_unpublished_model_has_no_known_scale(config: dict[str, Any]) -> None:
    found = read_config(config)
    assert isinstance(found, Architecture)
    assert (found.name, found.scale) == (None, None)
