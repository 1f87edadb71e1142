"""Conditioners that see the neighbors' pictures: tokens, where latents come from, training."""

import dataclasses

import pytest
import torch

from retrodiff.builder import Builder
from retrodiff.databases import ArrayDatabase
from retrodiff.diffusion import (
    DPMpp2M,
    Dropped,
    EDMDenoiser,
    Mixture,
    NeighborPatches,
    PixelUnshuffle,
    PromptAndNeighbors,
)
from retrodiff.encoders import TimmEncoder
from retrodiff.interfaces import Neighbors, Query
from retrodiff.model import Model
from retrodiff.model.neighbor_latents import encoded_pictures, seen
from retrodiff.networks import UNet
from retrodiff.retrieval import ExcludeSelf, NearestNeighbors
from retrodiff.training import TrainingSet, fit

SHAPE = (12, 4, 4)


def pictures(n=12):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def model():
    encoder = TimmEncoder("test_resnet", image_size=32)
    database = ArrayDatabase(
        encoder.encode_image(pictures()), encoder.fingerprint, images=pictures()
    )
    torch.manual_seed(0)
    patches = NeighborPatches(PromptAndNeighbors("unit"), channels=12, size=4, grid=2)
    network = UNet(
        in_channels=12,
        out_channels=12,
        size=4,
        channels=32,
        multipliers=(1,),
        blocks_per_level=1,
        attention_factors=(1,),
        context_width=encoder.dim + patches.extra,
        streams=("query", "neighbors", "patches"),
    )
    with torch.no_grad():  # a fresh network predicts zeros whatever it sees
        for weight in network.parameters():
            weight += 0.05 * torch.randn(weight.shape)
    return (
        Builder()
        .retriever(NearestNeighbors())
        .encoder(encoder)
        .database(database)
        .conditioner(Dropped(patches, 0.2))
        .autoencoder(PixelUnshuffle(2))
        .denoiser(EDMDenoiser(network, sigma_data=0.5))
        .sampler(DPMpp2M())
        .defaults(k=3, steps=2)
        .build()
    )


def neighbors(rows, latents=True):
    indices = torch.tensor(rows)
    generator = torch.Generator().manual_seed(0)
    one = Neighbors(indices, torch.ones(indices.shape), torch.randn(*indices.shape, 6))
    if not latents:
        return one
    values = torch.randn(*indices.shape, *SHAPE, generator=generator)
    return dataclasses.replace(one, latents=values)


def test_a_token_holds_its_cell_and_its_place():
    found = neighbors([[3, 5]])
    conditioner = NeighborPatches(PromptAndNeighbors("unit"), channels=12, size=4, grid=2)
    tokens = conditioner.condition(Query(torch.zeros(1, 6)), found).streams["patches"]
    assert tokens.values.shape == (1, 2 * 4, 6 + 12 * 4 + 4)
    for neighbor in range(2):
        for y in range(2):
            for x in range(2):
                token = tokens.values[0, neighbor * 4 + y * 2 + x]
                cell = found.latents[0, neighbor, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                assert torch.equal(token[6:-4], cell.flatten())
                assert token[-4:].nonzero().flatten().tolist() == [y * 2 + x]
                assert not token[:6].any()


def test_a_prompt_has_no_patches():
    conditioner = NeighborPatches(PromptAndNeighbors("unit"), channels=12, size=4, grid=2)
    found = neighbors([[-1, 5], [-1, -1]])
    tokens = conditioner.condition(Query(torch.zeros(2, 6)), found).streams["patches"]
    assert tokens.mask[0].tolist() == [False] * 4 + [True] * 4
    assert not tokens.values[0, :4].any()
    # Without any picture: zeros that take part, as in the null condition.
    assert tokens.mask[1].all()
    assert not tokens.values[1].any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="size=4 cannot be cut into grid=3"):
        NeighborPatches(PromptAndNeighbors("unit"), channels=12, size=4, grid=3)
    conditioner = NeighborPatches(PromptAndNeighbors("unit"), channels=3, size=4, grid=2)
    query = Query(torch.zeros(1, 6))
    with pytest.raises(ValueError, match=r"\(3, 4, 4\), but the neighbors have none"):
        conditioner.condition(query, neighbors([[1]], latents=False))
    with pytest.raises(ValueError, match=r"those of shape \(12, 4, 4\)"):
        conditioner.condition(query, neighbors([[1]]))


def test_latents_are_those_of_the_rows_and_each_is_encoded_once(model):
    class Counting(PixelUnshuffle):
        encoded = 0

        def encode(self, images):
            type(self).encoded += len(images) * (images.shape[-1] == 8)
            return super().encode(images)

    found = neighbors([[2, 7], [7, -1]], latents=False)
    told = seen(found, model.conditioner, model.database, Counting(2))
    expected = PixelUnshuffle(2).encode(pictures())
    assert torch.equal(told.latents[0], expected[[2, 7]])
    assert torch.equal(told.latents[1, 0], expected[7])
    assert not told.latents[1, 1].any()
    assert Counting.encoded == 2
    assert seen(told, model.conditioner, None, None) is told
    assert seen(found, PromptAndNeighbors("unit"), None, None) is found


def test_a_table_of_latents_keeps_no_graph(model):
    class Trainable(PixelUnshuffle):
        weight = torch.nn.Parameter(torch.ones(()))

        def encode(self, images):
            return super().encode(images) * self.weight

    found = encoded_pictures(torch.arange(12), model.database, Trainable(2), SHAPE)
    assert not found.requires_grad  # or the activations of the whole database stay in memory


def test_larger_pictures_are_resized(model):
    colors = torch.rand(12, 3, 1, 1, generator=torch.Generator().manual_seed(1)) * 2 - 1
    wide = torch.ones(12, 3, 32, 40)  # what is left and right of the middle is cut off
    wide[..., 4:36] = colors
    database = ArrayDatabase(
        model.database.embeddings(torch.arange(12)), model.database.fingerprint, images=wide
    )
    found = encoded_pictures(torch.arange(12), database, PixelUnshuffle(2), SHAPE)
    expected = PixelUnshuffle(2).encode(colors.expand(12, 3, 8, 8))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_database_without_pictures_is_refused(model):
    class Bare:
        pass

    with pytest.raises(ValueError, match="lacks a database with pictures"):
        seen(neighbors([[1]], False), model.conditioner, Bare(), PixelUnshuffle(2))
    with pytest.raises(ValueError, match="lacks a first stage"):
        seen(neighbors([[1]], False), model.conditioner, model.database, None)
    with pytest.raises(ValueError, match=r"\(3, 4, 4\), but the conditioner sees \(12, 4, 4\)"):
        encoded_pictures(torch.tensor([0]), model.database, PixelUnshuffle(1), (12, 4, 4))


def test_swapping_pictures_changes_samples_and_every_mode_works(model):
    images = pictures(2)
    out = model.sample(images=images, seed=0, attribution=True)
    torch.testing.assert_close(out.attribution.grid.sum(1), torch.ones(2, 4, 4))
    other = ArrayDatabase(
        model.database.embeddings(torch.arange(12)),
        model.database.fingerprint,
        images=pictures().flip(-1),
    )
    assert not torch.equal(
        model.replace(database=other).sample(images=images, seed=0).images, out.images
    )
    for mode in ("text", "text+neighbors"):
        query = model.encoder.encode_image(images)
        assert model.sample(query=Query(query), mode=mode, seed=0).images.isfinite().all()
    both = model.sample(
        images=images,
        databases={"other": other},
        guidance=Mixture({"cond": 2.0, "other": -1.0}),
        seed=0,
    )
    assert both.images.isfinite().all()


def test_training_sees_the_same_with_a_table_and_without(model, tmp_path):
    retriever = ExcludeSelf(NearestNeighbors())
    data = TrainingSet.of(pictures(8), model.encoder, model.database, retriever, 3, progress=False)
    table = encoded_pictures(torch.arange(12), model.database, model.autoencoder, SHAPE)
    rows = torch.arange(8)
    with_table = data.seeing(table).batch(rows)
    without = data.batch(rows)
    losses = [
        model.loss(*batch, torch.Generator().manual_seed(0)) for batch in (with_table, without)
    ]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="12 rows"):
        data.seeing(table[:3])
    fitted = fit(model, data.seeing(table), steps=2, batch_size=4, lr=1e-3, progress=False)
    fitted.model.save(tmp_path / "m")
    again = Model.load(tmp_path / "m", encoder=model.encoder, database=model.database)
    assert again.conditioner == model.conditioner
    one, two = (m.sample(images=pictures(2), seed=0).images for m in (fitted.model, again))
    assert torch.equal(one, two)


def test_neighbors_keep_their_latents():
    found = neighbors([[2, 7, 1], [7, 4, 3]])
    assert torch.equal(found.take(torch.tensor([2, 0])).latents, found.latents[:, [2, 0]])
    assert torch.equal(found.rows([1]).latents, found.latents[[1]])
    assert torch.equal(found.to("cpu").latents, found.latents)
