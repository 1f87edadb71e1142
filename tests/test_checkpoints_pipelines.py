"""The json files and weight files of pipelines: every key of diffusers, variants, shards."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from retrodiff.checkpoints.foreign.diffusers import load_diffusers
from retrodiff.checkpoints.foreign.diffusers_config import read_architecture
from retrodiff.checkpoints.foreign.load import load_published
from retrodiff.checkpoints.foreign.pipeline_files import chosen

diffusers = pytest.importorskip("diffusers", reason="diffusers, the oracle, is not installed")

UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": (2, 4),
}
VAE = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "scaling_factor": 0.25,
}
SCHEDULE = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
NAME = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline as diffusers writes it."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    diffusers.DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def pipeline(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "pipeline")
    return tmp_path / "pipeline"


FILES = {"unet": "config.json", "vae": "config.json", "scheduler": "scheduler_config.json"}


def edit(folder: Path, part: str, **changes: Any) -> None:
    file = folder / part / FILES[part]
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def read(folder: Path) -> Any:
    return read_architecture(folder, "vae", None)


def outcome(folder: Path) -> Any:
    """The architecture, or why there is none."""
    try:
        return read(folder)
    except ValueError as error:
        return str(error)


# --- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("scheduler", {"trained_betas": [0.1] * 1000}, "trained_betas=a list of 1000"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ("scheduler", {"prediction_type": "sample"}, "prediction_type='sample'"),
        ("scheduler", {"thresholding": True}, "thresholding=True"),
        ("scheduler", {"timestep_type": "continuous"}, "timestep_type='continuous'"),
        ("scheduler", {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "a FlowMatchEuler"),
        ("scheduler", {"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000"),
        ("scheduler", {"beta_end": 0.001}, "beta_end=0.001, expected at least beta_start=0.0015"),
        ("scheduler", {"beta_start": None}, "beta_start=None, expected a number"),
        ("scheduler", {"shiny": 1}, "has shiny, which is not known to this version"),
        ("unet", {"time_embedding_act_fn": "gelu"}, "time_embedding_act_fn='gelu'"),
        ("unet", {"timestep_post_act": "silu"}, "timestep_post_act='silu'"),
        ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
        ("unet", {"time_embedding_dim": 64}, "time_embedding_dim=64, expected None or 128"),
        ("unet", {"resnet_out_scale_factor": 1.4}, "resnet_out_scale_factor=1.4"),
        ("unet", {"conv_in_kernel": 1}, "conv_in_kernel=1"),
        ("unet", {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type='text_proj'"),
        ("unet", {"only_cross_attention": [True, False]}, "only_cross_attention="),
        ("unet", {"num_attention_heads": 8}, "num_attention_heads=8"),
        ("unet", {"attention_head_dim": [2, 5]}, r"attention_head_dim=\[2, 5\], expected divisors"),
        ("unet", {"attention_head_dim": [2, 4, 8]}, "attention_head_dim=.*expected 2 numbers"),
        ("unet", {"attention_head_dim": None}, "attention_head_dim=None"),
        ("unet", {"sample_size": [8, 12]}, r"sample_size=\[8, 12\], expected one number"),
        ("unet", {"sample_size": None}, "sample_size=None, expected one number"),
        ("unet", {"layers_per_block": [1, 2]}, r"layers_per_block=\[1, 2\]"),
        ("unet", {"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block="),
        ("unet", {"block_out_channels": [32, 2**40]}, "block_out_channels=1099511627776"),
        ("unet", {"block_out_channels": [32] * 100}, "block_out_channels=a list of 100"),
        ("unet", {"block_out_channels": [64, 96]}, "expected multiples of the first"),
        ("unet", {"in_channels": 9}, "family: in_channels=9, the latents .* have 4 channels"),
        ("unet", {"out_channels": 8}, "family: out_channels=8"),
        ("unet", {"qk_norm": "rms"}, "has qk_norm, which is not known"),
        ("vae", {"latents_mean": [0.1] * 4}, "latents_mean="),
        ("vae", {"latents_std": [2.0] * 4}, "latents_std="),
        ("vae", {"shift_factor": 0.1}, "shift_factor=0.1"),
        ("vae", {"use_quant_conv": False}, "use_quant_conv=False"),
        ("vae", {"mid_block_add_attention": False}, "mid_block_add_attention=False"),
        ("vae", {"out_channels": 6}, "out_channels=6, expected in_channels=3"),
        ("vae", {"scaling_factor": 0}, "scaling_factor=0, expected a number between 0"),
        ("vae", {"up_block_types": ["AttnUpDecoderBlock2D"] * 2}, "two sides differ"),
        ("vae", {"down_block_types": ["DownEncoderBlock2D"]}, "two sides differ|2 blocks"),
    ],
)
def test_what_changes_numbers_is_refused_by_name(
    part: str, changes: dict[str, Any], message: str, pipeline: Path
) -> None:
    edit(pipeline, part, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        read(pipeline)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_beta_schedule_is_not_taken_for_the_right_one(pipeline: Path) -> None:
    """To diffusers its absence means ``linear``."""
    file = pipeline / "scheduler" / FILES["scheduler"]
    config = json.loads(file.read_text())
    del config["beta_schedule"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks beta_schedule"):
        read(pipeline)


@pytest.mark.parametrize(
    ("part", "classes"),
    [
        ("unet", ["UNet2DConditionModel"]),
        ("vae", ["AutoencoderKL", "VQModel"]),
        ("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"]),
        ("scheduler", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDPMScheduler"]),
    ],
)
def test_every_key_of_diffusers_is_known(part: str, classes: list[str], pipeline: Path) -> None:
    """All of them with their defaults load; an odd value is used, or means nothing, or is named."""
    file = pipeline / part / FILES[part]
    for name in classes:
        own = json.loads(file.read_text())
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        keep = {**UNET, **VAE, **SCHEDULE, "_class_name": name, "latent_channels": 4}
        config = {**defaults, **{k: v for k, v in keep.items() if k in defaults or k[0] == "_"}}
        if part == "unet":
            config["block_out_channels"] = UNET["block_out_channels"]
            config |= {k: v for k, v in UNET.items() if "types" in k}
        file.write_text(json.dumps(config))
        before = read(pipeline)
        for key in defaults:
            file.write_text(json.dumps({**config, key: "an odd value"}))
            found = outcome(pipeline)
            named = str(found)
            assert found == before or key in named or "block 'a" in named or "two sides" in named
        file.write_text(json.dumps(own))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (8, {"heads": 8}),
        ([8, 8], {"heads": 8}),
        ([4, 8], {"channels_per_head": 8}),
        ([1, 2], {"channels_per_head": 32}),
    ],
)
def test_attention_head_dim_is_the_number_of_heads(
    given: Any, expected: dict[str, int], pipeline: Path
) -> None:
    both = {"down_block_types": ["CrossAttnDownBlock2D"] * 2}
    edit(pipeline, "unet", attention_head_dim=given, **both)
    edit(pipeline, "unet", up_block_types=["CrossAttnUpBlock2D"] * 2)
    unet = read(pipeline).unet
    assert {k: v for k, v in unet.items() if "head" in k} == expected


@torch.no_grad()
def test_one_number_of_heads_gives_the_same_numbers(tmp_path: Path, pipeline: Path) -> None:
    torch.manual_seed(1)
    attending = {
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "attention_head_dim": 8,
    }
    theirs = diffusers.UNet2DConditionModel(**{**UNET, **attending}).eval()
    theirs.save_pretrained(pipeline / "unet")
    ours = load_diffusers(pipeline).unet
    assert ours.heads == 8
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randn(2, 3, 16)
    expected = theirs.double()(x.double(), t, context.double()).sample
    found = ours.double()(x.double(), t, context.double())
    assert float((found - expected).norm() / expected.norm()) < 1e-12


# --- files -------------------------------------------------------------------------------------


@pytest.fixture
def variants(pipeline: Path) -> Callable[..., Path]:
    def write(**options: Any) -> Path:
        """The weights of both parts again, under other names only."""
        for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
            network = getattr(diffusers, kind).from_pretrained(pipeline / part)
            for file in (pipeline / part).glob(f"{NAME}*"):
                file.rename(pipeline / f"{part}-{file.name}")
            network.save_pretrained(pipeline / part, **options)
        return pipeline

    return write


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "fp16"},
        {"variant": "non_ema"},
        {"variant": "fp16", "safe_serialization": False},
        {"safe_serialization": False, "max_shard_size": "200KB"},
        {"variant": "fp16", "max_shard_size": "200KB"},
        {"variant": "fp16", "safe_serialization": False, "max_shard_size": "200KB"},
    ],
    ids=str,
)
def test_the_only_weights_are_read_whatever_they_are_called(
    options: dict[str, Any], written: Path, variants: Callable[..., Path]
) -> None:
    expected = load_diffusers(written).unet.state_dict()
    found = load_diffusers(variants(**options)).unet.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_full_weights_come_first_and_a_variant_is_asked_for(pipeline: Path) -> None:
    for part in ("unet", "vae"):
        (pipeline / part / f"{NAME}.fp16.safetensors").write_bytes(b"nothing to read")
    load_diffusers(pipeline)
    with pytest.raises(ValueError, match=r"fp16\.safetensors is damaged or no file of tensors"):
        load_diffusers(pipeline, variant="fp16")
    with pytest.raises(FileNotFoundError, match=r"no weights of variant='bf16': it has 'fp16'"):
        load_published(pipeline, variant="bf16")


def test_several_variants_are_named(pipeline: Path) -> None:
    weights = pipeline / "unet" / f"{NAME}.safetensors"
    shutil.copy(weights, pipeline / "unet" / f"{NAME}.fp16.safetensors")
    weights.rename(pipeline / "unet" / f"{NAME}.non_ema.safetensors")
    with pytest.raises(ValueError, match="say variant='fp16' or variant='non_ema'"):
        load_diffusers(pipeline)


def test_missing_shards_and_weights_are_named(variants: Callable[..., Path]) -> None:
    folder = variants(safe_serialization=False, max_shard_size="200KB")
    shard = next((folder / "unet").glob(f"{NAME}-00002-*.bin"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name} is missing, {NAME}\.bin\.index"):
        load_diffusers(folder)
    index = folder / "unet" / f"{NAME}.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../vae/other.bin"}}))
    with pytest.raises(ValueError, match="shards lie beside their index"):
        load_diffusers(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        load_diffusers(folder)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"unet has no .*\.safetensors or \.bin"):
        load_diffusers(folder)


def test_a_single_part_is_no_pipeline(pipeline: Path) -> None:
    with pytest.raises(ValueError, match="one part of a diffusers pipeline: hand in the folder"):
        load_published(pipeline / "unet" / f"{NAME}.safetensors")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"{NAME}.bin", f"{NAME}.safetensors"], f"{NAME}.safetensors"),
        ([f"{NAME}.bin", f"{NAME}.fp16.safetensors"], f"{NAME}.bin"),
        ([f"{NAME}.safetensors.index.json", f"{NAME}-00001-of-00002.safetensors"],
         f"{NAME}.safetensors.index.json"),
        ([f"{NAME}.fp16.bin", f"{NAME}.fp16.safetensors"], f"{NAME}.fp16.safetensors"),
        (["flax_model.msgpack", "config.json"], None),
    ],
)  # fmt: skip
def test_which_file_is_opened(names: list[str], expected: str | None) -> None:
    assert chosen(names, "unet") == expected


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, {".safetensors"}),
        ({"safe_serialization": False, "max_shard_size": "200KB"}, {".bin"}),
        ({"variant": "fp16"}, {".safetensors"}),
        ({"variant": "fp16", "safe_serialization": False, "max_shard_size": "200KB"}, {".bin"}),
    ],
    ids=str,
)
def test_a_pipeline_on_the_hub_is_fetched_with_its_weights(
    options: dict[str, Any],
    kinds: set[str],
    variants: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repository = variants(**options)
    if not options:  # a variant beside full weights stays where it is
        for part in ("unet", "vae"):
            (repository / part / f"{NAME}.fp16.safetensors").write_bytes(b"x")
    fetched: set[str] = set()

    def download(repo: str, *, allow_patterns: list[str], **_: Any) -> str:
        for file in repository.rglob("*"):
            name = str(file.relative_to(repository))
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                fetched.add(name)
                (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_published("someone/pipeline").scale_factor == 0.25
    weights = {name for name in fetched if not name.endswith(".json")}
    assert {Path(name).suffix for name in weights} == kinds
    assert options or not any("fp16" in name for name in weights)
