"""Reads the transformer of an autoregressive checkpoint from its yaml."""

from __future__ import annotations

import math
from typing import Any

from retrodiff.checkpoints.foreign.settings import Settings

MODEL = ("p_mask_max", "nn_reshaper_cfg", "nn_memory", "monitor", "scheduler_config", "ckpt_path",
         "ignore_keys", "first_stage_key", "weight_decay")  # fmt: skip
"""How training was run, and the shape in which neighbors were handed over."""

DEEPEST = 64
"""Most blocks and heads; the published models have 18 and 12."""


def read_transformer(params: Settings, section: Settings) -> dict[str, Any]:
    """The arguments of `retrodiff.networks.CausalTransformer`.

    Args:
        params: of the model.
        section: the transformer's own parameters.

    Raises:
        ValueError: a key is missing, or says something else than this family's models do.
    """
    section.only(
        {"positional_encodings": (True,), "cross_attend": (True,), "causal": (True,)}
        | {"continuous": False, "dropout": (0.0, 0)}
    )
    heads, each = section.whole("n_heads", most=DEEPEST), section.whole("d_head", most=4096)
    codes, inputs = (
        section.whole("out_channels", most=1 << 24),
        section.whole("in_channels", most=1 << 24),
    )
    if inputs <= codes:
        section.wrong("in_channels", inputs, f"more than out_channels={codes}, for the start token")
    length = section.whole("sequence_length")
    side = math.isqrt(length)
    if side * side != length:
        section.wrong("sequence_length", length, "a square number: the codes of a square image")
    numbers = {
        "codes": codes,
        "grid": (side, side),
        "width": heads * each,
        "depth": section.whole("depth", most=DEEPEST),
        "heads": heads,
        "context_width": section.whole("context_dim"),
        "extra_tokens": inputs - codes,
    }
    section.done()
    params.only({"sos_token": (inputs - 1, None), "mask_token": (inputs - 2, codes, None)})
    encoder = params.take("nn_encoder_cfg", None)
    if encoder is not None and str(encoder.get("target")).rpartition(".")[2] not in (
        "IdentityEncoder",
        "Identity",
    ):
        params.refuse("nn_encoder_cfg", encoder, "the neighbors' embeddings as they are")
    params.harmless(MODEL)
    return numbers
