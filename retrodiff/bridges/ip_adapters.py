"""Hands what was retrieved to an IP-Adapter, for each prompt its own.

IP-Adapter: Ye et al. 2023. Its image prompt is the embedding that a CLIP image encoder gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from retrodiff.bridges.chosen import Chosen
from retrodiff.bridges.credited import Pictures
from retrodiff.bridges.reference_calls import (
    as_retriever,
    call,
    check_output,
    dealt,
    described,
    inputs_of,
)
from retrodiff.bridges.reference_retriever import Given, ReferenceRetriever
from retrodiff.interfaces import TextEncoder
from retrodiff.numbers import whole

SAME = 0.99
"""Cosine of two encoders' embeddings of one picture above which they are taken for the same."""

PROBES = 4
"""Pictures that both encoders are asked about."""


def ip_adapter(
    pipeline: Any,
    database: Given | Sequence[Given],
    prompts: str | Sequence[str],
    k: int,
    *,
    retriever: ReferenceRetriever | TextEncoder,
    where: str | None = None,
    use: Literal["embeddings", "pictures"] = "embeddings",
    merge: Literal["mean", "each"] = "mean",
    num_images_per_prompt: int = 1,
    generator: Any = None,
    **arguments: Any,
) -> Pictures:
    """Generates pictures with what a database has for each prompt as the IP-Adapter's image prompt.

    The pipeline is called once for each prompt. In one call for several it would repeat all image
    prompts for every prompt (diffusers 0.42), so that each would see the neighbors of the others.

    Args:
        pipeline: of diffusers (Stable Diffusion, SDXL), after ``load_ip_adapter``.
        database: of `open_database`, a `ReferenceDatabase`, or a list with one for each prompt.
        prompts: one or several.
        k: references for each prompt.
        retriever: how they are chosen, or an encoder, for the default choice.
        where: condition on the columns, such as ``"license in ('CC0', 'CC BY 4.0')"``.
        use: ``embeddings`` takes those of the database, which must be built with the image encoder
            of the adapter; ``pictures`` has the pipeline encode the pictures, so that any encoder
            may have found them.
        merge: ``mean`` gives one image prompt, the mean of the references weighted by their
            similarity to the text; ``each`` gives k of them, without weights, since an adapter
            normalizes each.
        num_images_per_prompt: pictures for each prompt.
        generator: a ``torch.Generator`` for all, or a list with one for each picture, those of the
            first prompt first.
        **arguments: of the pipeline.

    Returns:
        The pictures, those of the first prompt first, with their references.

    Raises:
        ValueError: the pipeline has no IP-Adapter, or one that takes something else; the database
            was not built with the adapter's encoder; see also `ReferenceRetriever.choose`.
    """
    adapter = _adapter(pipeline, use)
    check_output(arguments)
    choices = {"use": (use, ("embeddings", "pictures")), "merge": (merge, ("mean", "each"))}
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name}={value!r}: give one of {', '.join(known)}")
    for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
        if name in arguments:
            raise ValueError(f"{name}= is what the references are handed over as: leave it out")
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    n = whole("num_images_per_prompt", num_images_per_prompt)
    generators = dealt(generator, len(asked) * n)
    chooser = as_retriever(retriever)
    chosen = chooser.choose(database, asked, k, where=where)
    if use == "embeddings":
        _check_same_encoder(pipeline, chooser.encoder, adapter, chosen)
    calls = _dealt_texts(arguments, len(asked))
    weight = next(pipeline.unet.parameters())
    images: list[Any] = []
    for i, (one, texts) in enumerate(zip(chosen, calls, strict=True)):
        embeds = _prompted(pipeline, one, use, merge).unsqueeze(0)
        if _guided(pipeline, arguments):
            embeds = torch.cat([torch.zeros_like(embeds), embeds])
        random = generators[i * n : i * n + n] if isinstance(generator, list | tuple) else generator
        images += call(
            pipeline,
            prompt=one.prompt,
            ip_adapter_image_embeds=[embeds.to(weight.device, weight.dtype)],
            num_images_per_prompt=n,
            generator=random,
            **{**arguments, **texts},
        )
    each = [one for one in chosen for _ in range(n)]
    return Pictures(images, each, described(pipeline, {**arguments, "use": use, "merge": merge}))


def _dealt_texts(arguments: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """Other texts that were given as a list, one for each prompt, for each of n calls."""
    each: list[dict[str, Any]] = [{} for _ in range(n)]
    for name in ("prompt_2", "negative_prompt", "negative_prompt_2"):
        if isinstance(value := arguments.get(name), list | tuple):
            if len(value) != n:
                raise ValueError(f"{n} prompts, but {len(value)} of {name}: give one for each")
            for texts, text in zip(each, value, strict=True):
                texts[name] = text
    return each


def _adapter(pipeline: Any, use: str) -> Any:
    """The projection of the pipeline's only IP-Adapter."""
    from diffusers.models.embeddings import ImageProjection

    name = type(pipeline).__name__
    if "ip_adapter_image_embeds" not in (inputs_of(pipeline) or ()):
        raise ValueError(
            f"{name} takes no IP-Adapter (no ip_adapter_image_embeds=): give a Stable Diffusion or "
            "SDXL pipeline, or hand pictures over, references(...)"
        )
    layers = getattr(
        getattr(getattr(pipeline, "unet", None), "encoder_hid_proj", None),
        "image_projection_layers",
        None,
    )
    if layers is None:
        raise ValueError(
            f"{name} has no IP-Adapter layers: call pipeline.load_ip_adapter(...) first"
        )
    if len(layers) != 1:
        raise ValueError(f"{name} has {len(layers)} IP-Adapters: load one, for one image prompt")
    if not isinstance(layers[0], ImageProjection):
        raise ValueError(
            f"the IP-Adapter of {name} ({type(layers[0]).__name__}) takes hidden states, not "
            "embeddings: load one without 'plus' in its name"
        )
    if use == "pictures" and getattr(pipeline, "image_encoder", None) is None:
        raise ValueError(
            f"{name} has no image_encoder to encode the pictures with: load it "
            "(load_ip_adapter(..., image_encoder_folder=...)), or take use='embeddings'"
        )
    return layers[0]


def _prompted(pipeline: Any, chosen: Chosen, use: str, merge: str) -> Tensor:
    """The image prompts (1, d) or (k, d) of one prompt."""
    if use == "pictures":
        with torch.no_grad():
            device = next(pipeline.image_encoder.parameters()).device
            vectors = pipeline.encode_image(chosen.images, device, 1)[0]
    else:
        vectors = chosen.embeddings
    if merge == "each":
        return vectors
    weights = torch.tensor([one.similarity for one in chosen.references], dtype=torch.float64)
    weights = weights.clamp_min(0)
    if not weights.any():  # none points the prompt's way
        weights = torch.ones_like(weights)
    mean = (weights / weights.sum()) @ vectors.double().cpu()
    return mean.to(vectors).unsqueeze(0)


def _check_same_encoder(pipeline: Any, encoder: Any, adapter: Any, chosen: list[Chosen]) -> None:
    """Refuses embeddings that the adapter's own encoder would not give."""
    way = (
        "build the database with the adapter's image encoder, or hand over the pictures, "
        "use='pictures'"
    )
    width, stored = adapter.image_embeds.in_features, chosen[0].embeddings.shape[-1]
    if width != stored:
        raise ValueError(
            f"the IP-Adapter takes embeddings of width {width}, but the database holds {stored}: "
            f"{way}"
        )
    own = getattr(pipeline, "image_encoder", None)
    if own is None:
        raise ValueError(
            "the pipeline has no image_encoder, so nothing tells whether the database's embeddings "
            "are those of the adapter's: load it (load_ip_adapter(..., image_encoder_folder=...))"
        )
    from retrodiff.pictures import to_image

    pictures = [picture for one in chosen for picture in one.images][:PROBES]
    with torch.no_grad():
        device = next(own.parameters()).device
        theirs = pipeline.encode_image(pictures, device, 1)[0].float().cpu()
        ours = torch.cat([encoder.encode_image(_unit(to_image(one))[None]) for one in pictures])
    cosines = torch.cosine_similarity(theirs, ours.float().cpu(), dim=-1)
    if float(cosines.min()) < SAME:
        raise ValueError(
            "the database's encoder is not the IP-Adapter's: their embeddings of one picture have "
            f"a cosine of {float(cosines.min()):.2f}, expected 1: {way}"
        )


def _unit(image: Tensor) -> Tensor:
    from retrodiff.pictures.thumbnails import to_float

    return to_float(image)


def _guided(pipeline: Any, arguments: dict[str, Any]) -> bool:
    """Whether the pipeline will ask for the null prompt beside each prompt."""
    parameter = inspect.signature(pipeline).parameters.get("guidance_scale")
    scale = arguments.get("guidance_scale", parameter.default if parameter else 1.0)
    return scale > 1 and pipeline.unet.config.time_cond_proj_dim is None
