"""Folders in the layout of the diffusers library, such as the 768 model's ``fusing/rdm``.

``model_index.json`` beside ``unet/``, ``vae/`` or ``vqvae/``, and ``scheduler/``. The json files
are parsed and the weights read by name; the library itself is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from retrodiff.checkpoints.names import diffusers_autoencoder, diffusers_unet
from retrodiff.checkpoints.published import (
    PUBLISHED,
    Architecture,
    PublishedModel,
    Schedule,
    recognized,
)
from retrodiff.checkpoints.shards import load_shards
from retrodiff.checkpoints.transfer import Transfer, their_names

NAME = "diffusion_pytorch_model"


def load_diffusers(
    folder: str | Path,
    *,
    scale_factor: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> PublishedModel:
    """A pipeline folder, as networks.

    Args:
        folder: with ``unet/``, ``vae/`` or ``vqvae/``, and ``scheduler/``.
        scale_factor: of the latents; None: the folder's, else that of the published model with this
            architecture.
        dtype: of the networks.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the pipeline is of another family.
    """
    folder = Path(folder)
    if not (folder / "unet" / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no unet/config.json: hand in the folder of a diffusers pipeline"
        )
    first_stage = next((n for n in ("vqvae", "vae") if (folder / n).is_dir()), "vae")
    try:
        architecture = read_architecture(folder, first_stage, scale_factor)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{folder} is of another model family, or one of its json files is damaged: "
            f"{type(error).__name__} {error}"
        ) from error
    with torch.device("meta"):
        unet, autoencoder = architecture.build()

    networks = Transfer(str(folder / "unet"), _weights(folder / "unet"))
    names = diffusers_unet(unet.config())
    networks.plan(unet, names)
    networks.extra(sorted(networks.tensors.keys() - set(their_names(unet, names).values())))

    second = Transfer(str(folder / first_stage), _weights(folder / first_stage))
    old = any(".attentions.0.query." in name for name in second.tensors)
    names = diffusers_autoencoder(autoencoder.config(), old=old)
    second.plan(autoencoder, names)
    second.extra(sorted(second.tensors.keys() - set(their_names(autoencoder, names).values())))

    for transfer in (networks, second):
        transfer.check("Does its config.json belong to these weights?")
    for transfer in (networks, second):
        transfer.fill(dtype)
    return PublishedModel(
        unet=unet.eval(),
        autoencoder=autoencoder.eval(),
        schedule=architecture.schedule,
        scale=architecture.scale,
        name=architecture.name,
        weights="unknown",
        source=str(folder),
    )


def read_architecture(folder: Path, first_stage: str, scale_factor: float | None) -> Architecture:
    """The numbers of a pipeline folder, from its json files."""
    kind, autoencoder = _autoencoder(folder / first_stage / "config.json")
    found = recognized(
        Architecture(
            unet=_unet(folder / "unet" / "config.json"),
            kind=kind,
            autoencoder=autoencoder,
            schedule=_schedule(folder / "scheduler" / "scheduler_config.json"),
        )
    )
    if scale_factor is None:
        scale_factor = autoencoder["scale_factor"]
    if scale_factor is None and found.name is not None:
        scale_factor = PUBLISHED[found.name].autoencoder.get("scale_factor", 1.0)
    if scale_factor is None and kind == "vq":
        scale_factor = 1.0
    if scale_factor is None:
        raise ValueError(
            f"{folder / first_stage}/config.json has no scaling_factor: hand in scale_factor=..."
        )
    return Architecture(
        unet=found.unet,
        kind=kind,
        autoencoder={**autoencoder, "scale_factor": scale_factor},
        schedule=found.schedule,
        scale=found.scale,
        name=found.name,
    )


def _unet(file: Path) -> dict[str, Any]:
    config = _parsed(file, "UNet2DConditionModel")
    _expect(
        file,
        config,
        {
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
            "act_fn": "silu",
            "downsample_padding": 1,
            "mid_block_scale_factor": 1,
            "center_input_sample": False,
            "class_embed_type": None,
            "addition_embed_type": None,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "dual_cross_attention": False,
            "resnet_time_scale_shift": "default",
            "encoder_hid_dim": None,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "time_embedding_type": "positional",
        },
    )
    widths: list[int] = config["block_out_channels"]
    attends = [_block(file, kind, "Down") for kind in config["down_block_types"]]
    if attends != [_block(file, kind, "Up") for kind in reversed(config["up_block_types"])]:
        raise ValueError(f"{file} is of another model family: its two sides differ in attention")
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    heads = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    per_head = {w // h for w, h, a in zip(widths, heads, [*attends[:-1], True], strict=True) if a}
    if len(per_head) != 1:
        raise ValueError(
            f"{file} is of another model family: {sorted(per_head)} channels per head, not one "
            "number"
        )
    depth = config.get("transformer_layers_per_block", 1)
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "size": config["sample_size"],
        "channels": widths[0],
        "multipliers": [w // widths[0] for w in widths],
        "blocks_per_level": config["layers_per_block"],
        "attention_factors": [2**level for level, a in enumerate(attends) if a],
        "context_width": config["cross_attention_dim"],
        "channels_per_head": per_head.pop(),
        "depth": depth if isinstance(depth, int) else depth[0],
    }


def _block(file: Path, kind: str, side: str) -> bool:
    """Whether a block attends."""
    if kind in (f"{side}Block2D", f"CrossAttn{side}Block2D"):
        return kind.startswith("Cross")
    raise ValueError(f"{file} is of another model family: it has a block {kind!r}")


def _autoencoder(file: Path) -> tuple[Literal["vq", "kl"], dict[str, Any]]:
    config = _parsed(file, "VQModel", "AutoencoderKL")
    _expect(
        file,
        config,
        {
            "norm_num_groups": 32,
            "act_fn": "silu",
            "shift_factor": None,
            "norm_type": "group",
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "mid_block_add_attention": True,
        },
    )
    kind = "kl" if config["_class_name"] == "AutoencoderKL" else "vq"
    widths: list[int] = config["block_out_channels"]
    attends = [kind.startswith("Attn") for kind in config["down_block_types"]]
    numbers: dict[str, Any] = {
        "channels": widths[0],
        "multipliers": [w // widths[0] for w in widths],
        "blocks_per_level": config["layers_per_block"],
        "latent_channels": config["latent_channels"],
        "attention_factors": [2**level for level, a in enumerate(attends) if a],
        "image_channels": config["in_channels"],
        "scale_factor": config.get("scaling_factor"),
    }
    if kind == "vq":
        numbers["feature_channels"] = config["latent_channels"]
        numbers["latent_channels"] = config.get("vq_embed_dim") or config["latent_channels"]
        numbers["codes"] = config["num_vq_embeddings"]
    return kind, numbers


def _schedule(file: Path) -> Schedule:
    config = _parsed(file)
    _expect(file, config, {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"})
    return Schedule(
        length=config.get("num_train_timesteps", 1000),
        start=config["beta_start"],
        end=config["beta_end"],
    )


def _parsed(file: Path, *classes: str) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: fetch the whole pipeline folder")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no json file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no configuration")
    if classes and config.get("_class_name") not in classes:
        raise ValueError(
            f"{file} is of another model family: a {config.get('_class_name')}, expected "
            f"{' or '.join(classes)}"
        )
    return cast("dict[str, Any]", config)


def _expect(file: Path, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{file} is of another model family: {name}={config[name]!r}, expected {value!r}"
            )


def _weights(folder: Path) -> dict[str, Tensor]:
    """Safetensors where there are any, else a pickle that may hold tensors only."""
    pickled = folder / f"{NAME}.bin"
    has_safe = any((folder / f"{NAME}.safetensors{end}").is_file() for end in ("", ".index.json"))
    if has_safe or not pickled.is_file():
        return load_shards(folder, NAME)
    try:
        tensors = torch.load(pickled, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # many kinds, from the zip reader to the unpickler
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{pickled} is damaged, or holds more than tensors: {reason}") from error
    if not (isinstance(tensors, dict) and all(isinstance(t, Tensor) for t in tensors.values())):
        raise ValueError(f"{pickled} does not hold tensors by name")
    return cast("dict[str, Tensor]", tensors)
