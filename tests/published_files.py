"""Miniature files in the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrodiff.checkpoints.foreign.compvis import ema_name, read_config
from retrodiff.checkpoints.foreign.tensor_names import published_autoencoder, published_unet
from retrodiff.checkpoints.foreign.transfer import their_names


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


def write_checkpoint(path: Path, state: Any, **more: Any) -> Path:
    """What Lightning writes: the tensors, and whatever else training had in hand."""
    torch.save({"state_dict": state, **more}, path)
    return path
