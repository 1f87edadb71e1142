"""State dicts as trainers wrap them: prefixes, nesting, averaged weights beside, odd dtypes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_files import configuration, published_state
from torch import Tensor

from retrodiff.checkpoints.foreign.compvis import ema_name, load_compvis
from retrodiff.checkpoints.foreign.state_dicts import state_of

CONFIG = configuration()
STATE = published_state(CONFIG)
RAW, EMA = "model.diffusion_model.", "model_ema."
PLAIN = {name: tensor for name, tensor in STATE.items() if not name.startswith(EMA)}
AVERAGED = {
    name: STATE[ema_name(name.removeprefix(RAW))] if name.startswith(RAW) else tensor
    for name, tensor in PLAIN.items()
}
"""The averages under the names of the raw weights: a state dict of its own."""
Here = Path("model.ckpt")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    def loaded(content: Any, **options: Any) -> Any:
        torch.save(content, tmp_path / "model.ckpt")
        return load_compvis(tmp_path / "model.ckpt", CONFIG, **options)

    return loaded


def before(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def inside(wrapper: str) -> dict[str, Tensor]:
    """The UNet wrapped, so that its averages carry the name without dots."""
    word = wrapper.replace(".", "")
    return {
        name.replace(RAW, RAW + wrapper)
        .replace("model_ema.diffusion_model", f"{{}}{word}")
        .format("model_ema.diffusion_model"): tensor
        for name, tensor in STATE.items()
    }


WRAPPED: dict[str, Any] = {
    "bare": STATE,
    "data parallel": {"state_dict": before("module.")},
    "compiled": {"state_dict": before("_orig_mod.")},
    "both": {"state_dict": before("module._orig_mod.")},
    "compiled UNet": {"state_dict": inside("_orig_mod.")},
    "parallel UNet": {"state_dict": inside("module.")},
    "a name of one's own": {"state_dict": before("net.")},
    "a longer one": {"model": before("trainer.lightning_module.")},
    "nested in model": {"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "deepspeed": {"module": STATE, "global_steps": 3},
    "nested twice": {"checkpoint": {"state_dict": STATE}},
    "beside a counter": {"step": torch.tensor(3), "state_dict": STATE},
    "averages in ema": {"model": PLAIN, "ema": AVERAGED},
    "averages of a callback": {"state_dict": PLAIN, "callbacks": {"EMA": {"ema_model": AVERAGED}}},
    "averages only": {"ema": AVERAGED},
    "parameters": {"state_dict": {k: torch.nn.Parameter(v) for k, v in STATE.items()}},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_states_come_out_under_their_published_names(name: str) -> None:
    found = state_of(WRAPPED[name], Here)
    wanted = {k: v for k, v in STATE.items() if k.startswith("model_ema.diffusion_model")}
    wanted |= {k: v for k, v in PLAIN.items() if k.startswith("first_stage_model.encoder")}
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("name", ["both", "compiled UNet", "averages in ema"])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_wrapped_checkpoints_load(name: str, weights: Any, load: Callable[..., Any]) -> None:
    expected = STATE[ema_name("out.2.weight")] if weights == "ema" else STATE[f"{RAW}out.2.weight"]
    assert torch.equal(load(WRAPPED[name], weights=weights).unet.conv_out.weight, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": STATE, "b": STATE}, r"holds 2 state dicts \(a, b\)"),
        ({**STATE, **before("module.")}, "has two tensors for model.*with and without a wrapper"),
        ([STATE], "holds a list, not tensors by name"),
        ({"epoch": 3}, "no tensors by name"),
    ],
)
def test_what_cannot_be_told_apart_is_named(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        state_of(content, Here)
    assert "model.ckpt" in str(caught.value)


def test_missing_networks_are_named_with_what_is_there(load: Callable[..., Any]) -> None:
    unet = {name.removeprefix(RAW): t for name, t in PLAIN.items() if name.startswith(RAW)}
    with pytest.raises(ValueError, match=r"has no UNet \(model\.diffusion_model.*unet\.\* \(") as e:
        load(before("unet.", unet))
    assert "input_blocks" not in str(e.value)
    rest = {name: t for name, t in STATE.items() if not name.startswith("first_stage")}
    with pytest.raises(ValueError, match=r"no first stage .*begin with .*model_ema\.\* \(\d+\)"):
        load(rest)
    averaged = {name: t for name, t in STATE.items() if not name.startswith(RAW)}
    with pytest.raises(ValueError, match=r"averaged weights only .*ask for weights='ema'"):
        load(averaged, weights="raw")


# --- numbers -----------------------------------------------------------------------------------

KEY = ema_name("out.2.weight")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.complex64])
def test_dtypes_of_a_trainer_beside_the_weights(dtype: Any, load: Callable[..., Any]) -> None:
    beside = {**STATE, "posterior_x": torch.tensor([1.0, 2.0, 3.0]).to(dtype)}
    assert torch.equal(load(beside).unet.conv_out.weight, STATE[KEY])


def test_weights_in_float8(load: Callable[..., Any]) -> None:
    small = STATE[KEY].to(torch.float8_e4m3fn)
    assert torch.equal(load({**STATE, KEY: small}).unet.conv_out.weight, small.float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint16, torch.complex64, torch.bool])
def test_weights_that_are_no_floats_are_refused(dtype: Any, load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=rf"{KEY} has dtype {dtype}, weights are floating point"):
        load({**STATE, KEY: torch.ones_like(STATE[KEY]).to(dtype)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, load: Callable[..., Any]) -> None:
    broken = STATE[KEY].clone()
    broken.view(-1)[5] = value
    with pytest.raises(ValueError, match=rf"1 tensors .* not finite .*: {KEY}\. The training"):
        load({**STATE, KEY: broken})


def test_weights_that_half_precision_cannot_hold(load: Callable[..., Any]) -> None:
    wide = {**STATE, KEY: STATE[KEY] * 1e6}
    with pytest.raises(ValueError, match=rf"do not fit into torch\.float16: {KEY}.*bfloat16"):
        load(wide, dtype=torch.float16)
    assert load(wide, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_few_bytes_do_not_become_many_weights(load: Callable[..., Any]) -> None:
    """The same small storage under every name, strides of zero: 4 bytes that claim megabytes."""
    one = torch.ones(1)
    claims = {name: one.expand(t.shape) if t.ndim else t for name, t in STATE.items()}
    del claims["betas"], claims["alphas_cumprod"]
    with pytest.raises(ValueError, match=r"holds \d+ numbers, but shows [\d,]+ as weights"):
        load(claims)


# --- other files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>403", "a web page"),
        (b"\n<HTML><head>", "a web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "an answer in xml"),
        (b"\x1f\x8b\x08", "compressed with gzip"),
    ],
)
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_what_is_no_checkpoint_is_named(
    content: bytes, message: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_compvis(tmp_path / name, CONFIG)
    assert name in str(caught.value)


def test_a_checkpoint_inside_a_zip_is_named(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "model.ckpt", "w") as archive:
        archive.writestr("model.pth", b"0" * 10)
    with pytest.raises(ValueError, match=r"a zip archive with 'model\.pth' in it"):
        load_compvis(tmp_path / "model.ckpt", CONFIG)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_compvis(tmp_path, CONFIG)
