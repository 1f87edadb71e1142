"""Reads the architecture from the json files of a pipeline folder.

Keys are those of diffusers' `UNet2DConditionModel`, `AutoencoderKL`, `VQModel` and discrete
schedulers. Each is used, is in one of the lists below of keys that change nothing here, or is
refused by name (`Settings`). An absent key means what it means to diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from retrodiff.checkpoints.foreign.parsed import read_json
from retrodiff.checkpoints.foreign.published import PUBLISHED, Architecture, recognized
from retrodiff.checkpoints.foreign.settings import Settings
from retrodiff.diffusion.schedule import ScaledLinear

ABOUT = ("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values")
"""Who wrote the file."""

UNET = ("use_linear_projection", "upcast_attention", "addition_embed_type_num_heads")
"""Projections of another shape that compute the same; the precision of attention; and a number of
an embedding that is refused."""

FIRST_STAGE = ("sample_size", "force_upcast", "lookup_from_codebook")
"""The size of training pictures; precision, which ``dtype`` chooses; and codes in place of latents
as the decoder's input, which the caller chooses."""

SAMPLING = (
    "clip_sample", "clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio",
    "set_alpha_to_one", "steps_offset", "timestep_spacing", "variance_type", "solver_order",
    "algorithm_type", "solver_type", "lower_order_final", "euler_at_final", "use_karras_sigmas",
    "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "lambda_min_clipped",
    "final_sigmas_type", "interpolation_type", "sigma_min", "sigma_max", "skip_prk_steps",
    "predictor_order", "corrector_order", "predict_x0", "disable_corrector", "solver_p",
    "tau_func", "flow_shift", "time_shift_type", "shift_terminal",
)  # fmt: skip
"""How diffusers samples from the network: which timesteps, of which order, and whether its
intermediate pictures are clipped, which no latent model of the family was made for. Here sampler
and schedule are components of their own, chosen by the caller."""

SCHEDULERS = (
    None, "DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler",
    "DDPMParallelScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""Schedulers that share the noise levels of the family and differ in how they step."""

LEVELS, BLOCKS = 10, 64
"""Most resolutions of a network, and most blocks and heads of one place."""


def read_architecture(folder: Path, first_stage: str, scale_factor: float | None) -> Architecture:
    """Reads the architecture of a pipeline folder from its json files.

    Args:
        folder: of the pipeline.
        first_stage: name of the folder of the first stage.
        scale_factor: of the latents; None: the folder's, else that of the published model with
            this architecture.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or of another family, or has a key that may change the
            numbers and is not known.
    """
    kind, numbers = _autoencoder(folder / first_stage / "config.json")
    unet = _unet(folder / "unet" / "config.json")
    latent = numbers["latent_channels"]
    for name in ("in_channels", "out_channels"):
        if unet[name] != latent:
            raise ValueError(
                f"{folder / 'unet' / 'config.json'} is of another model family: {name}="
                f"{unet[name]}, the latents of its first stage have {latent} channels"
            )
    found = recognized(
        Architecture(
            unet=unet,
            kind=kind,
            autoencoder=numbers,
            schedule=_schedule(folder / "scheduler" / "scheduler_config.json"),
        )
    )
    if scale_factor is None:
        scale_factor = numbers["scale_factor"]
    if scale_factor is None and found.name is not None:
        scale_factor = PUBLISHED[found.name].autoencoder.get("scale_factor", 1.0)
    if scale_factor is None and kind == "vq":
        scale_factor = 1.0
    if scale_factor is None:
        raise ValueError(
            f"{folder / first_stage}/config.json has no scaling_factor: hand in scale_factor=..."
        )
    return replace(found, autoencoder={**numbers, "scale_factor": scale_factor})


def _unet(file: Path) -> dict[str, Any]:
    config = _settings(file, "UNet2DConditionModel")
    config.only(
        {
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
            "act_fn": "silu",
            "downsample_padding": 1,
            "mid_block_scale_factor": 1,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "mid_block_only_cross_attention": (None, False),
            "center_input_sample": False,
            "class_embed_type": None,
            "class_embeddings_concat": False,
            "num_class_embeds": None,
            "projection_class_embeddings_input_dim": None,
            "addition_embed_type": None,
            "addition_time_embed_dim": None,
            "dual_cross_attention": False,
            "cross_attention_norm": None,
            "attention_type": "default",
            "num_attention_heads": None,  # diffusers refuses it, too
            "resnet_time_scale_shift": "default",
            "resnet_skip_time_act": False,
            "resnet_out_scale_factor": 1.0,
            "reverse_transformer_layers_per_block": None,
            "encoder_hid_dim": None,
            "encoder_hid_dim_type": None,
            "time_embedding_type": "positional",
            "time_embedding_act_fn": None,
            "timestep_post_act": None,
            "time_cond_proj_dim": None,
            "conv_in_kernel": 3,
            "conv_out_kernel": 3,
        }
    )
    only_cross = config.take("only_cross_attention", False)
    if any(only_cross) if isinstance(only_cross, list) else only_cross is not False:
        config.refuse("only_cross_attention", only_cross, "False")
    widths, multipliers = _widths(config)
    attends = _blocks(config, "down_block_types", "DownBlock2D", "CrossAttnDownBlock2D")
    up = _blocks(config, "up_block_types", "UpBlock2D", "CrossAttnUpBlock2D")
    if attends != up[::-1]:
        raise ValueError(f"{file} is of another model family: its two sides differ in attention")
    if len(attends) != len(widths):
        config.wrong("down_block_types", attends, f"{len(widths)} blocks, as block_out_channels")
    config.only({"time_embedding_dim": (None, 4 * widths[0])})
    numbers: dict[str, Any] = {
        "in_channels": config.whole("in_channels", 4),
        "out_channels": config.whole("out_channels", 4),
        "size": _size(config),
        "channels": widths[0],
        "multipliers": multipliers,
        "blocks_per_level": config.same("layers_per_block", 2, most=BLOCKS),
        "attention_factors": [2**level for level, a in enumerate(attends) if a],
        "context_width": config.same("cross_attention_dim", 1280, most=1 << 16),
        "depth": config.same("transformer_layers_per_block", 1, most=BLOCKS),
        "dropout": config.number("dropout", 0.0, above=-1e-9, below=1),
        **_heads(config, widths, [*attends[:-1], True]),
    }
    config.harmless(UNET)
    config.done()
    return numbers


def _size(config: Settings) -> int:
    given = config.take("sample_size", None)
    if given is None or (isinstance(given, list) and len(set(map(str, given))) > 1):
        what = "one number, the side of square latents: write it into a copy of the file"
        config.wrong("sample_size", given, what)
    return config.same("sample_size", most=4096)


def _heads(config: Settings, widths: list[int], attends: list[bool]) -> dict[str, int]:
    """Channels of a head, or heads: ``attention_head_dim`` is what diffusers calls the latter."""
    name = "attention_head_dim"
    given = config.take(name, 8)
    if isinstance(given, Sequence) and not isinstance(given, str):
        heads = config.wholes(name, longest=LEVELS)
    else:
        heads = [config.whole(name, 8)] * len(widths)
    if len(heads) != len(widths):
        config.wrong(name, given, f"{len(widths)} numbers, as block_out_channels")
    places = [(w, h) for w, h, a in zip(widths, heads, attends, strict=True) if a]
    if any(width % number for width, number in places):
        config.wrong(name, given, f"divisors of {[width for width, _ in places]}")
    if len({width // number for width, number in places}) == 1:
        return {"channels_per_head": places[0][0] // places[0][1]}
    if len({number for _, number in places}) == 1:
        return {"heads": places[0][1]}
    config.refuse(name, given, "one number of heads, or one of channels per head, for all levels")
    return {}


def _autoencoder(file: Path) -> tuple[Literal["vq", "kl"], dict[str, Any]]:
    config = _settings(file, "VQModel", "AutoencoderKL")
    kind = "kl" if config.values["_class_name"] == "AutoencoderKL" else "vq"
    config.only(
        {
            "norm_num_groups": 32,
            "act_fn": "silu",
            "shift_factor": (None, 0),
            "latents_mean": None,
            "latents_std": None,
            "norm_type": "group",
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "mid_block_add_attention": True,
        }
    )
    widths, multipliers = _widths(config)
    attends = _blocks(config, "down_block_types", "DownEncoderBlock2D", "AttnDownEncoderBlock2D")
    up = attends[::-1]  # the earliest folders say nothing about the decoder
    if config.take("up_block_types", None) is not None:
        up = _blocks(config, "up_block_types", "UpDecoderBlock2D", "AttnUpDecoderBlock2D")
    if attends != up[::-1]:
        raise ValueError(f"{file} is of another model family: its two sides differ in attention")
    if len(attends) != len(widths):
        config.wrong("down_block_types", attends, f"{len(widths)} blocks, as block_out_channels")
    image_channels = config.whole("in_channels", 3)
    if (out := config.whole("out_channels", 3)) != image_channels:
        config.refuse("out_channels", out, f"in_channels={image_channels}")
    scale = config.take("scaling_factor", None)
    numbers: dict[str, Any] = {
        "channels": widths[0],
        "multipliers": multipliers,
        "blocks_per_level": config.same("layers_per_block", 1, most=BLOCKS),
        "latent_channels": config.whole("latent_channels", 4 if kind == "kl" else 3),
        "attention_factors": [2**level for level, a in enumerate(attends) if a],
        "image_channels": image_channels,
        "scale_factor": (
            None if scale is None else config.number("scaling_factor", above=0, below=1e6)
        ),
    }
    if kind == "vq":
        numbers["feature_channels"] = numbers["latent_channels"]
        if config.take("vq_embed_dim", None) is not None:
            numbers["latent_channels"] = config.whole("vq_embed_dim")
        numbers["codes"] = config.whole("num_vq_embeddings", 256, most=1 << 24)
    config.harmless(FIRST_STAGE)
    config.done()
    return kind, numbers


def _schedule(file: Path) -> ScaledLinear:
    config = _settings(file, *SCHEDULERS)
    # What an absent beta_schedule, beta_start or beta_end means differs between schedulers.
    if config.take("beta_schedule") != "scaled_linear":
        config.refuse("beta_schedule", config.values["beta_schedule"], "'scaled_linear'")
    config.only(
        {
            "prediction_type": "epsilon",
            "trained_betas": None,
            "rescale_betas_zero_snr": False,
            "snr_shift_scale": None,
            "thresholding": False,
            "use_flow_sigmas": False,
            "use_dynamic_shifting": False,
            "timestep_type": "discrete",
        }
    )
    length = config.whole("num_train_timesteps", 1000, least=2, most=100_000)
    start = config.number("beta_start", above=0, below=1)
    end = config.number("beta_end", above=0, below=1)
    if end < start:
        config.wrong("beta_end", end, f"at least beta_start={start:g}")
    config.harmless(SAMPLING)
    config.done()
    return ScaledLinear(start, end, length)


def _settings(file: Path, *classes: str | None) -> Settings:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: fetch the whole pipeline folder")
    values = read_json(file)
    if values.get("_class_name") not in classes:
        known = " or ".join(name for name in classes if name) if len(classes) < 4 else "a discrete"
        known += " scheduler such as DDIMScheduler" if len(classes) >= 4 else ""
        raise ValueError(
            f"{file} is of another model family: a {values.get('_class_name')!s:.60}, expected "
            f"{known}"
        )
    settings = Settings(values, str(file), "fetch the whole pipeline folder again")
    settings.harmless(ABOUT)
    return settings


def _widths(config: Settings) -> tuple[list[int], list[int]]:
    """Channels of each level, and as multiples of the first's."""
    widths = config.wholes("block_out_channels", longest=LEVELS)
    if not widths or any(width % widths[0] for width in widths):
        config.refuse("block_out_channels", widths, "multiples of the first")
    return widths, [width // widths[0] for width in widths]


def _blocks(config: Settings, name: str, plain: str, attending: str) -> list[bool]:
    """Which levels attend."""
    kinds = config.take(name)
    if not isinstance(kinds, list) or len(kinds) > LEVELS:
        config.refuse(name, kinds, f"a list of {plain} and {attending}")
    for kind in kinds:
        if kind not in (plain, attending):
            raise ValueError(
                f"{config.where} is of another model family: it has a block {kind!r:.60}"
            )
    return [kind == attending for kind in kinds]
