"""Chooses the references of a prompt: near to it, unlike each other, suitable, and allowed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from retrodiff.bridges.chosen import Chosen, Reference, name_of
from retrodiff.bridges.ranking import PicturesAndCaptions, copies_among, varied
from retrodiff.bridges.reference_database import ReferenceDatabase, View
from retrodiff.checkpoints.hub import fetch
from retrodiff.disk.files import write_folder, write_json
from retrodiff.disk.untrusted import inside, read_json
from retrodiff.encoders.folder import MARKER as ENCODER
from retrodiff.encoders.folder import WEIGHTS, load_encoder, named_encoder, save_encoder
from retrodiff.encoders.prompts import prompt_list
from retrodiff.interfaces import Database, Neighbors, Query, Retriever, TextEncoder
from retrodiff.model.checks import encoder_disagreement
from retrodiff.numbers import real, whole
from retrodiff.retrieval import MultiQuery, NearestNeighbors, ReciprocalRankFusion
from retrodiff.text import printable

FORMAT = 1
MARKER = "reference_retriever.json"
SETTINGS = ("diversity", "copies", "top", "min_side", "aspect", "strict", "phrasings")
Given = Database | ReferenceDatabase


class ReferenceRetriever:
    """Chooses the references of a prompt from a database of pictures.

    The nearest ``top`` rows that the filter leaves are looked at. Of these go pictures that are too
    small or too narrow and near copies of better ones; of the rest k are taken by maximal marginal
    relevance (Carbonell & Goldstein 1998, whose λ is 1 - ``diversity``).

    Args:
        encoder: the one the database was built with; must place text.
        diversity: 0: the k nearest; towards 1: unlike each other, whatever the prompt says.
        copies: cosine above which two pictures are taken for copies of each other, and the lower
            one left out; 1: none is. Encoders differ: look at `Chosen.explain`.
        top: rows that are looked at.
        min_side: shortest side in pixels that a picture must have; 0: any.
        aspect: least and greatest width / height.
        strict: take original files only; else a thumbnail stands in for a file that is gone, with
            a warning.
        phrasings: templates such as ``"a painting of {}"``; the prompt is asked for in these, too,
            and the lists are merged.
        ranking: what ranks the rows; nearest first by default. It is not saved.

    Raises:
        ValueError: the encoder places no text, or a number is out of range.

    Examples:
        >>> from retrodiff.encoders import CLIPEncoder
        >>> retriever = ReferenceRetriever(CLIPEncoder("ViT-B-32-quickgelu", "openai"))
        >>> retriever.diversity
        0.3
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        diversity: float = 0.3,
        copies: float = 0.97,
        top: int = 100,
        min_side: int = 0,
        aspect: tuple[float, float] = (0.0, math.inf),
        strict: bool = False,
        phrasings: Sequence[str] = (),
        ranking: Retriever | None = None,
    ):
        if not hasattr(encoder, "encode_text"):
            raise ValueError(
                f"encoder={type(encoder).__name__} places no text, and prompts are text: build the "
                "database with one that does, such as CLIPEncoder"
            )
        self.encoder = encoder
        self.diversity = real("diversity", diversity, 0, 1)
        self.copies = real("copies", copies, -1, 1)
        self.top = whole("top", top)
        self.min_side = whole("min_side", min_side, 0)
        if not isinstance(aspect, Sequence) or len(aspect) != 2:
            raise ValueError(f"aspect={aspect!r}: give the least and the greatest width / height")
        least = real("aspect[0]", aspect[0], 0)
        most = real("aspect[1]", aspect[1], 0, infinite=True)
        if least > most:
            raise ValueError(f"aspect={tuple(aspect)!r}: the first must not exceed the second")
        self.aspect, self.strict = (least, most), bool(strict)
        self.ranking = ranking or NearestNeighbors()
        # The one place that knows what a template looks like.
        several = MultiQuery(ReciprocalRankFusion(self.ranking, top), encoder, phrasings)
        self.phrasings = tuple(cast("Sequence[str]", several.phrasings))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in SETTINGS)
        return f"ReferenceRetriever({type(self.encoder).__name__}, {shown})"

    def choose(
        self,
        database: Given | Sequence[Given],
        prompts: str | Sequence[str],
        k: int,
        *,
        where: str | None = None,
    ) -> list[Chosen]:
        """The references of each prompt, with their pictures.

        Args:
            database: of `open_database`, a `ReferenceDatabase`, or a list with one for each prompt.
            prompts: one or several.
            k: references for each prompt. Where the filter or the sizes leave fewer, all that are
                left are taken, with a warning.
            where: condition on the columns, such as ``"license in ('CC0', 'CC BY 4.0')"``.

        Raises:
            ValueError: the encoder is not the database's, no row is left, or there are not as many
                databases as prompts.
            OSError: a picture that cannot be read has no thumbnail, or ``strict`` refuses it.
        """
        asked = prompt_list([prompts] if isinstance(prompts, str) else prompts)
        k = whole("k", k)
        if not asked:
            raise ValueError("prompts is empty: give at least one")
        if isinstance(database, list | tuple):
            if len(database) != len(asked):
                raise ValueError(
                    f"{len(asked)} prompts, but {len(database)} databases: give one for each "
                    "prompt, or a single one for all"
                )
            each = zip(database, asked, strict=True)
            return [self.choose(one, prompt, k, where=where)[0] for one, prompt in each]
        base = _opened(database)
        if (differs := encoder_disagreement(self.encoder, base.database)) is not None:
            raise ValueError(differs)
        view = base.filtered(where)
        ranked = self._ranked(view, asked, k)
        return [
            self._chosen(base, view, prompt, ranked.rows([i]), k, where)
            for i, prompt in enumerate(asked)
        ]

    def _ranked(self, view: View, prompts: list[str], k: int) -> Neighbors:
        """The rows that are looked at (b, n) for each prompt, best first."""
        with torch.no_grad():
            query = Query(self.encoder.encode_text(prompts), tuple(prompts))
            ranking, reach = self.ranking, min(max(self.top, k), len(view))
            if self.phrasings:
                query = MultiQuery(ranking, self.encoder, self.phrasings).expand(query)
            if view.captions is not None:
                if query.embedding.ndim == 2:
                    query = Query(query.embedding.unsqueeze(1), query.source)
                ranking = PicturesAndCaptions(ranking, view)
            if query.embedding.ndim == 3:
                ranking = ReciprocalRankFusion(ranking, reach)
            return ranking.retrieve(query, view.database, reach)

    def _chosen(
        self,
        base: ReferenceDatabase,
        view: View,
        prompt: str,
        ranked: Neighbors,
        k: int,
        where: str | None,
    ) -> Chosen:
        rows = ranked.indices[0].tolist()
        records = view.database.records(ranked.indices[0].cpu())
        numbers = [view.number(row) for row in rows]
        names = [name_of(*each) for each in zip(records, numbers, strict=True)]
        out: dict[int, str] = {}
        if self.min_side or self.aspect != (0, math.inf):
            for place, row in enumerate(rows):
                if (why := self._unsuitable(view, row, records[place])) is not None:
                    out[place] = why
        fit = [place for place in range(len(rows)) if place not in out]
        twice = copies_among(ranked.take(torch.tensor(fit)), self.copies) if fit else {}
        for place, (better, cosine) in twice.items():
            out[fit[place]] = f"a copy of {printable(names[fit[better]])} (cosine {cosine:.3f})"
        places = [place for place in fit if place not in out]
        self._check_enough(len(places), k, len(rows), where, out)
        left = ranked.take(torch.tensor(places))
        query = Query(torch.zeros(1, left.embeddings.shape[-1]))
        taken = [places[i] for i in varied(left, view.database, query, self.diversity, k).tolist()]
        vectors = ranked.embeddings[0, taken].float()
        between = torch.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
        references, pictures = [], []
        for i, place in enumerate(taken):
            picture, original = view.picture(rows[place], names[place], self.strict)
            pictures.append(picture)
            references.append(
                Reference(
                    row=numbers[place],
                    similarity=float(ranked.similarity[0, place]),
                    record=records[place],
                    rank=place + 1,
                    nearest=float(between[i, :i].max()) if i else None,
                    original=original,
                )
            )
        lines = [
            f"{printable(names[place])}, rank {place + 1}: {why}"
            for place, why in sorted(out.items())
            if place < max(taken)
        ]
        seen = (len(base), len(view), len(rows))
        return Chosen(prompt, tuple(references), pictures, vectors, seen, where, tuple(lines))

    def _unsuitable(self, view: View, row: int, record: Any) -> str | None:
        """Why a picture is too small or of the wrong shape; None: it is not."""
        width, height = record.get("width"), record.get("height")
        if not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
            try:
                width, height = view.size(row, self.strict)
            except (OSError, ValueError) as error:
                return f"cannot be read ({error})"
        if min(width, height) < self.min_side:
            return f"{width} x {height} pixels, min_side={self.min_side}"
        least, most = self.aspect
        if not least <= width / height <= most:
            return f"{width} x {height} pixels, aspect=({least:g}, {most:g})"
        return None

    def _check_enough(
        self, left: int, k: int, seen: int, where: str | None, out: dict[int, str]
    ) -> None:
        """Refuses an empty choice, and warns of a short one."""
        if left >= k:
            return
        why = "" if where is None else f" that where={where!r} leaves"
        sizes = sum(" a copy of " not in f" {line}" for line in out.values())
        text = (
            f"{left or 'none'} of the {seen:,} rows{why} can be taken: {sizes:,} are of the wrong "
            f"size, {len(out) - sizes:,} are copies of others"
        )
        if not left:
            raise ValueError(f"{text}: lower min_side, widen aspect, or raise top={self.top}")
        warnings.warn(f"k={k}, but {text}; {left} are used", stacklevel=4)

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Writes encoder and settings into a folder, for `from_pretrained`.

        Args:
            path: the folder; it appears whole or not at all.
            overwrite: replace an earlier one there.

        Raises:
            ValueError: the encoder is of a kind that no folder can keep.
        """
        settings: dict[str, Any] = {name: getattr(self, name) for name in SETTINGS}
        settings["aspect"] = [x if math.isfinite(x) else None for x in self.aspect]
        settings["phrasings"] = list(self.phrasings)
        config: Any = getattr(self.encoder, "config", dict)()
        named = config if config.get("kind") == "open_clip" and config.get("pretrained") else None

        def write(folder: Path) -> None:
            if named is None:
                inner = save_encoder(cast("Any", self.encoder), folder / "encoder")
                for name in (ENCODER, WEIGHTS):
                    (inner / name).rename(folder / name)
                inner.rmdir()
            about = {"format": FORMAT, "settings": settings, "encoder": named}
            write_json(folder / MARKER, about)

        return write_folder(path, write, marker=MARKER, own=own_files, overwrite=overwrite)

    @classmethod
    def from_pretrained(cls, path: str, **where: Any) -> ReferenceRetriever:
        """The retriever of a folder, or with default settings around an encoder's folder.

        Args:
            path: written by `save_pretrained` or `save_encoder`, on this machine or as
                ``OWNER/NAME`` on the Hugging Face Hub.
            **where: ``subfolder``, ``revision`` and ``token`` as diffusers hands them over; what
                else it hands to every component is left aside.

        Raises:
            ValueError: the folder is damaged, or asks for what no file may.
        """
        folder = _folder(path, where)
        if not (folder / MARKER).is_file():
            return cls(cast("TextEncoder", load_encoder(folder)))
        about = read_json(inside(folder, MARKER), largest=1 << 20)
        if not isinstance(about, dict) or not isinstance(about.get("settings"), dict):
            raise ValueError(f"{printable(folder / MARKER)} holds no settings: it is damaged")
        if not isinstance(number := about.get("format"), int) or number > FORMAT:
            raise ValueError(
                f"{printable(folder / MARKER)} has format {number!r:.20}, newer than {FORMAT}: "
                "upgrade retrodiff"
            )
        settings = {k: v for k, v in about["settings"].items() if k in SETTINGS}
        if isinstance(aspect := settings.get("aspect"), list) and len(aspect) == 2:
            settings["aspect"] = (aspect[0], math.inf if aspect[1] is None else aspect[1])
        if about.get("encoder") is not None:
            return cls(named_encoder(about["encoder"]), **settings)
        return cls(cast("TextEncoder", load_encoder(folder)), **settings)


def own_files(folder: Path) -> set[str]:
    """The files of a retriever's folder."""
    del folder
    return {MARKER, ENCODER, WEIGHTS}


def _opened(database: Any) -> ReferenceDatabase:
    return database if isinstance(database, ReferenceDatabase) else ReferenceDatabase(database)


def _folder(path: str, where: dict[str, Any]) -> Path:
    """A folder on this machine; that of a repository of the Hub is fetched."""
    subfolder = where.get("subfolder") or ""
    prefix = f"{subfolder}/" if subfolder else ""
    names = tuple(prefix + name for name in (MARKER, ENCODER, WEIGHTS))
    revision, token = where.get("revision"), where.get("token")
    return fetch(path, revision=revision, token=token, patterns=names) / subfolder
