"""Wrappers of conditioners that pool and rescale, and folded latents."""

import math
from dataclasses import replace

import pytest
import torch

from retrodiff.diffusion import (
    Dropped,
    Folded,
    Identity,
    NeighborEmbeddings,
    NeighborPatches,
    PixelUnshuffle,
    Pooled,
    PromptAndNeighbors,
    Rescaled,
)
from retrodiff.interfaces import Neighbors, Query
from retrodiff.testing import check_autoencoder, check_conditioner


def found(rows):
    """Neighbors (b, k) of given row numbers, with embeddings of unit norm; -1 is the query."""
    indices = torch.tensor(rows)
    embeddings = torch.randn(*indices.shape, 6, generator=torch.Generator().manual_seed(0))
    embeddings = embeddings / embeddings.norm(dim=-1, keepdim=True)
    return Neighbors(indices, torch.ones(indices.shape), embeddings)


@pytest.mark.parametrize(
    "conditioner",
    [
        Pooled(NeighborEmbeddings("unit")),
        Pooled(PromptAndNeighbors("unit")),
        Pooled(PromptAndNeighbors("unit"), first="neighbors"),
        Rescaled(Pooled(PromptAndNeighbors("unit")), 3.0),
        Dropped(Rescaled(NeighborEmbeddings("unit"), 0.5), 0.1),
        NeighborPatches(NeighborEmbeddings("unit"), channels=3, size=4, grid=2),
        Dropped(NeighborPatches(Pooled(PromptAndNeighbors("unit")), 3, 4, 2), 0.1),
    ],
    ids=lambda c: type(c).__name__,
)
def test_they_keep_the_contract(conditioner):
    check_conditioner(conditioner)


def test_pooled_is_the_mean_of_the_tokens_that_are_there():
    neighbors = found([[-1, 3, 4], [1, 2, 3], [-1, -1, -1]])
    context = Pooled(PromptAndNeighbors("unit")).condition(Query(torch.zeros(3, 6)), neighbors)
    e = neighbors.embeddings
    assert context.vector.shape == (3, 12)
    torch.testing.assert_close(context.vector[0], torch.cat([e[0, 0], e[0, 1:].mean(0)]))
    torch.testing.assert_close(context.vector[1], torch.cat([torch.zeros(6), e[1].mean(0)]))
    assert not context.vector[2, 6:].any()
    null = Pooled(PromptAndNeighbors("unit")).null(context)
    assert null.vector.shape == (3, 12)
    assert not null.vector.any()


def test_the_first_token_that_is_there_stands_behind_the_means():
    neighbors = found([[-1, 3, 4], [1, 2, 3], [-1, -1, -1]])
    conditioner = Pooled(PromptAndNeighbors("unit"), first="neighbors")
    query = Query(torch.zeros(3, 6))
    context = conditioner.condition(query, neighbors)
    e, means = neighbors.embeddings, Pooled(PromptAndNeighbors("unit"))
    assert context.vector.shape == (3, conditioner.vector_width(6)) == (3, 18)
    assert torch.equal(context.vector[:, :12], means.condition(query, neighbors).vector)
    torch.testing.assert_close(context.vector[0, 12:], e[0, 1])
    torch.testing.assert_close(context.vector[1, 12:], e[1, 0])
    assert not context.vector[2, 12:].any()
    assert not conditioner.null(context).vector.any()
    regions = Pooled(NeighborEmbeddings("unit"), first="neighbors")
    several = replace(
        found([[1, 2], [3, 4]]), indices=torch.tensor([[[1, 2]], [[3, 4]]]),
        similarity=torch.ones(2, 1, 2), embeddings=neighbors.embeddings[:2, None, :2],
    )  # fmt: skip
    vector = regions.condition(Query(torch.zeros(2, 1, 6)), several).vector
    torch.testing.assert_close(vector[:, 6:], e[:2, 0])


def test_an_unknown_first_stream_is_one_line():
    with pytest.raises(ValueError, match=r"first='patches', but PromptAndNeighbors has the str"):
        Pooled(PromptAndNeighbors("unit"), first="patches").vector_width(6)


def test_rescaled_gives_unit_variance_to_unit_norms():
    neighbors = found([[1, 2, 3, 4]] * 50)
    query = Query(torch.zeros(50, 6))
    plain = Pooled(NeighborEmbeddings("unit")).condition(query, neighbors)
    large = Rescaled(Pooled(NeighborEmbeddings("unit")), math.sqrt(6)).condition(query, neighbors)
    values = large.streams["neighbors"].values
    torch.testing.assert_close(values, plain.streams["neighbors"].values * math.sqrt(6))
    torch.testing.assert_close(large.vector, plain.vector * math.sqrt(6))
    assert abs(float(values.square().mean()) - 1) < 1e-5
    with pytest.raises(ValueError, match="factor"):
        Rescaled(NeighborEmbeddings("unit"), 0.0)


def test_hidden_samples_lose_the_vector_too():
    neighbors = found([[-1, 3, 4]] * 200)
    conditioner = Dropped(Pooled(PromptAndNeighbors("unit")), 0.5)
    context = conditioner.condition(Query(torch.zeros(200, 6)), neighbors)
    hidden = conditioner.drop(context, torch.Generator().manual_seed(0))
    gone = ~hidden.vector.any(1)
    assert 60 < int(gone.sum()) < 140
    assert torch.equal(gone, ~hidden.streams["query"].values.flatten(1).any(1))


def test_folded_latents_come_back():
    images = torch.randn(2, 3, 16, 16)
    folded = Folded(PixelUnshuffle(2), 4)
    latents = folded.encode(images)
    assert latents.shape == (2, 3 * 4 * 16, 2, 2)
    assert torch.equal(folded.decode(latents), images)
    once = Folded(Identity(), 2).encode(images)
    assert torch.equal(once, PixelUnshuffle(2).encode(images))
    check_autoencoder(folded, (3, 16, 16))
