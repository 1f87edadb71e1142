"""Finished samples as files that say what they were made from."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retrodiff.bridges.credited import SIDECAR, credited_png
from retrodiff.model.generated import Generation, to_picture


@dataclass(frozen=True, eq=False)
class CreditedFile:
    """A picture as PNG, and what it was made from.

    Args:
        name: of the file.
        png: its bytes, with the origin as a text chunk.
        about: the same as JSON, for the file beside it.
    """

    name: str
    png: bytes
    about: dict[str, Any]

    @property
    def sidecar(self) -> tuple[str, bytes]:
        """Name and bytes of the file beside it."""
        text = json.dumps(self.about, ensure_ascii=False, indent=1)
        return self.name + SIDECAR, text.encode()


def credited_files(
    out: Generation, prompt: str, made_by: dict[str, Any], stem: str = ""
) -> list[CreditedFile]:
    """The samples with prompt, settings, rows, similarities, records and shares.

    Args:
        out: finished samples.
        prompt: what was asked, in words.
        made_by: name of the model and what else made them, beside ``out.settings``.
        stem: what names of files begin with; empty: the prompt.
    """
    stem = stem or re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "sample"
    files: list[CreditedFile] = []
    for i, image in enumerate(out.images):
        png, about = credited_png(
            to_picture(image), prompt, references(out, i), {**made_by, **out.settings, "image": i}
        )
        seed = out.settings.get("seed", 0)
        files.append(CreditedFile(f"{stem}-seed{seed}-{i}.png", png, about))
    return files


def references(out: Generation, i: int) -> list[dict[str, Any]]:
    """The rows that conditioned a sample: row, similarity, record, and its share where known."""
    near = out.neighbors
    rows = near.indices[i].flatten().tolist()
    records = near.records[i] if near.records else ({},) * len(rows)
    similarity = near.similarity[i].flatten().tolist()
    shares: list[float] | None = None
    if out.attribution is not None and near.indices.ndim == 2:
        shares = out.attribution.means[i].tolist()
    return [
        {
            "row": row,
            "similarity": similarity[j],
            **({} if shares is None else {"share": shares[j]}),
            "record": dict(records[j]),
        }
        for j, row in enumerate(rows)
        if row >= 0
    ]


def archive(files: Sequence[CreditedFile]) -> bytes:
    """All of them with their sidecars, as a zip file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for file in files:
            packed.writestr(file.name, file.png)
            packed.writestr(*file.sidecar, compress_type=zipfile.ZIP_DEFLATED)
    return out.getvalue()
