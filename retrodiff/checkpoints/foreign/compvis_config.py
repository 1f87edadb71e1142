"""Reads the architecture from the yaml of a published checkpoint.

Its keys are those of latent-diffusion and of the paper's models. Each is used, is in one of the
lists below of keys that change nothing here, or is refused by name (`Settings`). The classes that
the file names are compared as text and never imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from retrodiff.checkpoints.foreign.parsed import read_yaml
from retrodiff.checkpoints.foreign.published import Architecture, recognized
from retrodiff.checkpoints.foreign.published_tokens import TokenArchitecture
from retrodiff.checkpoints.foreign.settings import Settings
from retrodiff.checkpoints.foreign.transformer_config import read_transformer
from retrodiff.diffusion.schedule import ScaledLinear

OTHER_SECTIONS = ("data", "lightning", "init_weights")
"""How training was run, and on what."""

TRAINING = (
    "monitor", "log_every_t", "first_stage_key", "loss_type", "original_elbo_weight",
    "l_simple_weight", "learn_logvar", "logvar_init", "scheduler_config", "ckpt_path",
    "ignore_keys", "load_only_unet", "use_ema", "unet_trainable", "ucg_training", "finetune_keys",
    "reset_ema", "reset_num_ema_updates",
)  # fmt: skip
"""What training logged, weighted, loaded and kept: not part of what the networks compute."""

CONDITION = (
    "cond_stage_config", "cond_stage_key", "cond_stage_trainable", "cond_stage_forward",
    "concat_mode", "k_nn", "query_key", "nn_key", "nn_memory", "retrieval_cfg", "searcher_path",
    "query_encoder_cfg", "retro_conditioning_key", "resize_patch_size", "guidance_vex_shape",
)  # fmt: skip
"""Where the tokens come from: here the caller's encoder and database give them."""

SAMPLING = ("clip_denoised", "cosine_s", "use_positional_encodings")
"""Read by no latent model of the family: it never clips, and these serve other schedules."""

UNET = ("use_checkpoint", "use_fp16", "legacy", "use_new_attention_order", "num_heads_upsample",
        "use_linear_in_transformer")  # fmt: skip
"""Memory and precision; attention without a transformer, which is refused; and the shape of
projections that compute the same."""

FIRST_STAGE = (
    "monitor", "lossconfig", "ckpt_path", "ignore_keys", "image_key", "batch_resize_range",
    "scheduler_config", "lr_g_factor", "use_ema", "ema_decay", "learn_logvar", "sane_index_shape",
)  # fmt: skip
"""How the first stage was trained, and the shape in which it hands out numbers of codes."""

HINT = (
    "this is not the configuration of a latent diffusion model with neighbors, hand in the yaml "
    "that was published with the checkpoint"
)
LEVELS, BLOCKS = 10, 64
"""Most resolutions of a network, and most blocks and heads of one place."""


def read_config(config: str | Path | Mapping[str, Any]) -> Architecture | TokenArchitecture:
    """Reads the architecture in a published yaml, of a diffusion or an autoregressive model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no yaml, one of another model family, or has a key that may change the
            numbers and is not known.
    """
    what = "the configuration"
    if not isinstance(config, Mapping):
        what = str(config)
        config = read_yaml(Path(config))
    top = Settings(config, what, HINT)
    model = top.section("model")
    top.harmless(OTHER_SECTIONS)
    top.done()
    model.take("target", None)
    model.harmless(("base_learning_rate",))
    params = model.section("params")
    model.done()
    params.where = what
    if "transformer_config" in params.values:
        return _tokens(params)

    unet = _unet(_network(params, "unet_config", ("UNetModel",)))
    targets = ("VQModelInterface", "VQModel", "AutoencoderKL")
    first_stage = _network(params, "first_stage_config", targets)
    kind: Literal["vq", "kl"] = (
        "kl" if str(params.values["first_stage_config"]["target"]).endswith("KL") else "vq"
    )
    numbers = _autoencoder(first_stage, kind)
    numbers["scale_factor"] = params.number("scale_factor", 1.0, above=0, below=1e6)
    unet["size"] = params.whole("image_size", unet["size"], most=4096)
    _check_channels(params, unet, numbers["latent_channels"])
    found = Architecture(
        unet=unet,
        kind=kind,
        autoencoder=numbers,
        schedule=_schedule(params),
        scaled_by_std=_process(params),
    )
    return recognized(found) if _embeddings(params) else found


def _tokens(params: Settings) -> TokenArchitecture:
    """Of an autoregressive model."""
    section = _network(params, "transformer_config", ("RetrievalPatchTransformer",))
    transformer = read_transformer(params, section)
    first_stage = _network(params, "first_stage_config", ("VQModel", "VQModelInterface"))
    numbers = _autoencoder(first_stage, "vq")
    if numbers["codes"] != transformer["codes"]:
        params.refuse(
            "first_stage_config, n_embed", numbers["codes"], f"out_channels={transformer['codes']}"
        )
    params.harmless((*TRAINING, *CONDITION))
    params.done()
    return TokenArchitecture(transformer=transformer, autoencoder=numbers).recognized()


def _schedule(params: Settings) -> ScaledLinear:
    params.only({"beta_schedule": "linear", "given_betas": None})
    length = params.whole("timesteps", 1000, least=2, most=100_000)
    start = params.number("linear_start", above=0, below=1)
    end = params.number("linear_end", above=0, below=1)
    if end < start:
        params.wrong("linear_end", end, f"at least linear_start={start:g}")
    return ScaledLinear(start, end, length)


def _process(params: Settings) -> bool:
    """What else of the diffusion process must be as here; whether the scale is in the file."""
    params.only(
        {
            "conditioning_key": (None, "crossattn", "retro_only"),
            "v_posterior": 0,
            "num_timesteps_cond": (None, 1),
            "retrieval_encoder_cfg": (None, {"target": "torch.nn.Identity"}),
            "nn_encoder_cfg": None,
            "learn_nn_encoder": False,
            "retro_noise": False,
            "k_nn_max_noise": 0,
            "retro_concat": False,
            "aggregate": False,
            "n_patches_per_side": 1,
        }
    )
    predicts = params.take("parameterization", "eps")
    if predicts != "eps":
        raise ValueError(f"{params.where} has a network that predicts {predicts!r}, not the noise")
    dropped = params.number("p_uncond", 0.0, above=-1e-9, below=1 + 1e-9)
    if dropped:
        warnings.warn(
            f"{params.where} has p_uncond={dropped:g}: the model was trained with a null condition "
            "of its own (unconditional_guidance_vex), which is not read. Guidance takes zeros: "
            "hand in null=... where that matters",
            stacklevel=4,
        )
    scaled = params.take("scale_by_std", False)
    if not isinstance(scaled, bool):
        params.wrong("scale_by_std", scaled, "true or false")
    params.harmless((*TRAINING, *CONDITION, *SAMPLING))
    params.done()
    return scaled


def _embeddings(params: Settings) -> bool:
    """Whether the tokens are embeddings as they are, not those of a conditioner trained with it."""
    condition = params.values.get("cond_stage_config")
    if isinstance(condition, Mapping):
        return str(condition.get("target")).rpartition(".")[2] == "Identity"
    return condition in (None, "__is_unconditional__")


def _network(params: Settings, name: str, targets: tuple[str, ...]) -> Settings:
    section = params.section(name)
    target = section.take("target")
    if str(target).rpartition(".")[2] not in targets:
        raise ValueError(
            f"{params.where} is of another model family: its {name} is {target!r:.80}, expected "
            f"{' or '.join(targets)}"
        )
    found = section.section("params")
    section.done()
    found.where = f"{params.where}, {name}"
    return found


def _unet(params: Settings) -> dict[str, Any]:
    spatial = params.take("use_spatial_transformer", False)
    if spatial is not True:
        params.refuse("use_spatial_transformer", spatial, "True")
    params.only(
        {
            "use_scale_shift_norm": False,
            "resblock_updown": False,
            "conv_resample": True,
            "num_classes": None,
            "adm_in_channels": None,
            "n_embed": None,
            "dims": 2,
            "num_attention_blocks": None,
            "disable_middle_self_attn": False,
            "spatial_transformer_attn_type": ("softmax", "softmax-xformers"),
        }
    )
    without = params.take("disable_self_attentions", None)
    if without is not None and without is not False and any(_items(without)):
        params.refuse("disable_self_attentions", without, "None")
    multipliers = params.wholes("channel_mult", longest=LEVELS, most=1024)
    numbers: dict[str, Any] = {
        "in_channels": params.whole("in_channels"),
        "out_channels": params.whole("out_channels"),
        "size": params.whole("image_size", most=4096),
        "channels": params.whole("model_channels"),
        "multipliers": multipliers,
        "blocks_per_level": params.same("num_res_blocks", most=BLOCKS),
        "attention_factors": params.wholes("attention_resolutions", longest=64, shortest=0),
        "context_width": params.same("context_dim", most=1 << 16),
        "depth": params.same("transformer_depth", 1, most=BLOCKS),
        "dropout": params.number("dropout", 0.0, above=-1e-9, below=1),
    }
    per_head = params.whole("num_head_channels", -1, least=-1)
    heads = params.whole("num_heads", -1, least=-1)
    if per_head > 0:
        numbers["channels_per_head"] = per_head
    elif heads > 0:
        numbers["heads"] = heads
    else:
        raise ValueError(
            f"{params.where} has neither num_head_channels nor num_heads, so the heads of its "
            "attention are unknown"
        )
    params.harmless(UNET)
    params.done()
    return numbers


def _autoencoder(params: Settings, kind: Literal["vq", "kl"]) -> dict[str, Any]:
    graph = params.section("ddconfig")
    graph.only(
        {
            "double_z": (kind == "kl",),
            "resamp_with_conv": True,
            "attn_type": ("vanilla", "vanilla-xformers"),
            "use_linear_attn": False,
            "tanh_out": False,
            "give_pre_end": False,
        }
    )
    multipliers = graph.wholes("ch_mult", longest=LEVELS, most=1024)
    resolution = graph.whole("resolution")
    attended = graph.wholes("attn_resolutions", longest=64, shortest=0)
    if attended and resolution % 2 ** (len(multipliers) - 1):
        graph.wrong("resolution", resolution, f"a multiple of {2 ** (len(multipliers) - 1)}")
    image_channels = graph.whole("in_channels")
    if (out := graph.whole("out_ch")) != image_channels:
        graph.refuse("out_ch", out, f"in_channels={image_channels}")
    graph.harmless(("dropout",))  # of training; the first stage is not trained here
    numbers: dict[str, Any] = {
        "channels": graph.whole("ch"),
        "multipliers": multipliers,
        "blocks_per_level": graph.same("num_res_blocks", most=BLOCKS),
        "latent_channels": params.whole("embed_dim"),
        "feature_channels": graph.whole("z_channels"),
        "attention_factors": [
            2**level for level in range(len(multipliers)) if resolution // 2**level in attended
        ],
        "image_channels": image_channels,
    }
    graph.done()
    if kind == "vq":
        numbers["codes"] = params.whole("n_embed", most=1 << 24)
    params.only({"remap": None, "colorize_nlabels": None})
    params.harmless(FIRST_STAGE)
    params.done()
    return numbers


def _check_channels(params: Settings, unet: Mapping[str, Any], latent: int) -> None:
    """The UNet takes and gives what the first stage has: no masks or pictures beside the latent."""
    for name, given in (
        ("unet_config, in_channels", unet["in_channels"]),
        ("unet_config, out_channels", unet["out_channels"]),
        ("channels", params.take("channels", latent)),
    ):
        if given != latent:
            params.refuse(name, given, f"{latent}, the channels of the first stage's latents")


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
