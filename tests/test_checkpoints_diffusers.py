"""Pipeline folders that diffusers itself wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrodiff.checkpoints.foreign.diffusers import load_diffusers

diffusers = pytest.importorskip("diffusers", reason="diffusers, the oracle, is not installed")

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([5, 700])
CONTEXT = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2))
IMAGES = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def networks(kind: str, **changes: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": (2, 4),
            **changes,
        }
    ).eval()
    graph = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "scaling_factor": 0.25,
    }
    first_stage = getattr(diffusers, kind)(
        **graph, **({"num_vq_embeddings": 30} if kind == "VQModel" else {})
    ).eval()
    return unet, first_stage


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(kind: str = "AutoencoderKL", *, safe: bool = True, **changes: Any) -> Path:
        unet, first_stage = networks(kind, **changes)
        scheduler = diffusers.DDIMScheduler(
            beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear"
        )
        unet.save_pretrained(tmp_path / "unet", safe_serialization=safe)
        name = "vae" if kind == "AutoencoderKL" else "vqvae"
        first_stage.save_pretrained(tmp_path / name, safe_serialization=safe)
        scheduler.save_pretrained(tmp_path / "scheduler")
        return tmp_path

    return write


def close(found: Tensor, expected: Tensor) -> bool:
    return ((found - expected).norm() / expected.norm()).item() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_folder_gives_the_same_numbers(kind: str, safe: bool, save: Callable[..., Path]) -> None:
    model = load_diffusers(save(kind, safe=safe))
    unet, first_stage = networks(kind)
    assert close(model.unet(X, T, CONTEXT), unet(X, T, CONTEXT).sample)
    encoded = first_stage.encode(IMAGES)
    latent = encoded.latents if kind == "VQModel" else encoded.latent_dist.mode()
    assert close(model.autoencoder.encode(IMAGES), latent * 0.25)
    assert close(model.autoencoder.decode(latent * 0.25), first_stage.decode(latent).sample)
    assert (model.schedule.length, model.schedule.beta_start, model.schedule.beta_end) == (
        1000, 0.0015, 0.0195,
    )  # fmt: skip
    assert (model.scale, model.name, model.weights) == (None, None, "unknown")


@torch.no_grad()
def test_linear_projections_and_shards(save: Callable[..., Path]) -> None:
    folder = save(use_linear_projection=True)
    unet, _ = networks("AutoencoderKL", use_linear_projection=True)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert close(load_diffusers(folder).unet(X, T, CONTEXT), unet(X, T, CONTEXT).sample)


def test_attention_names_of_old_folders(save: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = save()
    expected = load_diffusers(folder).autoencoder.state_dict()
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, name in old.items():
        state = {k.replace(f".{new}.", f".{name}."): v for k, v in state.items()}
    save_file(state, file)
    found = load_diffusers(folder).autoencoder.state_dict()
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_scale_factor_is_asked_for_where_nothing_says_it(save: Callable[..., Path]) -> None:
    folder = save()
    edit(folder / "vae" / "config.json", scaling_factor=None)
    with pytest.raises(ValueError, match="hand in scale_factor="):
        load_diffusers(folder)
    assert load_diffusers(folder, scale_factor=0.5).scale_factor == 0.5


def test_a_pickle_with_code_is_refused(save: Callable[..., Path]) -> None:
    folder = save(safe=False)
    witness = folder / "ran"

    class Trap:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {witness}",)

    torch.save({"conv_in.weight": Trap()}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="more than tensors"):
        load_diffusers(folder)
    assert not witness.exists()


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], {"a": 1}, b"\x80\x02}q\x00."], ids=["list", "number", "bytes"]
)
def test_a_pickle_that_holds_no_tensors_by_name(content: Any, save: Callable[..., Path]) -> None:
    folder = save(safe=False)
    file = folder / "unet" / "diffusion_pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=r"model\.bin (does not hold|is damaged)") as error:
        load_diffusers(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json"])
@pytest.mark.parametrize("damage", ["keys", "list", "truncated"])
def test_damaged_configurations_say_so(file: str, damage: str, save: Callable[..., Path]) -> None:
    path = save() / file
    config = json.loads(path.read_text())
    text = {"keys": json.dumps({"_class_name": config["_class_name"]}), "list": "[]"}
    path.write_text(text.get(damage, path.read_text()[:50]))
    with pytest.raises(ValueError, match=r"block_out_channels|no configuration|no json") as error:
        load_diffusers(path.parents[1])
    assert "\n" not in str(error.value)


def edit(file: Path, **changes: Any) -> None:
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v is not None}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet", {"_class_name": "UNet2DModel"}, "a UNet2DModel, expected UNet2DConditionModel"),
        ("unet", {"act_fn": "mish"}, "act_fn='mish', expected 'silu'"),
        ("unet", {"down_block_types": ["AttnDownBlock2D"] * 2}, "it has a block 'AttnDownBlock2D'"),
        ("unet", {"attention_head_dim": [1, 2], "up_block_types": ["UpBlock2D"] * 2}, "two sides"),
        ("unet", {"cross_attention_dim": 20}, r"has shape \(\d+, 16\) for \(\d+, 20\)"),
        ("unet", {"layers_per_block": 2}, "tensors: missing .*and .. more"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "a AutoencoderTiny, expected VQModel or"),
        ("scheduler", {"beta_schedule": "linear"}, "beta_schedule='linear'"),
        ("scheduler", {"prediction_type": "v_prediction"}, "prediction_type='v_prediction'"),
    ],
)
def test_another_family_says_what_differs(
    file: str, changes: dict[str, Any], message: str, save: Callable[..., Path]
) -> None:
    folder = save()
    name = "scheduler_config.json" if file == "scheduler" else "config.json"
    edit(folder / file / name, **changes)
    with pytest.raises(ValueError, match=message):
        load_diffusers(folder)


def test_missing_and_truncated_files(save: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no unet/config\.json"):
        load_diffusers(tmp_path)
    folder = save()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated"):
        load_diffusers(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"diffusion_pytorch_model\.safetensors"):
        load_diffusers(folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="fetch the whole pipeline folder"):
        load_diffusers(folder)
