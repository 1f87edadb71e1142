"""Maps names of our networks' tensors to those of published checkpoints and diffusers.

Each function returns ``{our module: their module}`` for every module that holds weights; ``weight``
and ``bias`` keep their names. The tables are the documentation of both layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Names = dict[str, str]

RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
DIFFUSERS_RES_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
TRANSFORMER = {"norm": "norm", "proj_in": "proj_in", "proj_out": "proj_out"}
TRANSFORMER_BLOCK = {
    "self_attention.norm": "norm1",
    "self_attention.to_q": "attn1.to_q",
    "self_attention.to_k": "attn1.to_k",
    "self_attention.to_v": "attn1.to_v",
    "self_attention.to_out": "attn1.to_out.0",
    "cross_attention.norm": "norm2",
    "cross_attention.to_q": "attn2.to_q",
    "cross_attention.to_k": "attn2.to_k",
    "cross_attention.to_v": "attn2.to_v",
    "cross_attention.to_out": "attn2.to_out.0",
    "feed_forward.norm": "norm3",
    "feed_forward.expand": "ff.net.0.proj",
    "feed_forward.reduce": "ff.net.2",
}
CODEC_RES_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "nin_shortcut",
}
CODEC_ATTENTION = {"norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
DIFFUSERS_CODEC_ATTENTION = {
    "norm": "group_norm",
    "to_q": "to_q",
    "to_k": "to_k",
    "to_v": "to_v",
    "to_out": "to_out.0",
}
DIFFUSERS_OLD_ATTENTION = {
    "norm": "group_norm",
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out": "proj_attn",
}
"""diffusers before 0.17; `fusing/rdm` is one of these."""


def published_unet(config: Mapping[str, Any]) -> Names:
    """Names below ``model.diffusion_model.`` for a UNet of this ``config()``."""
    names = {
        "time.0": "time_embed.0",
        "time.2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",
    }
    number = 1
    for stage, resize in _unet_places(config, "down"):
        if resize:
            names[f"{stage}.conv"] = f"input_blocks.{number}.0.op"
        else:
            names |= _stage(config, stage, f"input_blocks.{number}.0", f"input_blocks.{number}.1")
        number += 1
    names |= _stage(config, "middle.0", "middle_block.0", "middle_block.1")
    names |= _under("middle.1.res", "middle_block.2", RES_BLOCK)
    number = -1
    for stage, resize in _unet_places(config, "up"):
        if resize:
            # The upsampling shares a number with the stage before it, after its transformer.
            place = 2 if _attends(config, stage) else 1
            names[f"{stage}.conv"] = f"output_blocks.{number}.{place}.conv"
        else:
            number += 1
            names |= _stage(config, stage, f"output_blocks.{number}.0", f"output_blocks.{number}.1")
    return names


def diffusers_unet(config: Mapping[str, Any]) -> Names:
    """Names in a `UNet2DConditionModel` for a UNet of this ``config()``."""
    names = {
        "time.0": "time_embedding.linear_1",
        "time.2": "time_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    for side, resizer in (("down", "downsamplers"), ("up", "upsamplers")):
        for place, resize in _unet_places(config, side):
            level, rest = place.split(".")[1], place.split(".")[-1]
            block = f"{side}_blocks.{level}"
            if resize:
                names[f"{place}.conv"] = f"{block}.{resizer}.0.conv"
            else:
                resnet, attention = f"{block}.resnets.{rest}", f"{block}.attentions.{rest}"
                names |= _stage(config, place, resnet, attention, DIFFUSERS_RES_BLOCK)
    names |= _stage(
        config, "middle.0", "mid_block.resnets.0", "mid_block.attentions.0", DIFFUSERS_RES_BLOCK
    )
    return names | _under("middle.1.res", "mid_block.resnets.1", DIFFUSERS_RES_BLOCK)


def published_autoencoder(config: Mapping[str, Any]) -> Names:
    """Names below ``first_stage_model.`` for a VQ or KL autoencoder of this ``config()``."""
    names = _latent_names(config)
    levels = len(config["multipliers"])
    for half, side, blocks, resizer in _halves(config, "down", "up"):
        names |= _under(f"{half}.middle.0", f"{half}.mid.block_1", CODEC_RES_BLOCK)
        names |= _under(f"{half}.middle.1", f"{half}.mid.attn_1", CODEC_ATTENTION)
        names |= _under(f"{half}.middle.2", f"{half}.mid.block_2", CODEC_RES_BLOCK)
        for level in range(levels):
            # Levels are numbered from the finest; the decoder of ours counts in running order.
            finest = level if half == "encoder" else levels - 1 - level
            ours, theirs = f"{half}.levels.{level}", f"{half}.{side}.{finest}"
            for i in range(blocks):
                names |= _under(f"{ours}.blocks.{i}", f"{theirs}.block.{i}", CODEC_RES_BLOCK)
                if 2**finest in config["attention_factors"]:
                    names |= _under(f"{ours}.attentions.{i}", f"{theirs}.attn.{i}", CODEC_ATTENTION)
            names[f"{ours}.resize.conv"] = f"{theirs}.{resizer}.conv"
        for name in ("conv_in", "norm_out", "conv_out"):
            names[f"{half}.{name}"] = f"{half}.{name}"
    return names


def diffusers_autoencoder(config: Mapping[str, Any], *, old: bool = False) -> Names:
    """Names in a `VQModel` or `AutoencoderKL`; ``old`` for attention layers before 0.17."""
    attention = DIFFUSERS_OLD_ATTENTION if old else DIFFUSERS_CODEC_ATTENTION
    names = _latent_names(config)
    levels = len(config["multipliers"])
    for half, side, blocks, resizer in _halves(config, "down_blocks", "up_blocks"):
        mid = f"{half}.mid_block"
        names |= _under(f"{half}.middle.0", f"{mid}.resnets.0", DIFFUSERS_RES_BLOCK)
        names |= _under(f"{half}.middle.1", f"{mid}.attentions.0", attention)
        names |= _under(f"{half}.middle.2", f"{mid}.resnets.1", DIFFUSERS_RES_BLOCK)
        for level in range(levels):
            ours, theirs = f"{half}.levels.{level}", f"{half}.{side}.{level}"
            for i in range(blocks):
                names |= _under(f"{ours}.blocks.{i}", f"{theirs}.resnets.{i}", DIFFUSERS_RES_BLOCK)
                names |= _under(f"{ours}.attentions.{i}", f"{theirs}.attentions.{i}", attention)
            names[f"{ours}.resize.conv"] = f"{theirs}.{resizer}rs.0.conv"
        for name in ("conv_in", "conv_out"):
            names[f"{half}.{name}"] = f"{half}.{name}"
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
    return names


def published_transformer(config: Mapping[str, Any]) -> Names:
    """Names in an autoregressive checkpoint for a CausalTransformer of this ``config()``."""
    names = {"": "transformer", "embed": "transformer.proj_in", "out": "transformer.proj_out"}
    for i in range(config["depth"]):
        names |= _under(f"blocks.{i}", f"transformer.transformer_blocks.{i}", TRANSFORMER_BLOCK)
    return names


def _under(ours: str, theirs: str, table: Mapping[str, str]) -> Names:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in table.items()}


def _stage(
    config: Mapping[str, Any],
    ours: str,
    res: str,
    transformer: str,
    res_block: Mapping[str, str] = RES_BLOCK,
) -> Names:
    names = _under(f"{ours}.res", res, res_block)
    if _attends(config, ours):
        names |= _under(f"{ours}.transformer", transformer, TRANSFORMER)
        for i in range(config["depth"]):
            names |= _under(
                f"{ours}.transformer.blocks.{i}",
                f"{transformer}.transformer_blocks.{i}",
                TRANSFORMER_BLOCK,
            )
    return names


def _attends(config: Mapping[str, Any], place: str) -> bool:
    side, level = place.split(".")[:2]
    if side == "middle":
        return True
    last = len(config["multipliers"]) - 1
    factor = 2 ** (int(level) if side == "down" else last - int(level))
    return factor in config["attention_factors"]


def _unet_places(config: Mapping[str, Any], side: str) -> Iterator[tuple[str, bool]]:
    """Our stages and resizings of one side, in the order of the forward pass."""
    levels = len(config["multipliers"])
    for level in range(levels):
        for i in range(config["blocks_per_level"] + (side == "up")):
            yield f"{side}.{level}.stages.{i}", False
        if level < levels - 1:
            yield f"{side}.{level}.resize", True


def _halves(
    config: Mapping[str, Any], down: str, up: str
) -> tuple[tuple[str, str, int, str], tuple[str, str, int, str]]:
    blocks = config["blocks_per_level"]
    return ("encoder", down, blocks, "downsample"), ("decoder", up, blocks + 1, "upsample")


def _latent_names(config: Mapping[str, Any]) -> Names:
    names = {"to_latent": "quant_conv", "from_latent": "post_quant_conv"}
    return names | ({"codebook": "quantize.embedding"} if "codes" in config else {})
