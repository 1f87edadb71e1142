"""What an encoder knows about concepts that it has never seen."""

from __future__ import annotations

from typing import Any

import torch
from sets import STYLES, Pictograms
from torch import Tensor

from retrodiff.encoders import CLIPEncoder
from retrodiff.evaluation import text_recall
from retrodiff.interfaces import unit


def report(encoder: CLIPEncoder, sets: Pictograms) -> dict[str, Any]:
    """Retrieval by title and the separation of styles, on held-out concepts."""
    images = unit(encoder.encode_image(sets.images))
    concepts = [row["concept"] for row in sets.rows]
    found: dict[str, Any] = {}
    for split in ("held-out", "database", "train"):
        of_split = sets.where(lambda row, s=split: row["split"] == s)
        for names, styles in (("three styles", STYLES[:3]), ("openmoji", STYLES[3:])):
            those = sets.where(
                lambda row, s=split, w=styles: row["split"] == s and row["style"] in w
            )
            everywhere = sets.where(lambda row, w=styles: row["style"] in w)
            titles = {concepts[i]: sets.rows[i]["title"] for i in those.tolist()}
            texts = unit(encoder.encode_text(list(titles.values())))
            for where, candidates in ((split, those), ("all", everywhere)):
                right = _same(list(titles), [concepts[i] for i in candidates.tolist()])
                scores = text_recall(texts, images[candidates], right, (1, 5, 20))
                found[f"{split} titles -> {where} pictures, {names}"] = {
                    **{f"recall@{k}": round(v, 3) for k, v in scores.items()},
                    "titles": len(titles),
                    "pictures": len(candidates),
                    "chance@5": round(_chance(right, 5), 3),
                }
        if split == "held-out":
            found["styles"] = _styles(images, sets, of_split, concepts)
    return found


def _same(one: list[str], other: list[str]) -> Tensor:
    number = {name: i for i, name in enumerate(dict.fromkeys([*one, *other]))}
    a, b = (torch.tensor([number[name] for name in names]) for names in (one, other))
    return a[:, None] == b[None, :]


def _chance(right: Tensor, k: int) -> float:
    """Recall at k of a random order, roughly."""
    return float((1 - (1 - right.float().mean(1)) ** k).mean())


def _styles(images: Tensor, sets: Pictograms, held: Tensor, concepts: list[str]) -> dict[str, Any]:
    """How concept and style show in the embeddings of held-out pictures."""
    from sklearn.linear_model import LogisticRegression

    x = images[held]
    style = torch.tensor([STYLES.index(sets.rows[i]["style"]) for i in held.tolist()])
    same_concept = _same([concepts[i] for i in held.tolist()], [concepts[i] for i in held.tolist()])
    same_style = style[:, None] == style[None, :]
    similarity = x @ x.T
    kinds = {
        "same concept, other style": same_concept & ~same_style,
        "other concept, same style": ~same_concept & same_style,
        "other concept, other style": ~same_concept & ~same_style,
    }
    found: dict[str, Any] = {
        f"similarity: {name}": round(float(similarity[which].mean()), 3)
        for name, which in kinds.items()
    }
    for names, most in (("three styles", 3), ("four styles", 4)):
        some = style < most
        candidates = similarity.masked_fill(same_style | (style >= most)[None, :], -2)[some]
        best = candidates.argmax(1)
        hit = same_concept[some].gather(1, best[:, None]).float().mean()
        found[f"nearest picture of another style has the concept, {names}"] = round(float(hit), 3)
        known = sets.where(
            lambda row, n=most: row["split"] == "train" and row["style"] in STYLES[:n]
        )
        labels = [STYLES.index(sets.rows[i]["style"]) for i in known.tolist()]
        probe = LogisticRegression(max_iter=2000, C=100.0).fit(images[known].numpy(), labels)
        right = probe.score(x[some].numpy(), style[some].numpy())
        found[f"style read by a linear probe, {names}"] = round(float(right), 3)
    return found


PROMPTS = (
    "a robot wearing a hat",
    "red fruit",
    "sad face",
    "something to drink",
    "a big cat",
    "winter sport",
    "musical instrument",
    "a heart in blue",
    "vehicle on rails",
    "birthday party",
)


def sheet(encoder: CLIPEncoder, sets: Pictograms, held: int = 8) -> Any:
    """Free prompts and titles of held-out concepts, each with the pictures nearest to it.

    Six are from the three styles, then two from OpenMoji. Below a picture stand its title, the
    similarity, and a star where its concept is held out.

    Returns:
        A PIL image.
    """
    from retrodiff.databases import contact_sheet
    from retrodiff.pictures.converting import to_float

    where = [
        (sets.where(lambda row: row["style"] in STYLES[:3]), 6),
        (sets.where(lambda row: row["style"] == "openmoji"), 2),
    ]
    unseen = sorted({row["title"] for row in sets.rows if row["split"] == "held-out"})
    prompts = [*PROMPTS, *unseen[:: max(1, len(unseen) // held)][:held]]
    texts = unit(encoder.encode_text(prompts))
    pictures: list[list[Tensor]] = [[] for _ in prompts]
    captions: list[list[str]] = [[] for _ in prompts]
    for candidates, count in where:
        if not len(candidates):
            continue
        similarity = texts @ unit(encoder.encode_image(sets.images[candidates])).T
        values, places = similarity.topk(count)
        for i, (row, at) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            for value, place in zip(row, at, strict=True):
                number = int(candidates[place])
                about = sets.rows[number]
                star = "*" if about["split"] == "held-out" else ""
                pictures[i].append(to_float(sets.images[number]))
                captions[i].append(f"{value:.2f}{star} {about['style']}\n{about['title'][:18]}")
    return contact_sheet(prompts, pictures, captions, side=96)
