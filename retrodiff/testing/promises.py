"""Assertions of contract checks, with the broken promise as message."""

from __future__ import annotations

from torch import Tensor

from retrodiff.model.checks import missing_members


def require(holds: bool, promise: str) -> None:
    """Raises the promise, if it does not hold."""
    if not holds:
        raise AssertionError(promise)


def close(a: Tensor, b: Tensor, promise: str, tolerance: float = 1e-4) -> None:
    """Raises the promise, if two tensors differ in shape or by more than the tolerance."""
    require(a.shape == b.shape, f"{promise}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
    worst = float((a - b).abs().max()) if a.numel() else 0.0
    scale = max(1.0, float(b.abs().max()) if b.numel() else 0.0)
    require(worst <= tolerance * scale, f"{promise}: off by {worst:.2g}")


def has_members(role: str, part: object) -> None:
    """Raises the members of its protocol that a component lacks."""
    missing = missing_members(role, part)
    require(not missing, f"a {role} has {', '.join(missing)}")
