"""How well an encoder of text and images finds the pictures that texts describe."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from retrodiff.interfaces import unit
from retrodiff.numbers import whole


def text_recall(
    texts: Tensor, images: Tensor, right: Tensor, ks: Sequence[int] = (1, 5, 20)
) -> dict[int, float]:
    """Share of texts with a right picture among the k that are nearest by cosine.

    Args:
        texts: embeddings (t, d).
        images: embeddings (n, d), made by the same encoder.
        right: (t, n), true where a picture is what the text describes.
        ks: numbers of pictures that are looked at; more than there are means all.

    Returns:
        k -> recall in [0, 1].

    Raises:
        ValueError: shapes that do not fit, or a text that no picture is right for.
    """
    if right.shape != (len(texts), len(images)) or not right.numel():
        raise ValueError(
            f"{len(texts)} texts and {len(images)} images, but right has shape "
            f"{tuple(right.shape)}: give one row for each text, one column for each image"
        )
    if not bool(right.any(1).all()):
        missing = int((~right.any(1)).nonzero()[0])
        raise ValueError(f"no picture is right for text {missing}: leave it out")
    similarity = unit(texts.float()) @ unit(images.float()).T
    order = similarity.topk(min(max(ks), len(images))).indices
    hits = right.gather(1, order)
    return {k: float(hits[:, : whole("k", k)].any(1).float().mean()) for k in ks}
