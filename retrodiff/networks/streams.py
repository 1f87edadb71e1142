"""Checks and projects conditioning streams, and joins them along k into one set of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from retrodiff.interfaces import Context, Tokens


def join_streams(
    context: Context,
    widths: Mapping[str, int],
    project: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    dtype: torch.dtype | None = None,
) -> Tokens | None:
    """The tokens of all streams, in the order of ``widths``; None for a network without any.

    Args:
        context: its streams must be those of ``widths``.
        widths: width of each stream that the network accepts.
        project: brings each stream to a common width.
        dtype: of the tokens; None: as they are.

    Raises:
        ValueError: streams or widths differ from the network's, or there is no token at all.
    """
    given = {name: tokens.values.shape[-1] for name, tokens in context.streams.items()}
    if given != dict(widths):
        raise ValueError(
            f"the context has streams of widths {given}, but the network takes {dict(widths)}: "
            "use the encoder and the conditioner it was trained with"
        )
    if not widths:
        return None
    parts: list[Tokens] = []
    for name in widths:
        values = context.streams[name].values.to(dtype)
        values = project[name](values) if project else values
        parts.append(replace(context.streams[name], values=values))
    total = sum(part.values.shape[-2] for part in parts)
    if total == 0:
        raise ValueError(
            "the context has no tokens, but the network attends to them: hand in at least one, "
            "zeros for the null condition"
        )
    if len(parts) == 1:
        return parts[0]
    mask = None
    if any(part.mask is not None for part in parts):
        masks = [
            part.values.new_ones(part.values.shape[:-1], dtype=torch.bool)
            if part.mask is None
            else part.mask
            for part in parts
        ]
        mask = torch.cat(masks, -1)
    values = torch.cat([part.values for part in parts], -2)
    return Tokens(values, mask, min(part.null_rows for part in parts))
