"""Checks the description of an encoder in a file against lists of what is allowed.

A name or an argument that a file gives to open_clip or timm is interpreted there: some names are
addresses, some arguments fetch files or run code that lies beside the weights. From a file, only
names that those packages know themselves are taken, and arguments of a fixed list, each of its own
kind. Anything else is taken only from the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

from retrodiff.text import printable

Check = Callable[[Any], bool]


def _whole(least: int, most: int) -> Check:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x <= most


def _real(least: float, most: float) -> Check:
    return lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and least <= x <= most


def _word(x: Any) -> bool:
    return isinstance(x, str) and re.fullmatch(r"[a-z_]{0,32}", x) is not None


def _flag(x: Any) -> bool:
    return isinstance(x, bool)


def _listed(check: Check, most: int) -> Check:
    return lambda x: isinstance(x, list) and len(x) <= most and all(map(check, x))


def _or(*checks: Check) -> Check:
    return lambda x: any(check(x) for check in checks)


def _none(x: Any) -> bool:
    return x is None


_WIDTH, _SIDE, _SHARE = _whole(1, 2**20), _whole(1, 2048), _real(0, 1)
_SIDES = _or(_SIDE, _listed(_SIDE, 2))


def _known_in_timm(x: Any) -> bool:
    return isinstance(x, str) and unknown_timm(x) is None


PREPROCESSING: dict[str, dict[str, Check]] = {
    "Channels": {"n": _whole(1, 64)},
    "Resize": {"size": _SIDES, "mode": _word, "antialias": _flag, "align_corners": _flag},
    "Squash": {"size": _SIDES, "mode": _word},
    "ResizeShort": {"size": _SIDE, "mode": _word},
    "ResizeAround": {"size": _SIDES, "mode": _word, "inside": _flag},
    "CenterCrop": {"size": _SIDES, "fill": _or(_real(-1, 1), _listed(_real(-1, 1), 64))},
    "Normalize": {name: _listed(_real(-1e6, 1e6), 64) for name in ("mean", "std")},
}
"""Arguments of each step of a preprocessing."""

COMMON: dict[str, Check] = {"batch_size": _whole(1, 4096)}
TIMM: dict[str, Check] = {
    **COMMON, "image_size": _SIDES, "in_chans": _whole(1, 64), "pretrained": _flag,
    "img_size": _SIDES, "patch_size": _SIDES, "embed_dim": _WIDTH, "depth": _whole(1, 256),
    "num_heads": _whole(1, 1024), "mlp_ratio": _real(0, 64), "global_pool": _word,
    "class_token": _flag, "reg_tokens": _whole(0, 64), "no_embed_class": _flag, "pre_norm": _flag,
    "fc_norm": _or(_flag, _none), "final_norm": _flag, "qkv_bias": _flag, "qk_norm": _flag,
    "init_values": _or(_real(0, 1), _none), "dynamic_img_size": _flag, "dynamic_img_pad": _flag,
    "drop_rate": _SHARE, "drop_path_rate": _SHARE, "proj_drop_rate": _SHARE,
    "attn_drop_rate": _SHARE, "patch_drop_rate": _SHARE, "output_stride": _whole(1, 64),
    "depths": _listed(_whole(1, 256), 8), "dims": _listed(_WIDTH, 8), "width": _WIDTH,
    "channels": _or(_WIDTH, _listed(_WIDTH, 8)), "layers": _listed(_whole(1, 256), 8),
}  # fmt: skip
"""Arguments of `TimmEncoder` that a file may give."""

_VARIANTS: dict[str, Check] = {
    "block_type": _or(_word, _none), "qk_norm": _flag, "scaled_cosine_attn": _flag,
    "scale_heads": _flag, "scale_attn_inner": _flag, "scale_attn": _flag, "scale_fc": _flag,
}  # fmt: skip
VISION: dict[str, Check] = {
    **_VARIANTS,
    "layers": _or(_whole(1, 256), _listed(_whole(1, 256), 4)), "width": _WIDTH,
    "head_width": _WIDTH, "mlp_ratio": _real(0, 64), "patch_size": _or(_SIDE, _none),
    "image_size": _SIDES, "ls_init_value": _or(_real(0, 1), _none), "patch_dropout": _SHARE,
    "attentional_pool": _or(_flag, _word), "attn_pooler_queries": _whole(1, 2**16),
    "attn_pooler_heads": _whole(1, 1024), "no_ln_pre": _flag, "pos_embed_type": _word,
    "final_ln_after_pool": _flag, "pool_type": _word, "output_tokens": _flag,
    "timm_model_name": _or(_known_in_timm, _none), "timm_model_pretrained": lambda x: x is False,
    "timm_pool": _word, "timm_proj": _or(_word, _none), "timm_proj_bias": _flag,
    "timm_drop": _SHARE, "timm_drop_path": _or(_SHARE, _none),
}  # fmt: skip
"""Numbers of CLIP's image tower. Its ``timm_model_pretrained`` would fetch, so it must be false."""

TEXT: dict[str, Check] = {
    **_VARIANTS,
    "context_length": _whole(1, 2**16), "vocab_size": _whole(1, 2**24), "width": _WIDTH,
    "heads": _whole(1, 1024), "layers": _whole(1, 256), "mlp_ratio": _real(0, 64),
    "ls_init_value": _or(_real(0, 1), _none), "embed_cls": _flag, "pad_id": _whole(0, 2**24),
    "eos_id": _whole(0, 2**24), "no_causal_mask": _flag, "final_ln_after_pool": _flag,
    "pool_type": _word, "proj_bias": _flag, "proj_type": _word, "output_tokens": _flag,
}  # fmt: skip
"""Numbers of CLIP's text tower; no tower or tokenizer of another package."""

CLIP: dict[str, Check] = {
    "embed_dim": _WIDTH, "quick_gelu": _flag, "init_logit_scale": _real(-100, 100),
    "init_logit_bias": _or(_real(-100, 100), _none), "nonscalar_logit_scale": _flag,
    "vision_cfg": lambda x: isinstance(x, dict), "text_cfg": lambda x: isinstance(x, dict),
}  # fmt: skip
"""Numbers of `CLIPEncoder.from_config`."""

KINDS: dict[str, dict[str, Check]] = {
    "timm": {**TIMM, "name": lambda x: isinstance(x, str)},
    "open_clip": {
        **COMMON,
        "name": lambda x: isinstance(x, str),
        "pretrained": lambda x: x is None or isinstance(x, str),
        "image_size": _SIDE,
    },
    "clip": {**COMMON, "config": lambda x: isinstance(x, dict)},
}


def problem(config: Mapping[str, Any], without: Collection[str] = ()) -> str | None:
    """Reason why the description of an encoder is refused, in a line; None if it is allowed.

    Args:
        config: what ``encoder.config()`` returned, as JSON.
        without: arguments that may be missing, since the caller gives them.
    """
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        return f"unknown kind of encoder {_shown(kind)}"
    given = {k: v for k, v in config.items() if k not in ("kind", "preprocessing")}
    if (wrong := _first_wrong(given, KINDS[kind], f"the {kind} encoder")) is not None:
        return wrong
    if kind == "clip":
        wrong = None if "config" in without else _clip_problem(given.get("config", {}))
    elif "name" not in given:
        wrong = None if "name" in without else "it names no network"
    elif kind == "timm":
        wrong = unknown_timm(given["name"])
    else:
        wrong = unknown_open_clip(given["name"], given.get("pretrained"))
    return wrong or _preprocessing_problem(config.get("preprocessing"))


def unknown_timm(name: str) -> str | None:
    """Reason why a name is not one of timm's own networks; None if it is, with or without a tag."""
    import timm

    if re.fullmatch(r"\w+(\.\w+)?", name, re.ASCII) and timm.is_model(name.split(".")[0]):
        return None
    return f"{_shown(name)} is none of timm's own networks"


def unknown_open_clip(name: str, pretrained: str | None = None) -> str | None:
    """Reason why a name or a tag of weights is not open_clip's own; None if it is."""
    import open_clip

    if name not in open_clip.list_models():
        return f"{_shown(name)} is none of open_clip's own models"
    if pretrained is not None and not open_clip.get_pretrained_cfg(name, pretrained):
        return f"{_shown(pretrained)} is none of open_clip's own weights of {name}"
    return None


def _clip_problem(config: Mapping[str, Any]) -> str | None:
    for part in ("vision_cfg", "text_cfg", "embed_dim"):
        if part not in config:
            return f"its config lacks {part}"
    return (
        _first_wrong(config, CLIP, "CLIP")
        or _first_wrong(config["vision_cfg"], VISION, "vision_cfg")
        or _first_wrong(config["text_cfg"], TEXT, "text_cfg")
    )


def _preprocessing_problem(config: Any) -> str | None:
    if config is None:
        return None
    steps = cast("dict[str, Any]", config).get("steps") if isinstance(config, dict) else None
    if not isinstance(steps, list) or not isinstance(config.get("name"), str) or len(steps) > 16:
        return "its preprocessing is no list of steps with a name"
    for step in steps:
        kind = step.get("step") if isinstance(step, dict) else None
        if not isinstance(kind, str) or kind not in PREPROCESSING:
            return f"unknown preprocessing step {_shown(kind)}"
        given = {k: v for k, v in step.items() if k != "step"}
        if (wrong := _first_wrong(given, PREPROCESSING[kind], kind)) is not None:
            return wrong
    return None


def _first_wrong(given: Mapping[str, Any], known: Mapping[str, Check], what: str) -> str | None:
    for name, value in given.items():
        if name not in known:
            return f"{what} takes no {_shown(name)} from a file"
        if not known[name](value):
            return f"{what} takes no {name}={_shown(value)} from a file"
    return None


def _shown(value: Any) -> str:
    text = printable(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
