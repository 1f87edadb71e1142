"""Writes the card (README.md) of a model on the Hub: its parts, its encoder, how to use it.

Facts only, read off the components; what the model is good for is for its maker to add.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from retrodiff.checkpoints.database_place import shared_address
from retrodiff.checkpoints.foreign.published import Architecture, recognized
from retrodiff.diffusion.schedule import ScaledLinear
from retrodiff.interfaces import Encoder, Fingerprint, member
from retrodiff.networks.kl import KLAutoencoder
from retrodiff.networks.unet import UNet
from retrodiff.networks.vq import VQAutoencoder
from retrodiff.text import printable


def model_card(parts: Mapping[str, Any], repo: str) -> str:
    """The text of a README.md.

    Args:
        parts: component by slot, as of a `Model`.
        repo: ``owner/name``.
    """
    encoder, database = parts.get("encoder"), parts.get("database")
    generator = parts.get("generator")
    if generator is not None:
        kind, made_by = "generative", [("generator", repr(generator))]
        how = []
    else:
        kind = "diffusion"
        made_by = [
            ("architecture", published_name(parts) or "none of the published models"),
            ("denoiser", _network(parts["denoiser"])),
            ("first stage", _network(parts["autoencoder"])),
        ]
        how = [("guidance, sampler", f"{parts['guidance']!r}, {parts['sampler']!r}")]
    rows = [
        *made_by,
        ("condition", repr(parts["conditioner"])),
        ("encoder", "none" if encoder is None else _made(member(encoder, Encoder, "identity"))),
        ("database", "none" if database is None else _stored(database)),
        ("retriever", repr(parts["retriever"])),
        *how,
        ("steps, tokens per image", f"{parts['steps']}, {parts['k']}"),
    ]
    from huggingface_hub import ModelCardData

    task = "text-to-image" if hasattr(encoder, "encode_text") else "unconditional-image-generation"
    given, shared = json.dumps(printable(repo)), shared_address(database)
    if shared is not None:
        given += ", trust_database=True"
    elif database is not None:
        given += ', database=open_database("...")'
    tags = ["retrieval-augmented-diffusion"]
    facts = ModelCardData(library_name="retrodiff", pipeline_tag=task, tags=tags)
    return "\n".join(
        [
            "---",
            facts.to_yaml().strip(),
            "---",
            "",
            f"# {_cell(repo.rpartition('/')[2])}",
            "",
            f"A retrieval-augmented {kind} model, kept as safetensors and JSON.",
            "",
            "```python",
            "from retrodiff import Model, open_database",
            "",
            f"model = Model.from_pretrained({given})",
            "```",
            "",
            "| part | what it is |",
            "|---|---|",
            *(f"| {name} | {_cell(value)} |" for name, value in rows),
            "",
            f"Its database is at {_cell(shared)}: `trust_database=True` fetches it."
            if shared
            else "The database is not part of this repository.",
            "Embeddings of another encoder, another preprocessing or another scale are refused.",
            "",
        ]
    )


def _cell(value: str) -> str:
    """Text as a cell of a table: no mark-up, no HTML, no link of a name's."""
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", printable(value))
    return html.escape(text, quote=False).replace("://", ":&#47;&#47;")


def published_name(parts: Mapping[str, Any]) -> str | None:
    """Name of the published model that has this architecture; None if there is none."""
    network, autoencoder = getattr(parts["denoiser"], "network", None), parts["autoencoder"]
    if not (isinstance(network, UNet) and isinstance(autoencoder, VQAutoencoder | KLAutoencoder)):
        return None
    return recognized(
        Architecture(
            unet=network.config(),
            kind="vq" if isinstance(autoencoder, VQAutoencoder) else "kl",
            autoencoder=autoencoder.config(),
            schedule=ScaledLinear(),  # takes no part in the comparison
        )
    ).name


def _network(part: Any) -> str:
    inner = getattr(part, "network", None)
    name = ", ".join(type(x).__name__ for x in (part, inner) if x is not None)
    if not isinstance(part, nn.Module):
        return name
    return f"{name}, {sum(p.numel() for p in part.parameters()):,} parameters"


def _made(made: Fingerprint) -> str:
    weights = f"weights {made.weights}" if made.weights else "published weights"
    return f"{made.encoder}, {weights}, preprocessing {made.preprocessing}, width {made.dim}"


def _stored(database: Any) -> str:
    stored: Fingerprint = database.fingerprint
    rows = f"{len(database):,} rows, hash {stored.rows or 'unknown'}, stored {stored.scale}"
    return f"{rows}, made with {_made(stored)}"
