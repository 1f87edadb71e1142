"""Judges of pictograms that know nothing of the model: which concept, which style.

*Concept*: pooled features of EfficientNet-Lite0; a picture is of the concept whose mean over the
other styles is nearest, among all concepts of the sets.

*Style*: a logistic regression on what early maps of the same network have on average: means,
deviations, and products of channels (Gatys et al. 2016, eq. 3-5), which tell textures and edges and
not things. It learns real pictures of held-out concepts and softened copies of them: a judge that
has seen sharp pictures only takes whatever is soft for the style that has soft shades.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sets import STYLES, Pictograms
from teachers import picture_features
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur, pad

from retrodiff.interfaces import unit

sys.path.insert(0, str(Path(__file__).parents[1]))
from lite0 import lite

SOFTENED = 4
"""Softened copies of each picture that the style's judge learns."""

BLUR, NOISE = 1.2, 8.0
"""Largest deviations of a softened copy: of its blur in pixels, of its noise in levels of 255."""


class Judges:
    """Names concept and style of pictures, by features that the model does not use.

    Args:
        sets: all pictures.
    """

    def __init__(self, sets: Pictograms) -> None:
        self.sets = sets
        self.rows = sets.where(lambda row: row["style"] in STYLES)
        raw = picture_features(sets.images[self.rows])
        self.center = raw.mean(0)
        self.features = unit(raw - self.center)
        records = [sets.rows[i] for i in self.rows.tolist()]
        self.style = torch.tensor([STYLES.index(r["style"]) for r in records])
        self.names = sorted({r["concept"] for r in records})
        number = {name: i for i, name in enumerate(self.names)}
        self.concept = torch.tensor([number[r["concept"]] for r in records])
        self.split = [r["split"] for r in records]
        self.means = {style: self._means(style) for style in range(len(STYLES))}
        held = torch.tensor([s == "held-out" for s in self.split])
        self.styles = StyleJudge(sets.images[self.rows[held]], self.style[held])

    def _means(self, style: int) -> Tensor:
        """Means (concepts, f) over the other styles; zeros where a concept has none."""
        sums = torch.zeros(len(self.names), self.features.shape[1])
        others = self.style != style
        sums.index_add_(0, self.concept[others], self.features[others])
        return F.normalize(sums, dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """Bytes (n, 3, h, w) -> features of unit norm."""
        return unit(picture_features(images) - self.center)

    def concept_rank(self, features: Tensor, concepts: Tensor, style: int) -> Tensor:
        """How many concepts are nearer than the asked one (n,)."""
        scores = features @ self.means[style].T
        return (scores > scores.gather(1, concepts[:, None])).sum(1)


class StyleJudge:
    """Tells styles by texture.

    Args:
        images: bytes (n, 3, h, w), of all styles.
        styles: their numbers (n,).
    """

    def __init__(self, images: Tensor, styles: Tensor) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self.network = lite(0, 64).network
        generator = torch.Generator().manual_seed(0)
        shown = [images, *(softened(images, generator) for _ in range(SOFTENED))]
        seen = torch.cat([self.texture(some) for some in shown])
        self.regression: Any = make_pipeline(
            StandardScaler(), LogisticRegression(C=0.01, max_iter=500)
        )
        self.regression.fit(seen.numpy(), styles.repeat(len(shown)).numpy())

    def __call__(self, images: Tensor) -> Tensor:
        """Numbers of the styles that pictures look like (n,)."""
        return torch.from_numpy(self.regression.predict(self.texture(images).numpy()))

    @torch.no_grad()
    def texture(self, images: Tensor) -> Tensor:
        """Bytes (n, 3, h, w) -> statistics (n, f) of the network's first three maps."""
        network: Any = self.network
        found: list[Tensor] = []
        for part in images.split(100):
            maps = network.forward_intermediates(
                part / 127.5 - 1, indices=[0, 1, 2], intermediates_only=True
            )
            numbers: list[Tensor] = []
            for values in maps:
                numbers += [values.mean((2, 3)), values.std((2, 3))]
                if values.shape[1] <= 24:  # the products of more channels are too many
                    rows = values.flatten(2)
                    products = rows @ rows.mT / rows.shape[2]
                    upper = torch.triu_indices(*products.shape[1:])
                    products = products[:, upper[0], upper[1]]
                    numbers.append(products.sign() * products.abs().sqrt())
            found.append(torch.cat(numbers, 1))
        return torch.cat(found)


def softened(images: Tensor, generator: torch.Generator) -> Tensor:
    """Bytes (n, 3, h, w), each blurred, noisy and mirrored at random."""
    made: list[Tensor] = []
    for image in images.float():
        blur, noise, mirrored = torch.rand(3, generator=generator).tolist()
        grain = torch.randn(image.shape, generator=generator) * NOISE * noise
        image = blurred(image + grain, BLUR * blur)
        made.append(image.flip(-1) if mirrored < 0.5 else image)
    return torch.stack(made).round().clamp(0, 255).byte()


def blurred(image: Tensor, deviation: float, radius: int = 4) -> Tensor:
    """A picture (c, h, w) through a Gaussian, its edges repeated."""
    if deviation < 0.1:  # pixels: nothing changes
        return image
    wide = pad(image, radius, padding_mode="edge")
    return gaussian_blur(wide, 2 * radius + 1, deviation)[..., radius:-radius, radius:-radius]
