"""The paper's checkpoints: a Lightning ``.ckpt`` and the yaml that it was trained with.

The yaml is parsed for its numbers; the classes it names are compared as text and never imported.
Weights are the averaged (EMA) ones unless asked otherwise: the samples of the paper are theirs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from retrodiff.checkpoints.foreign.compvis_config import read_config
from retrodiff.checkpoints.foreign.lookalikes import check_weights_file
from retrodiff.checkpoints.foreign.published import PUBLISHED, Architecture, PublishedModel
from retrodiff.checkpoints.foreign.published_tokens import (
    PUBLISHED_TOKENS,
    PublishedTransformer,
    TokenArchitecture,
)
from retrodiff.checkpoints.foreign.state_dicts import (
    EMA,
    FIRST_STAGE,
    RAW,
    beginnings,
    ema_name,
    state_of,
)
from retrodiff.checkpoints.foreign.tensor_names import (
    published_autoencoder,
    published_transformer,
    published_unet,
)
from retrodiff.checkpoints.foreign.torch_files import read_pickled
from retrodiff.checkpoints.foreign.transfer import Transfer, their_names
from retrodiff.diffusion.schedule import ScaledLinear

__all__ = ["ema_name", "load_compvis", "read_config", "read_tensors"]

BESIDES = re.compile(
    r"(betas|alphas_cumprod(_prev)?|sqrt_.*|log_.*|posterior_.*|lvlb_weights|logvar|scale_factor"
    r"|unconditional_guidance_vex|model_ema\.(decay|num_updates)|first_stage_model\.loss\..*"
    r"|first_stage_model\.model_ema\..*|cond_stage_model\..*)"
)
"""Tensors of a checkpoint that belong to its training, or to a conditioner that is not read.

The noise levels and ``scale_factor`` among them are compared with the configuration.
"""


START, MASKED = "sos_token", "mask_token"
"""Buffers of an autoregressive checkpoint: the input before the first code, and an unused one."""

CLASSES = "cond_stage_model.embedding.weight"
"""The tokens of a class-conditional model, one for each class."""


def load_compvis(
    path: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    preset: str | None = None,
    *,
    weights: Literal["ema", "raw"] = "ema",
    first_stage: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> PublishedModel | PublishedTransformer:
    """Loads the networks of a checkpoint in the published layout.

    A diffusion model becomes a `PublishedModel`, an autoregressive one (RARM) a
    `PublishedTransformer`.

    Args:
        path: the ``.ckpt``, or the same tensors under the same names as ``.safetensors``.
        config: its yaml, or what is in it; None: the numbers of ``preset``, else a yaml beside the
            checkpoint.
        preset: name of a published model.
        weights: the averaged weights or those of the last step; autoregressive checkpoints hold
            the latter only, and this is not looked at.
        first_stage: a file of its own for the first stage, where ``path`` doesn't hold one.
        dtype: of the networks.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, would run code, does not fit the architecture, or holds
            weights that are not finite.
    """
    path = Path(path)
    architecture = _architecture(path, config, preset)
    tensors = read_tensors(path)
    if isinstance(architecture, TokenArchitecture):
        return _transformer(path, tensors, architecture, first_stage, dtype)
    architecture = _scaled(path, tensors, architecture)
    with torch.device("meta"):
        unet, autoencoder = architecture.build()

    transfer = Transfer(str(path), tensors)
    names = published_unet(unet.config())
    raw = {f"{RAW}{name}" for name in their_names(unet, names).values()}
    ema = {ema_name(name) for name in their_names(unet, names).values()}
    _check_weights(path, tensors, weights, raw, ema)
    transfer.plan(unet, names, ema_name if weights == "ema" else lambda name: f"{RAW}{name}")

    second, own = _first_stage(transfer, path, first_stage, autoencoder)
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
        classes=_classes(path, tensors, unet.context_width),
    )


def _transformer(
    path: Path,
    tensors: Mapping[str, Tensor],
    architecture: TokenArchitecture,
    first_stage: str | Path | None,
    dtype: torch.dtype,
) -> PublishedTransformer:
    """An autoregressive checkpoint: ``transformer.*`` beside the first stage."""
    with torch.device("meta"):
        transformer, autoencoder = architecture.build()
    transfer = Transfer(str(path), tensors)
    names = published_transformer(transformer.config())
    mine = set(their_names(transformer, names).values())
    if not mine & tensors.keys():
        raise ValueError(
            f"{path} has no transformer (transformer.*): the names of its tensors begin with "
            f"{beginnings(tensors)}"
        )
    transfer.plan(transformer, names)
    second, own = _first_stage(transfer, path, first_stage, autoencoder)
    known = mine | own | {START, MASKED}
    transfer.extra(sorted(n for n in tensors.keys() - known if not BESIDES.fullmatch(n)))
    hint = "Is this the yaml (or the preset) that belongs to the checkpoint?"
    transfer.check(hint)
    second.check(hint)
    start = tensors.get(START)
    if start is not None and start.flatten().tolist() != [transformer.start]:
        raise ValueError(
            f"{path} starts an image with token {start.flatten().tolist()}, the configuration's "
            f"network with {transformer.start}: the two do not belong together"
        )
    transfer.fill(dtype)
    if second is not transfer:
        second.fill(dtype)
    return PublishedTransformer(
        transformer=transformer.eval(),
        autoencoder=autoencoder.eval(),
        scale=architecture.scale,
        name=architecture.name,
        weights="raw",
        source=str(path),
    )


def _first_stage(
    transfer: Transfer, path: Path, file: str | Path | None, autoencoder: nn.Module
) -> tuple[Transfer, set[str]]:
    """Plans the first stage; returns whence it comes, and the names of its tensors there."""
    names = published_autoencoder(autoencoder.config())  # type: ignore[operator]
    own = {f"{FIRST_STAGE}{name}" for name in their_names(autoencoder, names).values()}
    second = transfer
    if file is not None:
        second = Transfer(str(file), _first_stage_tensors(Path(file)))
        second.extra(sorted(n for n in second.tensors.keys() - own if not BESIDES.fullmatch(n)))
    elif not any(name.startswith(FIRST_STAGE) for name in transfer.tensors):
        raise ValueError(
            f"{path} has no first stage ({FIRST_STAGE}*; the names of its tensors begin with "
            f"{beginnings(transfer.tensors)}): hand in its file as first_stage=..."
        )
    second.plan(autoencoder, names, lambda name: f"{FIRST_STAGE}{name}")
    return second, own


def _classes(path: Path, tensors: Mapping[str, Tensor], width: int | None) -> Tensor | None:
    """The tokens of a class-conditional model in float32, where the file holds them."""
    table = tensors.get(CLASSES)
    if table is None or table.ndim != 2 or table.shape[1] != width or table.is_meta:
        return None
    if not table.is_floating_point() or not bool(table.isfinite().all()):
        raise ValueError(
            f"{path} has a {CLASSES} that is not of finite numbers: the file is damaged"
        )
    return table.detach().to("cpu", torch.float32, copy=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.ckpt`` or ``.safetensors`` by name, memory-mapped."""
    check_weights_file(path)
    if path.suffix == ".safetensors":
        from retrodiff.checkpoints.sharded import load_shards

        return state_of(load_shards(path), path)
    return state_of(read_pickled(path), path)


def _check_weights(
    path: Path, tensors: Mapping[str, Tensor], weights: str, raw: set[str], ema: set[str]
) -> None:
    """That the file has the kind of weights that was asked for."""
    if any(name in tensors for name in (ema if weights == "ema" else raw)):
        return
    if weights == "ema" and any(name in tensors for name in raw):
        raise ValueError(
            f"{path} has no averaged weights ({EMA}*): ask for weights='raw', or take the full "
            "checkpoint"
        )
    if weights == "raw" and any(name in tensors for name in ema):
        raise ValueError(f"{path} has averaged weights only ({EMA}*): ask for weights='ema'")
    raise ValueError(
        f"{path} has no UNet ({RAW}*, {EMA}*): the names of its tensors begin with "
        f"{beginnings(tensors)}"
    )


def _architecture(
    path: Path, config: str | Path | Mapping[str, Any] | None, preset: str | None
) -> Architecture | TokenArchitecture:
    known = {**PUBLISHED, **PUBLISHED_TOKENS}
    if config is not None:
        return read_config(config)
    if preset is not None:
        if preset not in known:
            raise ValueError(f"preset={preset!r} is none of {', '.join(known)}")
        return known[preset]
    beside = [path.with_suffix(".yaml"), *sorted(path.parent.glob("*.yaml"))]
    found = [file for file in beside if file.is_file()]
    if len(set(found)) == 1 or (found and found[0] == beside[0]):
        return read_config(found[0])
    raise ValueError(
        f"{path} says nothing about its architecture, and there are {len(found)} yaml files beside "
        f"it: hand in config=... (its yaml) or preset=... (one of {', '.join(known)})"
    )


def _first_stage_tensors(path: Path) -> dict[str, Tensor]:
    """Of a file that holds a first stage only, with or without the prefix."""
    tensors = read_tensors(path)
    inside = {k: v for k, v in tensors.items() if k.startswith(FIRST_STAGE)}
    return inside or {
        f"{FIRST_STAGE}{k}": v for k, v in tensors.items() if not k.startswith("model_ema.")
    }


def _scaled(path: Path, tensors: Mapping[str, Tensor], architecture: Architecture) -> Architecture:
    """With the factor of the latents that training measured, where the file holds one."""
    given = float(architecture.autoencoder.get("scale_factor", 1.0))
    stored = tensors.get("scale_factor")
    if stored is None:
        if architecture.scaled_by_std:
            raise ValueError(
                f"{path} has no tensor scale_factor, but its configuration says scale_by_std: "
                "true, so the scale of the latents is unknown: write scale_factor (one over their "
                "standard deviation) and scale_by_std: false into a copy of the configuration"
            )
        return architecture
    value = float(stored.reshape(-1)[0]) if stored.numel() == 1 else math.nan
    if not 0 < value < 1e6:
        raise ValueError(f"{path} has a scale_factor of {value:g}: the file is damaged")
    if architecture.scaled_by_std:
        return replace(
            architecture, autoencoder={**architecture.autoencoder, "scale_factor": value}
        )
    if not math.isclose(value, given, rel_tol=1e-2):
        raise ValueError(
            f"{path} holds scale_factor={value:g}, which training measured, but the configuration "
            f"gives {given:g}: hand in its own configuration as config=..., with scale_by_std: true"
        )
    return architecture


def _check_schedule(path: Path, tensors: Mapping[str, Tensor], schedule: ScaledLinear) -> None:
    """The noise levels in the file, where it has them, against the configuration's."""
    ours = schedule.alphas_cumprod
    for name, expected in (("alphas_cumprod", ours), ("betas", schedule.betas)):
        stored = tensors.get(name)
        if stored is None:
            continue
        room = 1e-3 if stored.dtype in (torch.float32, torch.float64) else 1e-2
        same = stored.shape == expected.shape and torch.allclose(
            stored.double(), expected, rtol=room, atol=room * 1e-3
        )
        if not same:
            last = f"{float(stored.reshape(-1)[-1]):.4g}" if stored.numel() else "nothing"
            raise ValueError(
                f"{path} was trained with {stored.numel()} noise levels down to {name}={last}, the "
                f"configuration gives {len(expected)} down to {float(expected[-1]):.4g}: the two "
                "do not belong together"
            )
