"""Hands retrieved pictures to any pipeline that takes reference images, one prompt at a time."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from retrodiff.bridges.chosen import Chosen
from retrodiff.bridges.credited import Pictures
from retrodiff.bridges.reference_retriever import Given, ReferenceRetriever
from retrodiff.disk.files import plain_json
from retrodiff.interfaces import TextEncoder

SHOWN = (str, int, float, bool, type(None))
"""Types of arguments that are kept with a picture."""


def references(
    pipeline: Any,
    database: Given | Sequence[Given],
    prompts: str | Sequence[str],
    k: int,
    *,
    retriever: ReferenceRetriever | TextEncoder,
    where: str | None = None,
    generator: Any = None,
    **arguments: Any,
) -> Pictures:
    """Generates a picture for each prompt from the k references that a database has for it.

    The pipeline is called once for each prompt as ``pipeline(prompt=..., image=[...])``, since
    pipelines share one list of references among the prompts of a call. Nothing else of the call is
    changed: the same call by hand gives the same pictures.

    Args:
        pipeline: of diffusers, plain or modular, or any callable that takes ``image=[...]``:
            ``Flux2Pipeline``, ``QwenImageEditPlusPipeline``.
        database: of `open_database`, a `ReferenceDatabase`, or a list with one for each prompt.
        prompts: one or several.
        k: references for each prompt.
        retriever: how they are chosen, or an encoder, for the default choice.
        where: condition on the columns, such as ``"license in ('CC0', 'CC BY 4.0')"``.
        generator: a ``torch.Generator`` for all prompts in turn, or a list with one for each.
        **arguments: of the pipeline. Those of type list with one entry for each prompt are *not*
            dealt out.

    Returns:
        The pictures, in the order of the prompts, with their references.

    Raises:
        ValueError: the pipeline takes no reference images; see also `ReferenceRetriever.choose`.
    """
    check_takes_references(pipeline)
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    check_output(arguments)
    generators = dealt(generator, len(asked))
    chosen = as_retriever(retriever).choose(database, asked, k, where=where)
    images, each = [], list[Chosen]()
    for one, random in zip(chosen, generators, strict=True):
        made = call(pipeline, prompt=one.prompt, image=one.images, generator=random, **arguments)
        images += made
        each += [one] * len(made)
    return Pictures(images, each, described(pipeline, arguments))


def call(pipeline: Any, **arguments: Any) -> list[Any]:
    """Runs a pipeline, plain or modular; returns its images."""
    if arguments.get("generator") is None:
        arguments.pop("generator", None)
    if hasattr(pipeline, "blocks"):
        return list(pipeline(output="images", **arguments))
    made = pipeline(**arguments)
    return list(made.images if hasattr(made, "images") else made[0])


def check_takes_references(pipeline: Any) -> None:
    """Refuses a pipeline that takes no reference images, or takes ``image`` as something else."""
    names, name = inputs_of(pipeline), type(pipeline).__name__
    if names is None:
        return  # takes any keyword
    if "image" not in names:
        way = ", or ip_adapter(...)" if "ip_adapter_image_embeds" in names else ""
        raise ValueError(
            f"{name} takes no image=[...]: give a pipeline that takes reference images "
            f"(Flux2Pipeline, QwenImageEditPlusPipeline){way}"
        )
    if other := names & {"strength", "mask_image"}:
        raise ValueError(
            f"{name} takes image= as the picture to start from (it has {min(other)}=), not as "
            "references: give a pipeline that takes reference images (Flux2Pipeline, "
            "QwenImageEditPlusPipeline)"
        )


def inputs_of(pipeline: Any) -> set[str] | None:
    """Names of the arguments that a pipeline takes; None: any.

    Pipelines of diffusers name what they take; ``**kwargs`` beside names are its old arguments.
    """
    if hasattr(pipeline, "blocks"):
        return set(pipeline.blocks.input_names)
    parameters = inspect.signature(pipeline).parameters.values()
    several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = {one.name for one in parameters if one.kind not in several}
    return names or None


def check_output(arguments: dict[str, Any]) -> None:
    """Refuses arguments that this side decides, and outputs that cannot carry their references."""
    if arguments.get("output_type", "pil") != "pil":
        raise ValueError(
            f"output_type={arguments['output_type']!r}: only PIL pictures can carry their "
            "references, leave it out"
        )
    if not arguments.get("return_dict", True):
        raise ValueError("return_dict=False: leave it out, Pictures are returned")
    for name in ("prompt", "image", "output", "prompt_embeds"):
        if name in arguments:
            raise ValueError(
                f"{name}= is what references are chosen for or handed over as: leave it out"
            )


def as_retriever(retriever: Any) -> ReferenceRetriever:
    """The retriever, or one with default settings around an encoder."""
    if isinstance(retriever, ReferenceRetriever):
        return retriever
    if not hasattr(retriever, "encode_text"):
        raise ValueError(
            f"retriever={type(retriever).__name__}: give a ReferenceRetriever, or the encoder that "
            "the database was built with"
        )
    return ReferenceRetriever(retriever)


def dealt(generator: Any, n: int) -> list[Any]:
    """One generator for each of n calls."""
    if not isinstance(generator, list | tuple):
        return [generator] * n
    if len(generator) != n:
        raise ValueError(
            f"{n} pictures, but {len(generator)} generators: give one for each, or a single one"
        )
    return list(generator)


def described(pipeline: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Name of a pipeline and the plain ones of its arguments, to be kept with a picture."""
    kept = {name: value for name, value in arguments.items() if isinstance(value, SHOWN)}
    return plain_json({"name": type(pipeline).__name__, **kept})
