"""Finds the device that a name stands for, or says in one line why it cannot be used."""

from __future__ import annotations

import torch


def get_device(name: str | torch.device) -> torch.device:
    """The torch device of a name such as ``cpu``, ``cuda``, ``cuda:1``, ``mps`` or ``meta``.

    Args:
        name: a device of this machine.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"unknown device {str(name)!r}: use cpu, cuda, cuda:N (N = 0, 1, ...) or mps"
        ) from None
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found == 0:
            raise ValueError(
                f"device {str(name)!r} was asked for, but torch sees no CUDA device here: use cpu"
            )
        if (device.index or 0) >= found:
            raise ValueError(
                f"device {str(name)!r} was asked for, but there are {found} CUDA devices: use "
                f"cuda:0 to cuda:{found - 1}"
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(
                f"device {str(name)!r} was asked for, but torch sees no Metal device here: use cpu"
            )
    elif device.type not in ("cpu", "meta"):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, NotImplementedError, AssertionError):
            raise ValueError(
                f"device {str(name)!r} was asked for, but this torch cannot use it: use cpu"
            ) from None
    return device
