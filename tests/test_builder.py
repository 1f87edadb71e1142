"""The builder: immutable, lazy, and honest about everything that is missing or disagrees."""

import dataclasses

import numpy as np
import pytest
import torch
from parts import HashingEncoder, small_network

import retrodiff
from retrodiff import presets
from retrodiff.builder import Builder, preset
from retrodiff.components import modules
from retrodiff.diffusion import (
    DDIM,
    ClassifierFree,
    Dropped,
    EDMDenoiser,
    Euler,
    NeighborEmbeddings,
    Projected,
    QueryOnly,
)
from retrodiff.retrieval import NearestNeighbors, NeighborCounts, Uniform
from retrodiff.testing import small_database


def test_every_step_returns_a_new_builder(recipe):
    other = recipe.sampler(Euler())
    assert other is not recipe
    assert recipe.slots["sampler"] != Euler()
    assert other.slots["sampler"] == Euler()
    with pytest.raises(TypeError):
        recipe.slots["sampler"] = Euler()


def test_all_empty_slots_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)denoiser is empty.*conditioner is empty"):
        Builder().build()


def test_all_disagreements_are_named_at_once(database):
    wrong = (
        Builder()
        .encoder(HashingEncoder(dim=16))
        .database(database)
        .conditioner(NeighborEmbeddings("raw"))
        .denoiser(EDMDenoiser(small_network(dim=8)))
        .proposal(
            NeighborCounts(torch.tensor([0]), torch.tensor([1]), small_database(9).fingerprint)
        )
    )
    with pytest.raises(ValueError, match=r"components do not fit") as error:
        wrong.build()
    message = str(error.value)
    assert "encoder.dim=16 gives the streams {'neighbors': 16}" in message
    assert "the denoiser takes {'neighbors': 8}" in message
    assert "encoder.dim=16 does not match database.dim=8" in message
    assert "proposal was fitted on another database" in message


def test_an_encoder_with_other_weights_is_refused(recipe):
    with pytest.raises(
        ValueError, match=r"weights='1' against weights='0'.*build the database again"
    ):
        recipe.encoder(HashingEncoder(seed=1)).build()


def test_what_is_no_component_is_named_with_what_it_lacks(recipe):
    with pytest.raises(ValueError, match=r"retriever=str is no Retriever: it has no retrieve"):
        recipe.set(retriever="nearest").build()


def test_a_foreign_object_with_the_right_method_fits(recipe):
    class Foreign:
        def retrieve(self, query, database, k):
            return NearestNeighbors().retrieve(query, database, k)

    model = recipe.retriever(Foreign()).build()
    assert model.sample(prompts=["a"], progress=False).images.shape == (1, 1, 8, 8)


def test_recipes_run_only_in_build(recipe, database):
    ran = []

    def expensive():
        ran.append(1)
        return database

    lazy = recipe.database(expensive)
    assert not ran
    assert lazy.build().database is database
    assert ran == [1]


def test_no_database_is_needed_where_nothing_is_retrieved(encoder):
    model = (
        Builder()
        .encoder(encoder)
        .conditioner(QueryOnly("unit"))
        .denoiser(EDMDenoiser(small_network(stream="query")))
        .defaults(steps=2)
        .build()
    )
    assert model.sample(prompts=["a cat"], progress=False).neighbors.indices.tolist() == [[-1]]


def test_defaults_fill_what_a_plain_model_can_do_without(encoder):
    model = (
        Builder()
        .encoder(encoder)
        .conditioner(NeighborEmbeddings("raw"))
        .denoiser(EDMDenoiser(small_network()))
        .build()
    )
    assert model.sampler == DDIM()
    assert model.retriever == NearestNeighbors()


def test_unknown_slot_and_sampler():
    with pytest.raises(ValueError, match=r"no slot smapler: the slots are .*sampler"):
        Builder().set(smapler=DDIM())
    with pytest.raises(ValueError, match=r"unknown sampler 'dimm'"):
        Builder().sampler("dimm")


def test_presets_as_functions_and_models(encoder, database):
    recipe = Builder.from_preset(presets.rdm_small, encoder=encoder, size=16, channels=32)
    assert recipe.database(database).guidance(
        ClassifierFree(3.0)
    ).build().guidance == ClassifierFree(3.0)
    with pytest.raises(ValueError, match=r"a preset is a function, not 'rdm_small'"):
        Builder.from_preset("rdm_small")

    def mine(width):
        return Builder().encoder(HashingEncoder(width))

    assert Builder.from_preset(mine, width=8).slots["encoder"].dim == 8
    built = presets.rdm_small(encoder=encoder, database=database, size=16, channels=32)
    assert Builder.from_preset(lambda: built).build() == built
    with pytest.raises(ValueError, match=r"returned int"):
        Builder.from_preset(lambda: 3)


def test_the_preset_decorator_keeps_the_open_recipe(recipe):
    @preset
    def mine(k: int = 2) -> Builder:
        """Documented."""
        return recipe.defaults(k=k)

    assert mine(k=3).k == 3
    assert isinstance(Builder.from_preset(mine), Builder)
    assert mine.__doc__ == "Documented."


def test_a_model_is_frozen_and_replace_leaves_it_alone(model):
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.k = 3
    other = model.replace(k=2, sampler=Euler())
    assert (model.k, other.k) == (4, 2)
    with pytest.raises(ValueError, match=r"a model has no samplr"):
        model.replace(samplr=Euler())


def test_swapping_the_database_leaves_a_fitted_proposal_behind(model, database):
    fitted = NeighborCounts(torch.tensor([1, 2]), torch.tensor([1, 1]), database.fingerprint)
    model = model.replace(proposal=fitted)
    smaller = database.subset(torch.arange(10))
    swapped = model.replace(database=smaller)
    assert swapped.proposal is None
    assert model.proposal is fitted
    with pytest.raises(ValueError, match=r"Uniform\(\).*NeighborCounts.fit"):
        swapped.sample(n=1, progress=False)
    assert model.replace(proposal=Uniform()).replace(database=smaller).proposal == Uniform()


def test_top_level_names():
    for name in retrodiff.__all__:
        assert getattr(retrodiff, name) is not None
    with pytest.raises(AttributeError, match=r"Bilder"):
        _ = retrodiff.Bilder


def weights(model):
    return {id(p) for part in (model.denoiser, model.conditioner) for p in _parameters(part)}


def _parameters(part):
    return [p for module in modules(part) for p in module.parameters()]


def train(model):
    """Changes every weight of a model in place, as a careless loop would."""
    with torch.no_grad():
        for part in (model.denoiser, model.conditioner):
            for parameter in _parameters(part):
                parameter.add_(1.0)


def test_models_of_one_recipe_share_no_weights(recipe):
    conditioner = Dropped(Projected(NeighborEmbeddings("raw"), dim=8, width=8), 0.1)
    recipe = recipe.conditioner(conditioner)
    first, second, third = (recipe.build() for _ in range(3))
    assert first.denoiser is recipe.slots["denoiser"]
    assert not weights(first) & weights(second)
    assert not weights(second) & weights(third)
    before = second.sample(prompts=["a"]).images
    train(first)
    assert torch.equal(second.sample(prompts=["a"]).images, before)
    # Encoder, database and first stage are not trained, and stay shared.
    assert first.encoder is second.encoder
    assert first.database is second.database


def test_a_recipe_that_makes_networks_makes_new_ones(recipe):
    made = []

    def denoiser():
        torch.manual_seed(len(made))
        made.append(EDMDenoiser(small_network()))
        return made[-1]

    lazy = recipe.denoiser(denoiser)
    models = [lazy.build() for _ in range(2)]
    assert [model.denoiser for model in models] == made


def test_presets_make_new_networks_each_time(encoder, database):
    recipe = Builder.from_preset(presets.rdm_small, encoder=encoder, size=16, channels=32)
    models = [recipe.database(database).build() for _ in range(2)]
    assert not weights(models[0]) & weights(models[1])


def test_sharing_is_possible_knowingly(model):
    assert Builder.from_model(model).build() == model
    assert model.replace(k=2).denoiser is model.denoiser


def test_wrong_numbers_of_a_model_are_named(recipe):
    for wrong, message in (
        ({"k": -1}, "k=-1: give a whole number, at least 0"),
        ({"k": 2.5}, "k=2.5"),
        ({"steps": 0}, "steps=0"),
        ({"class_top": 0}, "class_top=0"),
        ({"prompt_template": "A photo."}, r"prompt_template='A photo.' has no \{\}"),
        ({"prompt_template": "{} and {}"}, r"prompt_template="),
        ({"prompt_template": None}, r"prompt_template=None"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.defaults(**wrong).build()
    assert recipe.defaults(k=np.int64(3)).build().sample(prompts=["a"]).neighbors.k == 3


@pytest.mark.parametrize("slot", ["sampler", "guidance", "retriever", "denoiser", "proposal"])
def test_a_class_in_place_of_an_object_is_named(recipe, slot):
    kind = {
        "sampler": DDIM,
        "guidance": ClassifierFree,
        "retriever": NearestNeighbors,
        "denoiser": EDMDenoiser,
        "proposal": Uniform,
    }[slot]
    with pytest.raises(ValueError, match=rf"{slot}={kind.__name__} is a class.*{kind.__name__}\("):
        recipe.set(**{slot: kind}).build()
