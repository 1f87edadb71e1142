"""Hashes weights, and compares encoders with fingerprints."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from retrodiff.interfaces import Encoder, Fingerprint, member

COMPILED = "_orig_mod."
"""What ``torch.compile`` puts before the names of a module that it has wrapped."""


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors under the names that they have without ``torch.compile``."""
    return {k.replace(COMPILED, ""): v for k, v in module.state_dict().items()}


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and bytes of a state dict, whatever its order and device.

    Returns:
        The first 32 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256()
    plain = {name.replace(COMPILED, ""): tensor for name, tensor in state.items()}
    for name in sorted(plain):
        tensor = plain[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def difference(encoder: Encoder, stored: Fingerprint) -> str | None:
    """What differs between an encoder and the one a fingerprint is of, in words; None: nothing.

    Weights are compared where both sides know theirs.
    """
    mine: Fingerprint = member(encoder, Encoder, "identity")
    if not (mine.weights and stored.weights):
        mine, stored = replace(mine, weights=""), replace(stored, weights="")
    return mine.disagreement(stored)


class WeightsHash:
    """The weights hash of a module; remembered only while the module is frozen and untouched.

    A module with a single parameter that requires a gradient is hashed each time anew: an optimizer
    or an average of weights can change values without leaving a trace.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._hash = ""

    def of(self, module: nn.Module) -> str:
        """The hash of the module's present weights."""
        state = module.state_dict(keep_vars=True)
        if any(tensor.requires_grad for tensor in state.values()):
            return weights_hash(state)
        key = tuple((name, t.data_ptr(), t._version) for name, t in state.items())
        if key != self._key:
            self._hash, self._key = weights_hash(state), key
        return self._hash
