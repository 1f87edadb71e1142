"""Class names as embeddings of their own: the condition of class-conditional models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrodiff.interfaces import Fingerprint, TextEncoder
from retrodiff.text import printable


@dataclass(frozen=True)
class ClassNames(TextEncoder):
    """One dimension for each class: a text encoder that knows these names and no others.

    A network's first projection of such a vector is a learned embedding of the class, as in the
    class-conditional models of Rombach et al. 2022.

    Args:
        names: of the classes, each once.

    Raises:
        ValueError: there is no name, or one twice.

    Examples:
        >>> from retrodiff.encoders import ClassNames
        >>> ClassNames(("cat", "dog")).encode_text(["dog"]).tolist()
        [[0.0, 1.0]]
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"names has {len(self.names)} classes, {len(set(self.names))} of them different: "
                "give at least one, and each once"
            )

    def __repr__(self) -> str:
        return f"ClassNames({len(self.names)} classes)"

    @property
    def dim(self) -> int:
        """As many as there are classes."""
        return len(self.names)

    @property
    def fingerprint(self) -> Fingerprint:
        """Tells names and their order."""
        known = hashlib.sha256(json.dumps(self.names).encode()).hexdigest()[:16]
        return Fingerprint(encoder="classes", weights=known, preprocessing="none", dim=self.dim)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Class names -> (b, d), a one where the class is.

        Raises:
            ValueError: one is no class.
        """
        for name in prompts:
            if name not in self.names:
                known = ", ".join(self.names[:5]) + (", ..." if len(self.names) > 5 else "")
                raise ValueError(f"no class is called {printable(name)!r}: the classes are {known}")
        return torch.eye(self.dim)[[self.names.index(name) for name in prompts]]

    def encode_image(self, images: Tensor) -> Tensor:
        """Refused: which class a picture is of is not known here.

        Raises:
            ValueError: always: which class a picture is of is not known here.
        """
        raise ValueError(
            f"{len(images)} images are asked with, but ClassNames knows names only: use classes="
        )
