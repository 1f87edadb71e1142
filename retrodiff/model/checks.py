"""Checks that components fit together, and names every disagreement at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retrodiff.diffusion.conditioner import refusal
from retrodiff.encoders.fingerprint import difference
from retrodiff.interfaces import (
    Autoencoder,
    Conditioner,
    Context,
    Database,
    Denoiser,
    Encoder,
    Generator,
    Guidance,
    Prior,
    ProposalDistribution,
    Retriever,
    Sampler,
    Schedule,
    member,
)
from retrodiff.numbers import whole

ROLES: dict[str, tuple[type, tuple[str, ...]]] = {
    "encoder": (Encoder, ("dim", "fingerprint", "encode_image")),
    "database": (Database, ("fingerprint", "__len__", "embeddings", "search", "records")),
    "retriever": (Retriever, ("retrieve",)),
    "proposal": (ProposalDistribution, ("support", "propose")),
    "prior": (Prior, ("translate",)),
    "conditioner": (Conditioner, ("uses_neighbors", "widths", "condition", "null", "drop")),
    "generator": (Generator, ("shape", "widths", "generate", "decode")),
    "denoiser": (Denoiser, ("shape", "widths", "schedule", "denoise", "prepare")),
    "guidance": (Guidance, ("guide",)),
    "sampler": (Sampler, ("sample",)),
    "schedule": (Schedule, ("sigmas", "start", "finish")),
    "autoencoder": (Autoencoder, ("encode", "decode")),
}
REQUIRED = ("denoiser", "conditioner", "retriever", "guidance", "sampler", "autoencoder")
DIFFUSION = ("denoiser", "guidance", "sampler", "autoencoder")
"""Slots that a model needs unless it has a generator, in place of all of them."""


def check_components(parts: Mapping[str, Any]) -> None:
    """Raises one ValueError that names every empty or disagreeing slot."""
    found = problems(parts)
    if len(found) == 1:
        raise ValueError(found[0])
    if found:
        raise ValueError("the components do not fit together:\n  - " + "\n  - ".join(found))


def problems(parts: Mapping[str, Any]) -> list[str]:
    """Every empty or disagreeing slot, a line each, with both sides and the way out."""
    foreign = parts.get("generator") is not None
    lines = [
        f"{name} is empty: set it with .{name}(...)"
        for name in REQUIRED
        if parts.get(name) is None and not (foreign and name in DIFFUSION)
    ]
    if foreign:
        lines += [
            f"{name}={type(parts[name]).__name__} has no effect beside generator="
            f"{type(parts['generator']).__name__}: leave one of the two empty"
            for name in (*DIFFUSION, "schedule")
            if parts.get(name) is not None
        ]
    for name in ROLES:
        lines += _role(name, parts.get(name))
    lines += _numbers(parts)
    if lines:
        return lines
    return [*_widths(parts), *_fingerprints(parts), *_scale(parts), *_proposal(parts)]


def _role(name: str, part: Any) -> list[str]:
    """What a component lacks for its slot, in a line."""
    if part is None:
        return []
    if isinstance(part, type):
        return [f"{name}={part.__name__} is a class: give an object of it, {part.__name__}(...)"]
    missing = missing_members(name, part)
    if not missing:
        return []
    return [
        f"{name}={type(part).__name__} is no {ROLES[name][0].__name__}: it has no "
        f"{', '.join(missing)}"
    ]


def check_role(name: str, part: Any) -> None:
    """Raises a ValueError that says what a component lacks for its slot."""
    for line in _role(name, part):
        raise ValueError(line)


def missing_members(name: str, part: Any) -> list[str]:
    """The members that a component lacks for a slot."""
    return [m for m in ROLES[name][1] if not _has(part, m)]


def _numbers(parts: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, least in (("k", 0), ("steps", 1), ("class_top", 1)):
        try:
            whole(name, parts.get(name, least), least)
        except ValueError as error:
            lines.append(str(error))
    template = parts.get("prompt_template", "{}")
    if not _holds_a_class(template):
        lines.append(
            f"prompt_template={template!r} has no {{}} where the name of the class goes: write it "
            "like 'A photo of {}'"
        )
    return lines


def _holds_a_class(template: Any) -> bool:
    try:
        return "\0" in template.format("\0")
    except (AttributeError, ValueError, LookupError):
        return False


def taken(parts: Mapping[str, Any]) -> tuple[str, dict[str, int], int | None]:
    """The part that takes the context: its name, its streams, and the width of its vector."""
    name = "denoiser" if parts.get("generator") is None else "generator"
    part = parts[name]
    return name, dict(part.widths), member(part, ROLES[name][0], "vector_width")


def check_context(generator: Generator, context: Context, null: Context, rows: int) -> None:
    """Refuses a context that a generator does not take, or that is not one row per image.

    Raises:
        ValueError: streams, widths or rows differ; says which.
    """
    widths, vector = dict(generator.widths), member(generator, Generator, "vector_width")
    taker = type(getattr(generator, "denoiser", generator)).__name__
    given = None if context.vector is None else context.vector.shape[-1]
    if context.widths != widths:
        raise ValueError(
            f"the context has the streams {context.widths}, but {taker} takes "
            f"{widths}: use the encoder and the conditioner it was trained with"
        )
    if given != vector:
        raise ValueError(
            f"the context has {_vector(given)}, but {taker} takes "
            f"{_vector(vector)}: use the conditioner it was trained with"
        )
    for name, part in (("context", context), ("null", null)):
        if len(part) != rows and (part.streams or part.vector is not None):
            raise ValueError(
                f"the {name} has {len(part)} rows for {rows} images: give one row for each image"
            )
    if null.described() != context.described():
        raise ValueError(
            f"the null has {null.described()}, but the context {context.described()}: make it from "
            "the context, conditioner.null(context), or give it the same tokens"
        )


def _vector(width: int | None) -> str:
    return "no vector" if width is None else f"a vector of width {width}"


def _has(part: Any, member: str) -> bool:
    """Whether a component has a member, without reading a property that would fetch weights."""
    static = getattr(part, "__dict__", {})
    return hasattr(type(part), member) or member in static or hasattr(part, member)


def _widths(parts: Mapping[str, Any]) -> list[str]:
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
    try:
        given = conditioner.widths(dim)
        vector = member(conditioner, Conditioner, "vector_width")(dim)
    except ValueError as error:
        return [str(error)]
    name, streams, width = taken(parts)
    if given != streams:
        return [
            f"{origin} gives the streams {given} through {type(conditioner).__name__}, but the "
            f"{name} takes {streams}: build the network with these widths, or use the encoder it "
            "was trained with"
        ]
    if vector != width:
        return [
            f"{origin} gives {_vector(vector)} through {type(conditioner).__name__}, but the "
            f"{name} takes {_vector(width)}: build the network with vector_width={vector}, or use "
            "another conditioner"
        ]
    return []


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
    if database is None or not conditioner.uses_neighbors:
        return []
    line = refusal(conditioner, database.fingerprint.scale)
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
