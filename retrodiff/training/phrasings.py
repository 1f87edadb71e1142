"""Captions of training images: one or several for each, and which is right for which image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from retrodiff.encoders.prompts import prompt_list


class Phrasings:
    """Texts by number, and the texts of each image.

    Images with the same texts are one group, so that what is kept grows with different captions
    and not with images.

    Args:
        captions: n texts, or n lists of texts.
        n: number of images.

    Raises:
        ValueError: not one entry for each image, an image without a caption, or no text.
    """

    def __init__(self, captions: Sequence[str] | Sequence[Sequence[str]], n: int) -> None:
        if isinstance(captions, str):
            raise ValueError("captions is one text: give a list with one for each image")
        if len(captions) != n:
            raise ValueError(f"{n} images and {len(captions)} captions: give one for each")
        groups: dict[tuple[str, ...], int] = {}
        numbers: dict[str, int] = {}
        which: list[int] = []
        for i, given in enumerate(captions):
            one = (given,) if isinstance(given, str) else tuple(given)
            if not one:
                raise ValueError(f"captions[{i}] is empty: give each image one text at least")
            if one not in groups:
                prompt_list(one, f"captions[{i}]")
                groups[one] = len(groups)
                for text in one:
                    numbers.setdefault(text, len(numbers))
            which.append(groups[one])
        self.texts = list(numbers)
        """All different texts."""
        self._group = torch.tensor(which)
        lists = [[numbers[text] for text in group] for group in groups]
        self._length = torch.tensor([len(one) for one in lists])
        self._start = self._length.cumsum(0) - self._length
        self._flat = torch.tensor([number for one in lists for number in one])
        owner = torch.arange(len(lists)).repeat_interleave(self._length)
        self._pairs = (owner * len(self.texts) + self._flat).unique()

    def choose(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Row numbers of images (b,) -> the number of a text of each (b,)."""
        groups = self._group[rows]
        most = self._length[groups]
        if int(self._length.max()) == 1:  # nothing to draw
            return self._flat[self._start[groups]]
        place = (torch.rand(len(rows), generator=generator) * most).long().minimum(most - 1)
        return self._flat[self._start[groups] + place]

    def match(self, rows: Tensor, texts: Tensor) -> Tensor:
        """Whether texts are right for images: row numbers (b,), text numbers (t,) -> (b, t)."""
        wanted = self._group[rows][:, None] * len(self.texts) + texts[None, :]
        at = torch.searchsorted(self._pairs, wanted).clamp(max=len(self._pairs) - 1)
        return self._pairs[at] == wanted

    def numbers_in(self, others: Sequence[str]) -> Tensor:
        """The place of each of these texts in another list, -1 where it is missing."""
        place = {text: i for i, text in enumerate(others)}
        return torch.tensor([place.get(text, -1) for text in self.texts])

    def digest(self) -> str:
        """Hash of all texts and of whose they are."""
        found = hashlib.sha256("\0".join(self.texts).encode())
        for part in (self._group, self._length, self._flat):
            found.update(part.numpy().tobytes())
        return found.hexdigest()[:32]
