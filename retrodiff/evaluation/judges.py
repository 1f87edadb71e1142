"""Asks an independent judge whether images show the class that was asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrodiff.encoders import TimmEncoder
from retrodiff.evaluation.metrics import Score, checked
from retrodiff.interfaces import Encoder


@dataclass(frozen=True)
class Judge:
    """A classifier with the names of its classes.

    Args:
        name: to be told beside its numbers.
        encoder: makes features.
        head: features (n, d) -> logits (n, classes).
        classes: a name for each; several names of one class are separated by commas.

    Examples:
        >>> import torch
        >>> from retrodiff.encoders import TimmEncoder
        >>> from retrodiff.evaluation import Judge
        >>> encoder = TimmEncoder("test_resnet", image_size=32)
        >>> judge = Judge(
        ...     "mine", encoder, torch.nn.Linear(encoder.dim, 2), ("cat", "dog, hound")
        ... )
        >>> judge.numbers(["hound", "cat"])
        [1, 0]
    """

    name: str
    encoder: Encoder
    head: Callable[[Tensor], Tensor]
    classes: tuple[str, ...]

    def numbers(self, labels: Sequence[str]) -> list[int]:
        """The number of the class of each label.

        Raises:
            ValueError: the judge has no class of that name.
        """
        known: dict[str, int] = {}
        for i, names in enumerate(self.classes):
            for name in names.split(","):
                known.setdefault(_normal(name), i)
        if missing := sorted({label for label in labels if _normal(label) not in known}):
            raise ValueError(
                f"the judge {self.name} has no class {', '.join(missing[:5])}: name classes as it "
                f"does (such as {', '.join(self.classes[:3])}), or take the nearest class mean"
            )
        return [known[_normal(label)] for label in labels]


def timm_judge(
    name: str, *, classes: Sequence[str] | None = None, pretrained: bool = True
) -> Judge:
    """A judge of one of timm's classifiers.

    Args:
        name: timm's, with the tag of its weights, such as ``resnet50.a1_in1k``.
        classes: names; None: those of ImageNet, for weights trained on its 1,000 classes.
        pretrained: False: random weights, for tests.

    Raises:
        ValueError: the network is no classifier, or its classes have no names here.
        OSError: the weights cannot be fetched.
    """
    import timm
    from timm.data import ImageNetInfo  # pyright: ignore[reportPrivateImportUsage]

    encoder = TimmEncoder(name, pretrained)
    network: Any = timm.create_model(encoder.name, pretrained=pretrained)
    if not network.num_classes:
        raise ValueError(f"{name} is no classifier: take one that is, such as resnet50.a1_in1k")
    names = tuple(classes or ())
    if classes is None:
        if network.num_classes != 1000:
            raise ValueError(
                f"{name} has {network.num_classes} classes: give their names, classes="
            )
        names = tuple(map(str, ImageNetInfo().label_descriptions()))
    if len(names) != network.num_classes:
        raise ValueError(f"{len(names)} names for {network.num_classes} classes of {name}")
    head = network.get_classifier().eval().requires_grad_(False)
    return Judge(f"timm:{name}", encoder, head, names)


def class_accuracy(
    features: Tensor, labels: Sequence[str], reference: Tensor, reference_labels: Sequence[str]
) -> Score:
    """Share of images nearest to the mean of the class that they were asked to show.

    The note says how many of the reference images the same judge gets right, each left out of the
    mean of its class: no generator can be measured beyond that.

    Args:
        features: (n, d) of generated images.
        labels: class of each.
        reference: (m, d) of real images.
        reference_labels: class of each; every class of ``labels`` is among them.

    Raises:
        ValueError: a class has fewer than two reference images.
    """
    a, b = checked(features, reference)
    classes = sorted(set(reference_labels))
    number = {name: i for i, name in enumerate(classes)}
    mine = torch.tensor([number[label] for label in reference_labels])
    counts = torch.bincount(mine, minlength=len(classes))
    few = [c for c in classes if counts[number[c]] < 2] + sorted(set(labels) - number.keys())
    if few:
        raise ValueError(
            f"the class {few[0]} has fewer than two reference images: the nearest class mean needs "
            "at least two of each"
        )
    if len(classes) < 2:
        raise ValueError("one class only: class accuracy says nothing")
    scale = b.std(0).clamp_min(1e-12)
    a, b = a / scale, b / scale
    sums = torch.zeros(len(classes), b.shape[1], dtype=b.dtype).index_add_(0, mine, b)
    means = sums / counts[:, None]
    wanted = torch.tensor([number[label] for label in labels])
    right = torch.cdist(a, means).argmin(1) == wanted
    distances = torch.cdist(b, means)
    rows = torch.arange(len(b))
    others = (sums[mine] - b) / (counts[mine] - 1)[:, None]
    distances[rows, mine] = (b - others).norm(dim=1)
    real = (distances.argmin(1) == mine).double().mean().item()
    note = f"{real:.1%} of the reference images; chance {1 / len(classes):.1%}"
    value = right.double().mean().item()
    name = f"class accuracy (nearest mean of {len(classes)} classes)"
    return Score(name, value, len(a), len(b), "higher", note=note)


def judged_accuracy(
    judge: Judge,
    logits: Tensor,
    labels: Sequence[str],
    real: tuple[Tensor, Sequence[str]] | None = None,
) -> Score:
    """Share of images whose most likely class is the one that they were asked to show.

    Args:
        judge: a classifier.
        logits: (n, classes) that it gave.
        labels: class of each image.
        real: logits and labels of real images, to say how many of them the judge gets right.
    """

    def share(given: Tensor, names: Sequence[str]) -> float:
        wanted = torch.tensor(judge.numbers(names))
        return (given.argmax(1).cpu() == wanted).double().mean().item()

    note = "" if real is None else f"{share(*real):.1%} of the reference images"
    name = f"class accuracy (judge {judge.name})"
    return Score(name, share(logits, labels), len(logits), 0, "higher", note=note)


def labels_of_prompts(prompts: Sequence[str], classes: Sequence[str]) -> list[str | None]:
    """The class that each prompt names: the longest that stands in it as whole words; else None."""
    ordered = sorted(set(classes), key=len, reverse=True)
    found: list[str | None] = []
    for prompt in prompts:
        text = f" {_normal(prompt)} "
        found.append(next((c for c in ordered if f" {_normal(c)} " in text), None))
    return found


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
