"""``retrodiff tune``: measures the launch sizes of the attention kernels on this GPU."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

from retrodiff.cli import options as types

DTYPES = ("bfloat16", "float16", "float32")


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "tune", help="measure the launch sizes of the attention kernels on this GPU"
    )
    parser.add_argument("--network", default="rdm_imagenet", help="a published network's shapes")
    parser.add_argument("--width", type=types.integer(1), help="channels, in place of --network")
    parser.add_argument("--heads", type=types.integer(1), help="of --width; 32 wide each if out")
    parser.add_argument("--positions", type=types.integer(1), help="of --width, such as 1024")
    parser.add_argument("-k", type=types.integer(1, 64), nargs="+", default=[4], help="neighbors")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bfloat16"])
    parser.add_argument("--batch", type=types.integer(1), default=16, help="while measuring")
    parser.add_argument("--backward", action="store_true", help="the kernel of training, too")
    parser.add_argument("--device", default="cuda", help="a GPU")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints a line for each class, and where they are kept."""
    import torch

    from retrodiff.attention import tune_attention
    from retrodiff.attention.tuned import launches_file
    from retrodiff.attention.tuning import told

    ways = (False, True) if options.backward else (False,)
    shapes: list[tuple[int, int, int]] = list(_shapes(options))
    cases: Any = itertools.product(shapes, options.k, options.dtype, ways)
    for (positions, width, heads), k, dtype, backward in cases:
        found = tune_attention(
            width=width,
            heads=heads,
            k=k,
            positions=positions,
            batch=options.batch,
            dtype=getattr(torch, dtype),
            device=options.device,
            backward=backward,
        )
        print(told(found), flush=True)
    print(f"kept in {launches_file(torch.empty(0, device=options.device).device)}")
    return 0


def _shapes(options: argparse.Namespace) -> Iterator[tuple[int, int, int]]:
    """Positions, width and heads of each cross-attention."""
    from retrodiff.checkpoints import PUBLISHED

    if options.width is not None or options.positions is not None:
        if options.width is None or options.positions is None:
            raise types.UsageError("--width and --positions go together")
        heads = options.heads or max(1, options.width // 32)
        if options.width % heads:
            raise types.UsageError(f"--heads {heads} does not divide --width {options.width}")
        yield options.positions, options.width, heads
        return
    if options.heads is not None:
        raise types.UsageError("--heads needs --width and --positions")
    if options.network not in PUBLISHED:
        raise types.UsageError(
            f"--network {options.network!r} is none of {', '.join(PUBLISHED)}: name one, or give "
            "--width and --positions"
        )
    unet = PUBLISHED[options.network].unet
    deepest = 2 ** (len(unet["multipliers"]) - 1)
    for factor in sorted({*unet["attention_factors"], deepest}):
        width = unet["channels"] * unet["multipliers"][factor.bit_length() - 1]
        yield (unet["size"] // factor) ** 2, width, width // unet["channels_per_head"]
