"""Hashes rows, to tell whether two databases hold the same ones in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

SHARD_ROWS = 32_768


def rows_digest(rows: Tensor) -> str:
    """SHA-256 of the bytes of stored rows (n, d) in float16."""
    flat = rows.to(torch.float16).contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def rows_hash(digests: Iterable[str], hidden: Tensor | None = None) -> str:
    """One hash from the digests of consecutive shards, and from the rows that were deleted."""
    digest = hashlib.sha256("".join(digests).encode())
    if hidden is not None and len(hidden):
        digest.update(hidden.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()[:32]
