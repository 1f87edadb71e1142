"""Neighbors from every group of a database in turn."""

from retrodiff_balanced.balanced import Balanced

__all__ = ["Balanced"]
