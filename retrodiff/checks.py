"""What must hold where components join; every disagreement is named at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retrodiff.encoders.fingerprint import difference
from retrodiff.interfaces import (
    Autoencoder,
    Conditioner,
    Database,
    Denoiser,
    Encoder,
    Guidance,
    ProposalDistribution,
    Retriever,
    Sampler,
    Schedule,
)

ROLES: dict[str, tuple[type, tuple[str, ...]]] = {
    "encoder": (
        Encoder,
        ("dim", "fingerprint", "encode_image", "loaded", "identity", "preparation", "to"),
    ),
    "database": (Database, ("fingerprint", "__len__", "embeddings", "search", "records")),
    "retriever": (Retriever, ("retrieve",)),
    "proposal": (ProposalDistribution, ("support", "propose")),
    "conditioner": (Conditioner, ("uses_neighbors", "widths", "condition", "null", "drop")),
    "denoiser": (Denoiser, ("shape", "widths", "schedule", "denoise", "prepare")),
    "guidance": (Guidance, ("guide",)),
    "sampler": (Sampler, ("sample",)),
    "schedule": (Schedule, ("sigmas", "start", "finish")),
    "autoencoder": (Autoencoder, ("encode", "decode")),
}
REQUIRED = ("denoiser", "conditioner", "retriever", "guidance", "sampler", "autoencoder")


def check_components(parts: Mapping[str, Any]) -> None:
    """Raise one ValueError that names every empty or disagreeing slot."""
    found = problems(parts)
    if len(found) == 1:
        raise ValueError(found[0])
    if found:
        raise ValueError("the components do not fit together:\n  - " + "\n  - ".join(found))


def problems(parts: Mapping[str, Any]) -> list[str]:
    """Every empty or disagreeing slot, a line each, with both sides and the way out."""
    lines: list[str] = []
    for name in REQUIRED:
        if parts.get(name) is None:
            lines.append(f"{name} is empty: set it with .{name}(...)")
    for name, (protocol, members) in ROLES.items():
        part = parts.get(name)
        missing = [] if part is None else [m for m in members if not _has(part, m)]
        if missing:
            lines.append(
                f"{name}={type(part).__name__} is no {protocol.__name__}: it has no "
                f"{', '.join(missing)}"
            )
    if lines:
        return lines
    return [*_widths(parts), *_fingerprints(parts), *_scale(parts), *_proposal(parts)]


def _has(part: Any, member: str) -> bool:
    """Whether a component has a member, without reading a property that would fetch weights."""
    static = getattr(part, "__dict__", {})
    return hasattr(type(part), member) or member in static or hasattr(part, member)


def _widths(parts: Mapping[str, Any]) -> list[str]:
    denoiser: Denoiser = parts["denoiser"]
    conditioner: Conditioner = parts["conditioner"]
    encoder: Encoder | None = parts.get("encoder")
    database: Database | None = parts.get("database")
    if encoder is not None:
        dim, origin = encoder.dim, f"encoder.dim={encoder.dim}"
    elif database is not None:
        dim = database.fingerprint.dim
        origin = f"database.dim={dim}"
    else:
        return []
    given, taken = conditioner.widths(dim), denoiser.widths
    if given == taken or not taken:
        return []
    return [
        f"{origin} gives the streams {given} through {type(conditioner).__name__}, but the "
        f"denoiser takes {taken}: build the network with these widths, or use the encoder it was "
        "trained with"
    ]


def _fingerprints(parts: Mapping[str, Any]) -> list[str]:
    encoder: Encoder | None = parts.get("encoder")
    database: Database | None = parts.get("database")
    if encoder is None or database is None:
        return []
    stored = database.fingerprint
    if encoder.dim != stored.dim:
        return [
            f"encoder.dim={encoder.dim} does not match database.dim={stored.dim}: open the "
            f"database with the encoder it was built with ({stored.encoder})"
        ]
    differs = encoder_disagreement(encoder, database)
    return [] if differs is None else [differs]


def encoder_disagreement(encoder: Encoder, database: Database) -> str | None:
    """What differs between an encoder and the one a database was built with, in a line.

    The weights of an encoder that fetches them when first used are left out until they are here.
    """
    stored = database.fingerprint
    differs = difference(encoder, stored)
    if differs is None:
        return None
    return (
        f"encoder and database disagree, {differs}: use the encoder the database was built "
        f"with ({stored.encoder}), or build the database again with this one"
    )


def _scale(parts: Mapping[str, Any]) -> list[str]:
    """The database's scale against the network's, where the conditioner knows that one."""
    conditioner: Conditioner = parts["conditioner"]
    database: Database | None = parts.get("database")
    refuses = getattr(conditioner, "refuses", None)
    if refuses is None or database is None or not conditioner.uses_neighbors:
        return []
    line = refuses(database.fingerprint.scale)
    return [] if line is None else [line]


def _proposal(parts: Mapping[str, Any]) -> list[str]:
    proposal: ProposalDistribution | None = parts.get("proposal")
    database: Database | None = parts.get("database")
    if proposal is None or database is None:
        return []
    try:
        proposal.support(database)
    except ValueError as error:
        return [str(error)]
    return []
