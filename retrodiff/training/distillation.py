"""Teachers of a small CLIP: features of larger networks, computed beforehand.

A few thousand captioned pictures teach neither sight nor language. Networks that know one of the
two can pass some of it on (Hinton et al. 2015), even where neither knows the other's domain: an
image classifier for the image tower, a sentence encoder for the text tower. Their weights are not
needed afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from retrodiff.encoders import CLIPEncoder
from retrodiff.interfaces import unit
from retrodiff.numbers import real, whole


@dataclass(frozen=True, eq=False)
class Teachers:
    """What `fit_clip` learns from beside its pairs.

    Args:
        images: (n, f) features of the training images, in their order; None: no teacher. A column
            counts as its variance does.
        texts: phrases that have features: captions, and as many others as are at hand, such as a
            list of words. Those teach the text tower about words that no caption holds.
        text_features: (m, g), one row for each of ``texts``; None: no teacher.
        image_weight: of the image teacher's loss beside the contrastive one; 1 makes them about
            equal.
        text_weight: of the text teacher's two losses, contrast and distance.
        texts_per_step: of ``texts``, drawn for every step beside the captions of its images.

    Raises:
        ValueError: features that are not finite, or not one row for each text.

    Examples:
        >>> import torch
        >>> from retrodiff.training import Teachers
        >>> teachers = Teachers(images=torch.randn(100, 384), image_weight=0.5)
        >>> teachers.image_weight
        0.5
    """

    images: Tensor | None = None
    texts: Sequence[str] = field(default=(), repr=False)
    text_features: Tensor | None = None
    image_weight: float = 1.0
    text_weight: float = 1.0
    texts_per_step: int = 256

    def __post_init__(self) -> None:
        real("image_weight", self.image_weight, 0)
        real("text_weight", self.text_weight, 0)
        whole("texts_per_step", self.texts_per_step)
        given = 0 if self.text_features is None else len(self.text_features)
        if isinstance(self.texts, str) or len(self.texts) != given:
            raise ValueError(
                f"{len(self.texts)} texts, but {given} rows of text_features: give one for each"
            )
        for name in ("images", "text_features"):
            features = getattr(self, name)
            if features is None:
                continue
            if features.ndim != 2 or not len(features) or not features.is_floating_point():
                raise ValueError(
                    f"teacher {name} have shape {tuple(features.shape)} of {features.dtype}, "
                    "expected floats (rows, width)"
                )
            if not bool(features.isfinite().all()):
                row = int((~features.isfinite().all(1)).nonzero()[0])
                raise ValueError(f"row {row} of the teacher's {name} is not finite: leave it out")

    def describe(self) -> dict[str, Any]:
        """What must be the same when a training is continued, as JSON-able values."""
        return {
            "images": _hash(self.images) if self.images is not None else None,
            "texts": hashlib.sha256("\0".join(self.texts).encode()).hexdigest()[:16],
            "text_features": _hash(self.text_features) if self.text_features is not None else None,
            "weights": [self.image_weight, self.text_weight],
            "texts_per_step": self.texts_per_step,
        }


class Taught(nn.Module):
    """A CLIP with the linear maps between its space and its teachers'.

    The image embedding must tell the image teacher's features, linearly: it keeps what captions
    leave out, such as color and style. The text teacher's features are mapped into the common space
    and contrasted with images as captions are; the text tower learns to say the same of any phrase.
    So unknown words come to lie where the teacher's knowledge of them puts them.

    Args:
        encoder: made by `CLIPEncoder.from_config`.
        teachers: whose features are learned.
    """

    def __init__(self, encoder: CLIPEncoder, teachers: Teachers) -> None:
        super().__init__()
        self.encoder = encoder
        self.teachers = teachers
        self.image_head = self.text_head = None
        if teachers.images is not None and teachers.image_weight:
            self.image_head = nn.Linear(encoder.dim, teachers.images.shape[1])
            self._image_targets = _standardized(teachers.images).to(encoder.device)
        if teachers.text_features is not None and teachers.text_weight:
            self.text_head = nn.Linear(teachers.text_features.shape[1], encoder.dim)
            self._text_inputs = _standardized(teachers.text_features).to(encoder.device)
        self.to(encoder.device)

    def heads(self) -> list[nn.Linear]:
        """The maps that there are."""
        return [head for head in (self.image_head, self.text_head) if head is not None]

    def image_loss(self, image: Tensor, rows: Tensor) -> Tensor:
        """Embeddings (b, d) of unit norm and their row numbers -> 1 - cosine with the teacher."""
        if self.image_head is None:
            return image.new_zeros(())
        told = self.image_head(image * image.shape[1] ** 0.5)
        target = self._image_targets[rows.to(image.device)]
        return 1 - F.cosine_similarity(told, target).mean()

    def text_targets(self, rows: Tensor) -> Tensor:
        """Row numbers of texts -> where the teacher puts them in the common space (b, d), unit."""
        assert self.text_head is not None
        features = self._text_inputs
        return unit(self.text_head(features[rows.to(features.device)]))


def _standardized(features: Tensor) -> Tensor:
    """Features of mean 0, scaled as a whole: how much a column counts is the caller's choice."""
    features = features.float()
    centered = features - features.mean(0)
    return centered / centered.square().mean().sqrt().clamp(min=1e-6)


def _hash(features: Tensor) -> str:
    plain = features.detach().float().cpu().contiguous()
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:16]
