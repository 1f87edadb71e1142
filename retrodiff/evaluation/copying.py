"""Finds images that copy others: nearer to them than held-out real images ever come.

How near is too near depends on the data and the features: two photographs of one place are alike
without a copy. So an image's distance to a source is compared with its distance to real images
that the model never saw: the *margin* says how many times nearer the nearest source image is than
the nearest held-out one, as a logarithm. A plain picture that resembles many has no margin; a copy
has. Held-out images set the threshold (the null), each compared with the others. Somepalli et al.
2023 compare with the same distance among real images; here that is done for each image.
Use features of another network than the one that conditions the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retrodiff.interfaces import unit

BLOCK = 2048

FLOOR = 1e-3
"""Share of a usual distance below which distances count as alike: an exact copy has none."""

FOUND = 0.95
"""Share of planted copies that a copying report should find."""


@dataclass(frozen=True)
class Copying:
    """How near generated images come to the images of one source.

    Args:
        source: name of what may have been copied, such as ``training`` or ``database``.
        similarity: (n,) cosine of each generated image to its nearest image of the source.
        row: (n,) which image of the source that is.
        margin: (n,) log of how many times nearer that image is than the nearest held-out one; the
            distance is 1 - cosine.
        null: (h,) margins of held-out real images.
        null_similarity: (h,) their cosines to the nearest image of the source.
        threshold: margin above which an image counts as a near-duplicate.
        planted: margins of planted copies by the kind of change; empty: none were planted.
        images: (n,) numbers of the generated images; None: all of them, in their order.

    Examples:
        >>> import torch
        >>> from retrodiff.evaluation import copying
        >>> generator = torch.Generator().manual_seed(0)
        >>> training, held_out, new = (
        ...     torch.randn(200, 16, generator=generator) for _ in range(3)
        ... )
        >>> generated = torch.cat([training[:10], new])  # the first ten are copies
        >>> found = copying(generated, held_out, {"training": training})["training"]
        >>> sorted(found.copies[:10].tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    source: str
    similarity: Tensor
    row: Tensor
    margin: Tensor
    null: Tensor
    null_similarity: Tensor
    threshold: float
    planted: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    images: Tensor | None = None

    @property
    def rate(self) -> float:
        """Share of generated images above the threshold."""
        return _share(self.margin, self.threshold)

    @property
    def null_rate(self) -> float:
        """Share of held-out real images above the threshold: the rate of false alarms."""
        return _share(self.null, self.threshold)

    @property
    def excess(self) -> float:
        """Share of generated images above the threshold, less the rate of false alarms."""
        return self.rate - self.null_rate

    @property
    def excess_similarity(self) -> tuple[float, float]:
        """Mean cosine of generated images less that of held-out ones, and its standard error."""
        both = self.similarity, self.null_similarity
        error = sum(float(x.var() / len(x)) for x in both if len(x) > 1)
        return float(both[0].mean() - both[1].mean()), error**0.5

    @property
    def times(self) -> float:
        """How many times nearer to the source than to held-out images a near-duplicate is."""
        return math.exp(self.threshold)

    @property
    def sensitivity(self) -> float | None:
        """Share of planted copies above the threshold, each kind of change counting alike."""
        found = self.found()
        return sum(found.values()) / len(found) if found else None

    @property
    def copies(self) -> Tensor:
        """Numbers of the generated images above the threshold, the worst first."""
        order = self._order()
        order = order[self.margin[order] > self.threshold]
        return order if self.images is None else self.images[order]

    def found(self) -> dict[str, float]:
        """Share of planted copies above the threshold, by kind of change."""
        return {kind: _share(x, self.threshold) for kind, x in self.planted.items()}

    def looser(self) -> tuple[float, float] | None:
        """Rates of generated and held-out images at the threshold that finds 95 % of the planted.

        Where real images are often near-duplicates of each other, no threshold has few false alarms
        and finds copies. The two rates still tell copying from its absence.
        """
        if not self.planted:
            return None
        planted = torch.cat(list(self.planted.values())).sort().values
        threshold = float(planted[int((1 - FOUND) * len(planted))]) - 1e-12
        return _share(self.margin, threshold), _share(self.null, threshold)

    def worst(self, n: int = 20) -> list[tuple[int, int, float]]:
        """The n pairs of largest margin: generated image, source image, cosine."""
        number = torch.arange(len(self.margin)) if self.images is None else self.images
        order = self._order()[:n].tolist()
        return [(int(number[i]), int(self.row[i]), float(self.similarity[i])) for i in order]

    def _order(self) -> Tensor:
        return self.margin.argsort(descending=True, stable=True)

    def __str__(self) -> str:
        found = self.sensitivity
        planted = "" if found is None else f", {found:.0%} of planted copies found"
        excess, error = self.excess_similarity
        return (
            f"near-duplicates of {self.source}: {self.rate:.1%} of {len(self.margin):,} generated "
            f"against {self.null_rate:.1%} of {len(self.null):,} held-out images (over "
            f"{self.times:.2f} times nearer{planted}); "
            f"excess similarity {excess:+.4f} ± {error:.2g}"
        )


def copying(
    generated: Tensor,
    held_out: Tensor,
    sources: Mapping[str, Tensor],
    *,
    planted: Mapping[str, Mapping[str, Tensor]] | None = None,
    mirrored: tuple[Tensor, Tensor] | None = None,
    false_alarms: float = 0.01,
) -> dict[str, Copying]:
    """Near-duplicates among generated images, above what held-out real images show.

    Args:
        generated: features (n, d) of generated images.
        held_out: features (h, d) of real images that are in none of the sources.
        sources: features (m, d) by name: training images, the database.
        planted: features (p, d) of changed copies of some images of a source, by name of the source
            and kind of change, to measure how many copies would be found. With ``mirrored``, (p, 2,
            d): of the copy and of its mirror image.
        mirrored: features (n, d) and (h, d) of the mirror images, to find mirrored copies, too.
        false_alarms: expected share of held-out images above the threshold.

    Returns:
        One `Copying` for each source.

    Raises:
        ValueError: too few held-out images to set the threshold.
    """
    check_null(len(held_out), false_alarms)
    queries, nulls = _both(generated, mirrored, 0), _both(held_out, mirrored, 1)
    real = _nearest_real(queries, held_out)
    null_real = _nearest_real(nulls, held_out, own=True)
    margin = _Margin(null_real)
    found = {}
    for name, features in sources.items():
        similarity, row = nearest(queries, features)
        null, _ = nearest(nulls, features)
        margins = {
            kind: margin(nearest(copies, features)[0], _nearest_real(copies, held_out))
            for kind, copies in (planted or {}).get(name, {}).items()
        }
        null_margin = margin(null, null_real)
        found[name] = Copying(
            name,
            similarity,
            row,
            margin(similarity, real),
            null_margin,
            null,
            threshold_of(null_margin, false_alarms),
            margins,
        )
    return found


def neighbor_echo(
    generated: Tensor,
    rows: Sequence[Sequence[int]],
    held_out: Tensor,
    held_out_rows: Sequence[Sequence[int]],
    database: Tensor,
    *,
    mirrored: tuple[Tensor, Tensor] | None = None,
    false_alarms: float = 0.01,
) -> Copying:
    """How near generated images come to the very neighbors that conditioned them.

    ``rate`` is the neighbor-echo rate: the share of images that are nearer to one of their own
    neighbors than held-out images come to theirs.

    Args:
        generated: features (n, d).
        rows: rows of the database that conditioned each; an image without any is left out.
        held_out: features (h, d) of real images.
        held_out_rows: rows that the model would retrieve for each of them.
        database: features (m, d) of the database's pictures.
        mirrored: as in `copying`.
        false_alarms: as in `copying`.

    Returns:
        A `Copying` whose rows are those of the database.

    Raises:
        ValueError: too few held-out images, or no image has neighbors.
    """
    check_null(len(held_out), false_alarms)
    queries, nulls = _both(generated, mirrored, 0), _both(held_out, mirrored, 1)
    similarity, row = _own(queries, rows, database)
    null, _ = _own(nulls, held_out_rows, database)
    null_real = _nearest_real(nulls, held_out, own=True)
    measured = _Margin(null_real)
    margin = measured(similarity, _nearest_real(queries, held_out))
    null_margin = measured(null, null_real)
    used = similarity > -2
    if not bool(used.any()):
        raise ValueError("no generated image has neighbors in the database: nothing can be echoed")
    threshold = threshold_of(null_margin[null > -2], false_alarms)
    return Copying(
        "neighbors",
        similarity[used],
        row[used],
        margin[used],
        null_margin[null > -2],
        null[null > -2],
        threshold,
        images=used.nonzero().flatten(),
    )


def check_null(n: int, false_alarms: float = 0.01) -> None:
    """Refuses held-out images that are too few to set a threshold."""
    least = round(1 / false_alarms)
    if n < least:
        raise ValueError(
            f"{n} held-out images cannot set a threshold with {false_alarms:.1%} false alarms: "
            f"give at least {least}"
        )


def threshold_of(null: Tensor, false_alarms: float) -> float:
    """The value that a new draw of the same distribution exceeds with this probability at most."""
    allowed = max(0, int((len(null) + 1) * false_alarms) - 1)
    return float(null.sort(descending=True).values[allowed])


def nearest(queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine (n,) to the nearest of the rows, and which one that is (n,).

    Args:
        queries: (n, d), or (n, v, d) for several views, of which the nearest counts.
        rows: (m, d).
    """
    if queries.shape[-1] != rows.shape[1]:
        raise ValueError(
            f"features of width {queries.shape[-1]} and {rows.shape[1]} cannot be compared: "
            "extract both with one network"
        )
    keys = unit(rows.detach().cpu().double())
    values, indices = [torch.empty(0).double()], [torch.empty(0, dtype=torch.int64)]
    for part in queries.detach().cpu().double().split(BLOCK):
        best = _cosines(part, keys).max(1)
        values.append(best.values)
        indices.append(best.indices)
    return torch.cat(values), torch.cat(indices)


class _Margin:
    """Log of how many times nearer a source is than held-out images.

    Args:
        null: cosine of each held-out image to the nearest other one.
    """

    def __init__(self, null: Tensor):
        self.floor = max(FLOOR * float((1 - null).median()), 1e-12)

    def __call__(self, source: Tensor, held_out: Tensor) -> Tensor:
        distance, usual = ((1 - x).clamp_min(0) + self.floor for x in (source, held_out))
        return (usual / distance).log()


def _cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosines (n, m) of the better view."""
    if queries.ndim == 2:
        return unit(queries) @ keys.T
    return torch.stack([unit(view) @ keys.T for view in queries.unbind(1)]).amax(0)


def _nearest_real(queries: Tensor, held_out: Tensor, own: bool = False) -> Tensor:
    """Cosine (n,) to the nearest held-out image; of held-out images, to the nearest other one."""
    keys, found, start = unit(held_out.detach().cpu().double()), [torch.empty(0).double()], 0
    for part in queries.detach().cpu().double().split(BLOCK):
        cosines = _cosines(part, keys)
        if own:
            i = torch.arange(len(part))
            cosines[i, i + start] = -2
        found.append(cosines.amax(1))
        start += len(part)
    return torch.cat(found)


def _own(queries: Tensor, rows: Sequence[Sequence[int]], database: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine (n,) to the nearest of each image's own rows, and which; -9 and -1 where none."""
    keys = unit(database.detach().cpu().double())
    similarity = torch.full((len(queries),), -9.0, dtype=torch.float64)
    chosen = torch.full((len(queries),), -1)
    for i, mine in enumerate(rows):
        if mine:
            cosines = _cosines(queries[i : i + 1].detach().cpu().double(), keys[list(mine)])[0]
            best = cosines.max(0)
            similarity[i], chosen[i] = best.values, mine[int(best.indices)]
    return similarity, chosen


def _both(features: Tensor, mirrored: tuple[Tensor, Tensor] | None, side: int) -> Tensor:
    """Features (n, d), or with those of the mirror images (n, 2, d)."""
    return features if mirrored is None else torch.stack([features, mirrored[side]], 1)


def _share(values: Tensor, threshold: float) -> float:
    return (values > threshold).double().mean().item()
