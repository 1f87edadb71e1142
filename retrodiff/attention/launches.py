"""How large the launches of the attention kernels are: by rule, or as they were tuned.

The rule is made from registers and shared memory (see `ahead`), without a GPU. What
`tune_attention` measured on this machine is preferred to it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels (it takes CPU tensors)."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Sizes of one launch.

    Args:
        kp: columns of a head, a power of two.
        hg: heads of a group, a power of two.
        groups: of heads.
        bn: rows of a tile.
        bc: channels of a chunk.
        bj: columns of a chunk where heads play no role.
        warps: of a program.
        stages: of software pipelining.
        precision: of products, see `products`.
    """

    kp: int
    hg: int
    groups: int
    bn: int
    bc: int
    bj: int
    warps: int
    stages: int
    precision: str

    @property
    def columns(self) -> int:
        """Columns that the padded score product runs over."""
        return self.groups * self.hg * self.kp


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What is free to choose in a launch: the result is the same to rounding.

    Args:
        bn: rows of a tile, a power of two.
        bc: channels of a chunk, a power of two.
        warps: of a program, a power of two.
        stages: of software pipelining.
    """

    bn: int
    bc: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if type(getattr(self, name)) is not int or getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {known}")


_CHOICES = {
    "bn": (16, 32, 64, 128, 256),
    "bc": (16, 32, 64, 128),
    "warps": (1, 2, 4, 8, 16),
    "stages": (1, 2, 3, 4, 5),
}


def power_of_two(number: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (number - 1).bit_length()


def launch(
    *,
    size: int,
    heads: int,
    k: int,
    dtype: torch.dtype,
    backward: bool = False,
    tile: Tile | None = None,
) -> Launch:
    """Sizes for regions of ``size`` positions.

    Args:
        size: positions of a region.
        heads: h.
        k: neighbors.
        dtype: of the tables.
        backward: for the kernel that gives the gradient of x.
        tile: as it was tuned; None: by rule.
    """
    kp = power_of_two(k)
    narrow = dtype == torch.float32
    widest = 128 if backward or narrow else 256
    hg = max(power_of_two(heads), -(-16 // kp))
    if hg * kp > widest:
        hg = 1 if kp > 32 else 128 // kp
    groups = -(-heads // hg)
    # rows, channels, warps, stages: no spills on sm_80 and sm_90, two programs at a time where the
    # registers allow it (see tests/test_attention_resources.py).
    if narrow and backward:
        sizes = (32, 32, 8, 2) if hg * kp <= 64 else (32, 16, 8, 2)
    elif narrow:
        sizes = (32, 32, 8, 2) if hg * kp <= 64 else (32, 32, 8, 1)
    elif backward:  # an odd k leaves rows unaligned, and their addresses cost registers
        sizes = (32, 32, 8, 2) if groups > 1 and k % 2 else (64, 32, 8, 2)
    elif groups > 1:
        sizes = (64, 64, 8, 2)
    else:
        sizes = {256: (64, 32, 8, 2), 128: (64, 64, 8, 3)}.get(hg * kp, (128, 32, 8, 4))
    if tile is not None:
        sizes = (tile.bn, tile.bc, tile.warps, tile.stages)
    bn, bc, warps, stages = sizes
    return Launch(
        kp=kp,
        hg=hg,
        groups=groups,
        bn=min(bn, max(16, power_of_two(size))),
        bc=bc,
        bj=32 if narrow else 64,
        warps=warps,
        stages=stages,
        precision=products(),
    )


def products() -> str:
    """Precision of float32 products in the kernels: torch's own, exact unless TF32 is allowed."""
    if INTERPRETED:
        return "interpreted"
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    if precision is None:  # before torch 2.9
        return "tf32" if matmul.allow_tf32 else "ieee"
    return "tf32" if precision == "tf32" else "ieee"


@dataclass(frozen=True, kw_only=True)
class TableTile:
    """Sizes of a launch that sums over rows.

    Args:
        bn: positions at a time.
        bc: channels of a program.
        bj: table rows of a program.
        warps: of a program.
        stages: of software pipelining.
    """

    bn: int
    bc: int
    bj: int
    warps: int
    stages: int


def table_tile(size: int, dtype: torch.dtype) -> TableTile:
    """Sizes for the gradients of the tables."""
    if dtype == torch.float32:
        bn, edge, stages = 16, 32, 2
    else:
        bn, edge, stages = 32, 64, 3
    bn = min(bn, max(16, power_of_two(size)))
    return TableTile(bn=bn, bc=edge, bj=edge, warps=4, stages=stages)


def most_registers(warps: int) -> int:
    """Registers that a thread may have at one program per multiprocessor.

    Said to the assembler, because left to itself it spills to let more programs run at a time.
    """
    return min(255, 65536 // (32 * warps))
