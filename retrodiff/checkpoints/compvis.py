"""The paper's checkpoints: a Lightning ``.ckpt`` and the yaml that it was trained with.

The yaml is parsed for its numbers; the classes it names are compared as text and never imported.
Weights are the averaged (EMA) ones unless asked otherwise: the samples of the paper are theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from retrodiff.checkpoints.names import published_autoencoder, published_unet
from retrodiff.checkpoints.pickled import read_pickled
from retrodiff.checkpoints.published import (
    PUBLISHED,
    Architecture,
    PublishedModel,
    Schedule,
    recognized,
)
from retrodiff.checkpoints.transfer import Transfer, their_names

RAW, EMA, FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."

BESIDES = re.compile(
    r"(betas|alphas_cumprod(_prev)?|sqrt_.*|log_.*|posterior_.*|lvlb_weights|logvar|scale_factor"
    r"|unconditional_guidance_vex|model_ema\.(decay|num_updates)|first_stage_model\.loss\..*"
    r"|cond_stage_model\..*)"
)
"""Tensors of a checkpoint that belong to its training, not to its networks."""


def load_compvis(
    path: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    preset: str | None = None,
    *,
    weights: Literal["ema", "raw"] = "ema",
    first_stage: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> PublishedModel:
    """A checkpoint in the published layout, as networks.

    Args:
        path: the ``.ckpt``, or the same tensors under the same names as ``.safetensors``.
        config: its yaml, or what is in it; None: the numbers of ``preset``, else a yaml beside the
            checkpoint.
        preset: name of a published model.
        weights: the averaged weights or those of the last step.
        first_stage: a file of its own for the first stage, where ``path`` doesn't hold one.
        dtype: of the networks.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, would run code, or does not fit the architecture.
    """
    path = Path(path)
    architecture = _architecture(path, config, preset)
    tensors = read_tensors(path)
    with torch.device("meta"):
        unet, autoencoder = architecture.build()

    transfer = Transfer(str(path), tensors)
    names = published_unet(unet.config())
    raw = {f"{RAW}{name}" for name in their_names(unet, names).values()}
    ema = {ema_name(name) for name in their_names(unet, names).values()}
    if weights == "ema":
        if not any(name in tensors for name in ema) and any(name in tensors for name in raw):
            raise ValueError(
                f"{path} has no averaged weights ({EMA}*): ask for weights='raw', or take the full "
                "checkpoint"
            )
        transfer.plan(unet, names, ema_name)
    else:
        transfer.plan(unet, names, lambda name: f"{RAW}{name}")

    names = published_autoencoder(autoencoder.config())
    own = {f"{FIRST_STAGE}{name}" for name in their_names(autoencoder, names).values()}
    second = transfer
    if first_stage is not None:
        second = Transfer(str(first_stage), _first_stage_tensors(Path(first_stage)))
        second.extra(sorted(n for n in second.tensors.keys() - own if not BESIDES.fullmatch(n)))
    elif not any(name.startswith(FIRST_STAGE) for name in tensors):
        raise ValueError(
            f"{path} has no first stage ({FIRST_STAGE}*): hand in its file as first_stage=..."
        )
    second.plan(autoencoder, names, lambda name: f"{FIRST_STAGE}{name}")

    known = raw | ema | own
    transfer.extra(sorted(n for n in tensors.keys() - known if not BESIDES.fullmatch(n)))
    hint = "Is this the yaml (or the preset) that belongs to the checkpoint?"
    transfer.check(hint)
    second.check(hint)
    _check_schedule(path, tensors, architecture.schedule)

    transfer.fill(dtype)
    if second is not transfer:
        second.fill(dtype)
    return PublishedModel(
        unet=unet.eval(),
        autoencoder=autoencoder.eval(),
        schedule=architecture.schedule,
        scale=architecture.scale,
        name=architecture.name,
        weights=weights,
        source=str(path),
    )


def ema_name(name: str) -> str:
    """Name of the average of ``model.diffusion_model.{name}``: dots get lost."""
    return EMA + f"diffusion_model.{name}".replace(".", "")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.ckpt`` or ``.safetensors`` by name, memory-mapped."""
    if path.suffix == ".safetensors":
        from retrodiff.checkpoints.shards import load_shards

        return load_shards(path)
    content = read_pickled(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not tensors by name")
    tensors = {k: t for k, t in state.items() if isinstance(k, str) and isinstance(t, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name: it is no checkpoint of a model")
    return tensors


def read_config(config: str | Path | Mapping[str, Any]) -> Architecture:
    """The numbers of a published yaml.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no yaml, or one of another model family.
    """
    what = "the configuration"
    if not isinstance(config, Mapping):
        what = str(config)
        config = _parsed(Path(config))
    try:
        params = config["model"]["params"]
        unet = _unet(_section(params, "unet_config", ("UNetModel",), what), what)
        kind, first_stage = _autoencoder(params, what)
        schedule = Schedule(
            length=int(params.get("timesteps", 1000)),
            start=float(params["linear_start"]),
            end=float(params["linear_end"]),
        )
        if params.get("beta_schedule", "linear") != "linear":
            raise ValueError(f"{what} has beta_schedule={params['beta_schedule']!r}, not 'linear'")
        if params.get("parameterization", "eps") != "eps":
            raise ValueError(f"{what} has a network that predicts {params['parameterization']!r}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{what} is not the configuration of a latent diffusion model with neighbors ({error} "
            "not found): hand in the yaml that was published with the checkpoint"
        ) from error
    return recognized(
        Architecture(unet=unet, kind=kind, autoencoder=first_stage, schedule=schedule)
    )


def _architecture(
    path: Path, config: str | Path | Mapping[str, Any] | None, preset: str | None
) -> Architecture:
    if config is not None:
        return read_config(config)
    if preset is not None:
        if preset not in PUBLISHED:
            raise ValueError(f"preset={preset!r} is none of {', '.join(PUBLISHED)}")
        return PUBLISHED[preset]
    beside = [path.with_suffix(".yaml"), *sorted(path.parent.glob("*.yaml"))]
    found = [file for file in beside if file.is_file()]
    if len(set(found)) == 1 or (found and found[0] == beside[0]):
        return read_config(found[0])
    raise ValueError(
        f"{path} says nothing about its architecture, and there are {len(found)} yaml files beside "
        f"it: hand in config=... (its yaml) or preset=... (one of {', '.join(PUBLISHED)})"
    )


def _parsed(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no yaml file: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no configuration")
    return cast("Mapping[str, Any]", content)


def _section(
    params: Mapping[str, Any], name: str, targets: tuple[str, ...], what: str
) -> Mapping[str, Any]:
    section = params[name]
    target = str(section["target"]).rpartition(".")[2]
    if target not in targets:
        raise ValueError(
            f"{what} is of another model family: its {name} is {section['target']!r}, expected "
            f"{' or '.join(targets)}"
        )
    return section["params"]


def _unet(params: Mapping[str, Any], what: str) -> dict[str, Any]:
    expected: dict[str, Any] = {
        "use_spatial_transformer": True,
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        "conv_resample": True,
        "num_classes": None,
        "n_embed": None,
        "dims": 2,
    }
    for name, value in expected.items():
        given = params.get(name, False if name == "use_spatial_transformer" else value)
        if given != value:
            raise ValueError(
                f"{what} is of another model family: its UNet has {name}={given!r}, this one has "
                f"{value!r}"
            )
    if params.get("num_head_channels", -1) == -1:
        raise ValueError(
            f"{what} is of another model family: its UNet has a number of heads instead of "
            "num_head_channels"
        )
    return {
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "size": params["image_size"],
        "channels": params["model_channels"],
        "multipliers": list(params["channel_mult"]),
        "blocks_per_level": params["num_res_blocks"],
        "attention_factors": list(params["attention_resolutions"]),
        "context_width": params["context_dim"],
        "channels_per_head": params["num_head_channels"],
        "depth": params.get("transformer_depth", 1),
    }


def _autoencoder(
    params: Mapping[str, Any], what: str
) -> tuple[Literal["vq", "kl"], dict[str, Any]]:
    targets = ("VQModelInterface", "VQModel", "AutoencoderKL")
    section = _section(params, "first_stage_config", targets, what)
    kind = "kl" if params["first_stage_config"]["target"].endswith("KL") else "vq"
    graph = section["ddconfig"]
    numbers: dict[str, Any] = {
        "channels": graph["ch"],
        "multipliers": list(graph["ch_mult"]),
        "blocks_per_level": graph["num_res_blocks"],
        "latent_channels": section["embed_dim"],
        "feature_channels": graph["z_channels"],
        "attention_factors": [graph["resolution"] // r for r in graph["attn_resolutions"]],
        "image_channels": graph["in_channels"],
        "scale_factor": float(params.get("scale_factor", 1.0)),
    }
    if kind == "vq":
        numbers["codes"] = section["n_embed"]
    return kind, numbers


def _first_stage_tensors(path: Path) -> dict[str, Tensor]:
    """Of a file that holds a first stage only, with or without the prefix."""
    tensors = read_tensors(path)
    inside = {k: v for k, v in tensors.items() if k.startswith(FIRST_STAGE)}
    return inside or {
        f"{FIRST_STAGE}{k}": v for k, v in tensors.items() if not k.startswith("model_ema.")
    }


def _check_schedule(path: Path, tensors: Mapping[str, Tensor], schedule: Schedule) -> None:
    """The noise levels in the file, where it has them, against the yaml's."""
    stored = tensors.get("alphas_cumprod")
    if stored is None:
        return
    ours = schedule.alphas_cumprod
    if stored.shape != ours.shape or not torch.allclose(stored.double(), ours, atol=2e-3):
        raise ValueError(
            f"{path} was trained with {len(stored)} noise levels down to alphas_cumprod="
            f"{float(stored[-1]):.4g}, the configuration gives {len(ours)} down to "
            f"{float(ours[-1]):.4g}: the two do not belong together"
        )
