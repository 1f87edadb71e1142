"""Captions of training images: text that takes the place of an image's own embedding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from retrodiff.interfaces import Database, Mode, TextEncoder
from retrodiff.model.checks import encoder_disagreement
from retrodiff.numbers import real
from retrodiff.retrieval.table import tabulated

WITH_TEXT = ("text", "text+neighbors")
TRAINED_MODES: tuple[Mode, ...] = ("neighbors", *WITH_TEXT)
"""What a training image can be conditioned on; every mode of sampling is one of these."""

SearchedBy = Literal["image", "caption"]


@dataclass(frozen=True)
class Captions:
    """Embeddings of captions, none, one or several for an image, and how often they are used.

    Args:
        embeddings: (m, d) of all captions, image after image, raw scale.
        counts: (n,) captions of each image.
        modes: share of the images of a step in each mode: ``neighbors`` (k rows),
            ``text+neighbors`` (the caption and k - 1 rows), ``text`` (the caption alone). Images
            without a caption are always in ``neighbors``.
        searched_by: whether an image's neighbors are its own or, where a caption is used, the
            caption's, as they will be when sampling.
        neighbors_by_caption: share of the images in the mode ``neighbors`` whose rows are found
            for a caption, which is not shown: as those of a prompt are in this mode of sampling.
        made_from: the texts and who embedded them, to be compared when a training is continued.
    """

    embeddings: Tensor
    counts: Tensor
    modes: Mapping[Mode, float]
    searched_by: SearchedBy = "image"
    made_from: Mapping[str, Any] = field(default_factory=dict)
    neighbors_by_caption: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "modes", checked_modes(self.modes))
        if self.searched_by not in ("image", "caption"):
            raise ValueError(f"searched_by={self.searched_by!r}: give 'image' or 'caption'")
        share = real("neighbors_by_caption", self.neighbors_by_caption, 0, 1)
        if share and self.searched_by == "image":
            raise ValueError(
                f"neighbors_by_caption={share:g}, but searched_by='image' finds neighbors for no "
                "caption: give searched_by='caption' as well"
            )

    @classmethod
    def of(
        cls,
        texts: Sequence[Sequence[str]],
        encoder: TextEncoder,
        database: Database,
        modes: Mapping[Mode, float],
        searched_by: SearchedBy,
        *,
        neighbors_by_caption: float,
        path: Path | None,
        batch_size: int,
        progress: bool,
    ) -> Captions:
        """Embeds captions.

        Args:
            texts: of each image, as `listed` gives them.
            encoder: the one the database was built with.
            database: D.
            modes: share of each mode.
            searched_by: whose neighbors an image gets.
            neighbors_by_caption: share of the mode ``neighbors`` that a caption finds.
            path: file that keeps the embeddings; None: in memory.
            batch_size: texts per call of the encoder.
            progress: show a bar.

        Raises:
            ValueError: the encoder takes no text or is not the database's, a share is wrong, or
                the file is of other captions.
        """
        modes = checked_modes(modes)
        if not hasattr(encoder, "encode_text"):
            raise ValueError(
                f"captions need an encoder of text, but {type(encoder).__name__} has no text tower "
                "(no encode_text): use the CLIPEncoder that the database was built with"
            )
        if (line := encoder_disagreement(encoder, database)) is not None:
            raise ValueError(line)
        flat, known = [text for own in texts for text in own], _hash(texts)
        about = {f"encoder.{k}": v for k, v in vars(encoder.fingerprint).items()}
        embeddings = tabulated(
            lambda start, stop: _embedded(encoder, flat[start:stop]),
            (len(flat), encoder.dim),
            torch.float32,
            batch_size=batch_size,
            what="caption",
            progress=progress,
            path=path,
            about={"texts": known, **about},
            resume=True,
        )
        counts = torch.tensor([len(own) for own in texts])
        made_from = {"texts": known, "encoder": dict(vars(encoder.identity))}
        return cls(
            embeddings,
            counts,
            modes,
            searched_by,
            made_from,
            neighbors_by_caption=neighbors_by_caption,
        )

    @property
    def images(self) -> Tensor:
        """(m,) the image that each caption is of."""
        return torch.arange(len(self.counts)).repeat_interleave(self.counts)

    def describe(self) -> dict[str, Any]:
        """What must be the same when a training is continued."""
        found = {**self.made_from, "modes": dict(self.modes), "searched_by": self.searched_by}
        if self.neighbors_by_caption:  # left out where it changes nothing: old runs go on
            found["neighbors_by_caption"] = self.neighbors_by_caption
        return found

    @cached_property
    def first(self) -> Tensor:
        """(n,) number of each image's first caption."""
        return self.counts.cumsum(0) - self.counts

    def chosen(self, rows: Tensor, which: Tensor, mode: Tensor) -> tuple[Tensor, list[str]]:
        """Which caption some images get, and the mode of each.

        Args:
            rows: (b,) numbers of images.
            which: (b,) numbers in [0, 1) that decide which of an image's captions it is.
            mode: (b,) numbers in [0, 1) that decide the mode.

        Returns:
            Numbers of captions (b,), -1 where none is used; and modes. In the mode ``neighbors``
            a caption finds neighbors and is not shown.
        """
        names = list(self.modes)
        shares = torch.tensor([self.modes[name] for name in names], dtype=torch.float64)
        bounds = shares.cumsum(0)
        bounds[-1] = 1.0  # whatever the shares' rounding
        drawn = torch.searchsorted(bounds, mode.double().contiguous(), right=True)
        found = [names[i] for i in drawn.tolist()]
        counts = self.counts[rows]
        one = (which.double() * counts).long().clamp_max(counts - 1)
        caption = torch.where(counts > 0, self.first[rows] + one, -1)
        modes = [
            name if name not in WITH_TEXT or number >= 0 else "neighbors"
            for name, number in zip(found, caption.tolist(), strict=True)
        ]
        used = torch.tensor([name in WITH_TEXT for name in modes], dtype=torch.bool)
        if self.neighbors_by_caption:
            # The same number decides: how far it lies within what the mode takes of [0, 1).
            within = 1 - (bounds[drawn] - mode.double()) / shares[drawn]
            used |= within < self.neighbors_by_caption
        return torch.where(used, caption, -1), modes


def checked_modes(modes: Mapping[Any, float]) -> dict[Mode, float]:
    """Shares of modes that sum to one.

    Raises:
        ValueError: a mode is unknown, a share out of range, or their sum is not 1.
    """
    for name, share in modes.items():
        if name not in TRAINED_MODES:
            raise ValueError(
                f"modes has {name!r}, but images are trained with {', '.join(TRAINED_MODES)}: the "
                "other modes of sampling condition on neighbors"
            )
        real(f"modes[{name!r}]", share, 0, 1)
    total = sum(modes.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(f"the shares in modes sum to {total:.6g}: make their sum 1")
    return {name: float(share) for name, share in modes.items() if share > 0}


def listed(captions: Sequence[str | Sequence[str] | None], n: int) -> list[list[str]]:
    """Captions in any usual form -> those of each image, without empty ones.

    Raises:
        ValueError: there are not as many as images, one is no text, or there is none at all.
    """
    if isinstance(captions, str) or len(captions) != n:
        given = "one text" if isinstance(captions, str) else f"captions of {len(captions)} images"
        raise ValueError(f"{n} training images, but {given}: give one, several or None for each")
    found: list[list[str]] = []
    for i, own in enumerate(captions):
        if own is None or (isinstance(own, float) and own != own):  # as tables mark what is missing
            own = []
        texts: list[Any] = list(own) if isinstance(own, (list, tuple, np.ndarray)) else [own]
        if odd := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(
                f"the caption of training image {i} is {odd[0]!r:.80}: give text, or None where "
                "there is none"
            )
        found.append([text for text in texts if text.strip()])
    if not any(found):
        raise ValueError(
            f"none of the {n} training images has a caption: give some, or train without captions"
        )
    return found


def _hash(texts: Sequence[Sequence[str]]) -> str:
    found = hashlib.sha256()
    for own in texts:
        found.update(json.dumps(list(own)).encode())
    return found.hexdigest()[:32]


def _embedded(encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
    """Embeddings (b, d) of texts, all finite; equal ones are encoded once."""
    distinct = list(dict.fromkeys(texts))
    number = {text: i for i, text in enumerate(distinct)}
    with torch.no_grad():
        found = encoder.encode_text(distinct).detach().float().cpu()
    finite = found.isfinite().all(-1)
    if not bool(finite.all()):
        raise ValueError(
            f"the caption {distinct[int((~finite).nonzero()[0])]!r:.80} has an embedding that is "
            "not finite: look at the encoder's weights"
        )
    return found[[number[text] for text in texts]]
