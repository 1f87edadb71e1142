"""Every public path under ``torch.autocast`` in bfloat16, against the same call without it.

What must be exact (search, retrieval, codes, preprocessing, closed forms) gives the same numbers:
it leaves autocast. What networks compute stays near, and leaves them in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parts import HashingEncoder, small_network
from retrievers import MERGING, PHRASING, RETRIEVERS
from torch import Tensor, nn

from retrodiff.databases import ArrayDatabase
from retrodiff.diffusion import (
    ClassifierFree,
    EDMDenoiser,
    EpsDenoiser,
    FlowDenoiser,
    Identity,
    NeighborEmbeddings,
    PixelUnshuffle,
    QueryAndNeighbors,
    QueryOnly,
    VDenoiser,
    X0Denoiser,
)
from retrodiff.diffusion.sampler import SAMPLERS
from retrodiff.encoders import CLIPEncoder, TimmEncoder
from retrodiff.encoders.preprocessing import openai, plain, rdm
from retrodiff.indexes import Annoy, Exact, Faiss, USearch, recall_of
from retrodiff.interfaces import Context, Fingerprint, Neighbors, Query
from retrodiff.model import Model
from retrodiff.networks import DiT, KLAutoencoder, UNet, VQAutoencoder
from retrodiff.networks.principal import PrincipalPatches
from retrodiff.retrieval import (
    NearestNeighbors,
    NeighborCounts,
    TopM,
    Uniform,
    neighbor_table,
)
from retrodiff.testing import small_database

NEAR = 0.05
"""Relative error of a network in bfloat16, which has 8 bits of mantissa; seen: up to 0.02."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What a call gives under autocast, and without."""
    with torch.no_grad():
        plain_result = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert (normal(2, 2) @ normal(2, 2)).dtype == torch.bfloat16
            return call(), plain_result


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def near(call: Callable[[], Tensor], bound: float = NEAR) -> None:
    found, expected = both(call)
    assert found.dtype == expected.dtype
    assert 0 < relative(found, expected) < bound


def exact(call: Callable[[], Any]) -> None:
    found, expected = both(call)
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Neighbors):
        return [value.indices, value.similarity, value.embeddings]
    if isinstance(value, Query):
        return [value.embedding]
    if isinstance(value, Context):
        return [stream.values for stream in value.streams.values()]
    return [tensor for item in value for tensor in tensors(item)]


def randomized(network: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in network.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / max(1, p[0].numel()) ** 0.5)
            elif "norm" not in name:
                p.copy_(0.1 * noise)
    return network.eval()


IMAGES = normal(2, 3, 16, 16, seed=4).clamp(-1, 1)
CONTEXT = normal(2, 3, 8, seed=2)


# --- networks ----------------------------------------------------------------------------------


def unet(channels: int = 3) -> UNet:
    return randomized(
        UNet(
            in_channels=channels,
            out_channels=channels,
            size=8,
            channels=32,
            multipliers=(1, 2),
            blocks_per_level=1,
            attention_factors=(1, 2),
            context_width=8,
            heads=4,
        )
    )


def dit(channels: int = 3) -> DiT:
    shape = (channels, 8, 8)
    return randomized(
        DiT(shape=shape, patch=4, width=16, depth=1, heads=2, widths={"neighbors": 8})
    )


@pytest.mark.parametrize("make", [unet, dit])
@pytest.mark.parametrize("k", [1, 3])
def test_networks(make: Callable[[], Any], k: int) -> None:
    network, x, t = make(), normal(2, 3, 8, 8, seed=1), torch.tensor([3.0, 801.0])
    near(lambda: network(x, t, CONTEXT[:, :k]))
    near(lambda: network(x, t, network.prepare(Context.of(CONTEXT[:, :k]))))


def vq() -> VQAutoencoder:
    return randomized(
        VQAutoencoder(
            channels=32, multipliers=(1, 2), blocks_per_level=1, latent_channels=3, codes=2000
        )
    )


def kl() -> KLAutoencoder:
    return randomized(
        KLAutoencoder(
            channels=32, multipliers=(1, 2), blocks_per_level=1, latent_channels=4, scale_factor=0.3
        )
    )


def test_kl_first_stage_is_near_and_in_float32() -> None:
    first_stage = kl()
    latents = first_stage.encode(IMAGES)
    near(lambda: first_stage.encode(IMAGES))
    near(lambda: first_stage.decode(latents))
    near(lambda: first_stage.moments(IMAGES)[1])
    assert both(lambda: first_stage.encode(IMAGES))[0].dtype == torch.float32
    assert both(lambda: first_stage.decode(latents.bfloat16()))[0].dtype == torch.float32


def test_the_nearest_codes_are_exact() -> None:
    """In bfloat16 many of them would be others: a third in the published codebook."""
    first_stage = vq()
    latents = (
        first_stage.codebook.weight.mean(0).view(1, 3, 1, 1) + normal(4, 3, 16, 16, seed=7) / 2
    )
    exact(lambda: first_stage.nearest(latents))
    rounded = first_stage.codebook.weight.bfloat16(), latents.bfloat16()
    rows = rounded[1].permute(0, 2, 3, 1).reshape(-1, 3)
    distances = rounded[0].square().sum(1) - 2 * rows @ rounded[0].T
    wrong = distances.argmin(1) != first_stage.nearest(latents).flatten()
    assert wrong.float().mean() > 0.1  # so that this test can fail
    near(lambda: first_stage.decode(latents))
    near(lambda: first_stage.encode(IMAGES))


@pytest.mark.parametrize("name", ["principal", "unshuffle", "identity"])
def test_closed_first_stages_are_exact(name: str) -> None:
    stages: dict[str, Any] = {
        "principal": PrincipalPatches.fit(normal(40, 3, 16, 16, seed=5), 4, 8),
        "unshuffle": PixelUnshuffle(4),
        "identity": Identity(),
    }
    stage = stages[name]
    exact(lambda: stage.encode(IMAGES))
    latents = stage.encode(IMAGES)
    exact(lambda: stage.decode(latents))


def test_fitting_components_is_exact() -> None:
    images = normal(40, 3, 16, 16, seed=5)
    exact(lambda: list(PrincipalPatches.fit(images, 4, 8).state_dict().values()))


# --- denoisers ---------------------------------------------------------------------------------

DENOISERS = [EpsDenoiser, VDenoiser, X0Denoiser, EDMDenoiser, FlowDenoiser]


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("make", [unet, dit])
def test_denoisers_and_their_losses(kind: Any, make: Callable[[], Any]) -> None:
    denoiser = kind(make())
    x0, noise = normal(2, 3, 8, 8, seed=1), normal(2, 3, 8, 8, seed=2)
    sigma, context = torch.tensor([0.05, 3.0]), Context.of(CONTEXT)
    near(lambda: denoiser.denoise(x0 + noise, sigma, denoiser.prepare(context)))
    near(lambda: denoiser.loss(x0, sigma, noise, context))


def model(denoiser: Any = None, autoencoder: Any = None) -> Model:
    from retrodiff.builder import Builder

    recipe = (
        Builder()
        .encoder(HashingEncoder())
        .database(small_database(rows=40, dim=8, seed=0))
        .conditioner(NeighborEmbeddings("raw"))
        .denoiser(denoiser or EDMDenoiser(unet()))
        .guidance(ClassifierFree(2.0))
        .sampler("ddim")
        .defaults(k=4, steps=4)
        .autoencoder(autoencoder or Identity())
    )
    return recipe.build()


@pytest.mark.parametrize("stage", [kl, vq])
def test_a_training_target_at_the_smallest_noise(stage: Callable[[], Any]) -> None:
    """A network that gives zero leaves the squared target; from a bfloat16 latent it is far off."""
    first_stage = stage()
    with torch.no_grad():
        channels = first_stage.encode(IMAGES).shape[1]
    shape = (channels, 8, 8)
    silent = DiT(shape=shape, patch=4, width=16, depth=1, heads=2, widths={"neighbors": 8})
    trained = model(EDMDenoiser(silent), autoencoder=first_stage)
    query = Query(CONTEXT[:, 0])
    sigma, noise = torch.full((2,), 0.002), normal(2, *shape, seed=3)

    def loss() -> Tensor:
        return trained.loss(
            IMAGES, query, Neighbors.of_query(query), sigma=sigma, noise=noise, drop=False
        )

    found, expected = both(loss)
    assert found.dtype == torch.float32
    assert relative(found, expected) < 0.02


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling(name: str) -> None:
    sampled = model()
    query = Query(normal(2, 8, seed=3))

    def images() -> Tensor:
        return sampled.sample(
            query=query, mode="neighbors", sampler=name, seed=0, progress=False
        ).images

    near(images, 0.1)
    exact(
        lambda: (
            sampled.sample(
                query=query, mode="neighbors", sampler=name, steps=1, seed=0, progress=False
            ).neighbors
        )
    )


@pytest.mark.parametrize("mode", ["text", "text+neighbors", "image", "class", "unconditional"])
def test_every_mode_asks_the_same(mode: Any) -> None:
    sampled = model().replace(proposal=Uniform())
    asked: dict[str, Any] = {
        "text": {"prompts": ["a", "b"]},
        "text+neighbors": {"prompts": ["a", "b"]},
        "image": {"images": IMAGES},
        "class": {"classes": ["a", "b"]},
        "unconditional": {"n": 2},
    }[mode]
    found, expected = both(
        lambda: sampled.sample(**asked, mode=mode, steps=1, seed=0, progress=False)
    )
    assert torch.equal(found.neighbors.indices, expected.neighbors.indices)
    assert found.images.dtype == torch.float32


@pytest.mark.parametrize(
    "conditioner", [NeighborEmbeddings("unit"), QueryOnly("raw"), QueryAndNeighbors("raw")]
)
def test_conditioners_are_exact(conditioner: Any) -> None:
    query = Query(normal(2, 8, seed=3))
    neighbors = NearestNeighbors().retrieve(query, small_database(), 3)
    exact(lambda: conditioner.condition(query, neighbors))
    context = conditioner.condition(query, neighbors)
    exact(lambda: conditioner.null(context))


# --- search ------------------------------------------------------------------------------------


def fingerprint(dim: int) -> Fingerprint:
    return Fingerprint(encoder="random", weights="0", preprocessing="none", dim=dim)


@pytest.mark.parametrize(("queries", "rows"), [(3, 500), (300, 2000), (256, 65_536)])
@pytest.mark.parametrize("storage", [None, "float16"])
def test_exact_search(queries: int, rows: int, storage: str | None) -> None:
    """The largest is where bounds from principal axes come in."""
    axes = normal(4, 32, seed=3)
    vectors = normal(rows, 4, seed=1) @ axes + 0.05 * normal(rows, 32, seed=4)
    index = Exact(storage=storage).build(ArrayDatabase(vectors, fingerprint(32)).vectors)
    asked = normal(queries, 4, seed=2) @ axes
    exact(lambda: index.search(asked, 3))


@pytest.mark.parametrize("recipe", [Annoy(trees=5, components=4), Faiss(), USearch()], ids=repr)
def test_approximate_indexes(recipe: Any) -> None:
    pytest.importorskip({"faiss": "faiss", "annoy": "annoy"}.get(recipe.name, "usearch"))
    database = ArrayDatabase(normal(500, 8, seed=1), fingerprint(8))
    asked = normal(20, 8, seed=2)
    index = recipe.build(database.vectors)
    exact(lambda: index.search(asked, 3))
    found, expected = both(lambda: recall_of(index, database.vectors, 3))
    assert found == expected


DATABASE = small_database(rows=60, dim=8, seed=3)
QUERY = Query(normal(4, 8, seed=5), ids=torch.arange(4))
SEVERAL = Query(normal(4, 3, 8, seed=6))


def seeded(query: Query) -> Query:
    return Query(query.embedding, query.source, query.ids, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "retriever", [*RETRIEVERS, *MERGING], ids=lambda r: repr(r).replace("NearestNeighbors()", "")
)
def test_retrievers(retriever: Any) -> None:
    query = SEVERAL if retriever in MERGING else QUERY
    exact(lambda: retriever.retrieve(seeded(query), DATABASE, 4))


def test_proposals_and_tables() -> None:
    exact(lambda: neighbor_table(QUERY, DATABASE, 4, NearestNeighbors()))
    exact(lambda: NeighborCounts.fit(QUERY, DATABASE, 4).support(DATABASE))
    fitted = NeighborCounts.fit(QUERY, DATABASE, 4)
    for proposal in (Uniform(), fitted, TopM(fitted, rows=3)):
        exact(lambda p=proposal: p.propose(DATABASE, 5, torch.Generator().manual_seed(0)))


def test_several_phrasings_of_a_prompt() -> None:
    query = Query(normal(2, 8, seed=5), ("cat", "dog"))
    for retriever in PHRASING:
        exact(lambda r=retriever: r.retrieve(seeded(query), DATABASE, 4))


# --- encoders ----------------------------------------------------------------------------------

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("preprocessing", [rdm(16), openai(16), plain(16)], ids=lambda p: p.name)
def test_preprocessing_is_exact(preprocessing: Any) -> None:
    exact(lambda: preprocessing.apply(normal(2, 3, 20, 28, seed=1).clamp(-1, 1)))


@pytest.mark.parametrize("kind", ["clip", "timm"])
def test_encoders_give_the_embeddings_that_databases_hold(kind: str) -> None:
    """Rows that a database stores and queries that are asked of it are of one precision."""
    torch.manual_seed(0)
    encoder = (
        CLIPEncoder.from_config(TINY) if kind == "clip" else TimmEncoder("resnet10t", image_size=32)
    )
    images = normal(2, 3, 32, 32, seed=1).clamp(-1, 1)
    exact(lambda: encoder.encode_image(images))
    if isinstance(encoder, CLIPEncoder):
        exact(lambda: encoder.encode_text(["a cat", "a dog"]))


def test_a_small_network_of_the_tests_is_one_too() -> None:
    network = small_network()
    near(lambda: network(normal(2, 1, 8, 8), torch.tensor([1.0, 2.0]), normal(2, 3, 8)))
