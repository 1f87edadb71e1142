"""Models of diffusers as networks: the same numbers as theirs, and as our own UNet's twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_unet import SMALL, diffusers_twin, normal, randomized, relative
from torch import Tensor, nn

from retrodiff.builder import Builder
from retrodiff.diffusion import (
    ClassifierFree,
    EDMDenoiser,
    EpsDenoiser,
    FlowDenoiser,
    NeighborEmbeddings,
    QueryVector,
    Unconditional,
)
from retrodiff.interfaces import Context, Query, Tokens
from retrodiff.model import Model
from retrodiff.networks import DiffusersNetwork, UNet
from retrodiff.retrieval import NearestNeighbors
from retrodiff.testing import check_denoiser
from retrodiff.training import TrainingSet, fit

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
X, T, CONTEXT = normal(2, 3, 8, 8), torch.tensor([3, 801]), normal(2, 4, 12, seed=2)
VECTOR = normal(2, 6, seed=3)


def small_unet(**more: Any) -> nn.Module:
    return randomized(
        diffusers.UNet2DConditionModel(
            **{
                "sample_size": 8, "in_channels": 3, "out_channels": 3,
                "block_out_channels": [32, 32], "layers_per_block": 1,
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
                "cross_attention_dim": 12, "attention_head_dim": 2,
                **more,
            }
        )
    )  # fmt: skip


def plain_unet() -> nn.Module:
    return randomized(
        diffusers.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=[32, 32],
            layers_per_block=1, down_block_types=["DownBlock2D", "AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        )
    )  # fmt: skip


def small_pixart() -> nn.Module:
    return randomized(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6,
            num_layers=1, cross_attention_dim=16, caption_channels=12, sample_size=8, patch_size=2,
            use_additional_conditions=False,
        )
    )  # fmt: skip


def small_sd3() -> nn.Module:
    return randomized(
        diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=3, out_channels=3, num_layers=2,
            attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
            caption_projection_dim=16, pooled_projection_dim=6, pos_embed_max_size=8,
        )
    )  # fmt: skip


def small_dit() -> nn.Module:
    model = randomized(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6,
            num_layers=1, sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.proj_out_2.weight /= 1000  # its modulation by random weights gives huge numbers
    return model


def unclip_unet() -> nn.Module:
    return small_unet(class_embed_type="projection", projection_class_embeddings_input_dim=6)


LABEL = {"class_labels": torch.tensor([7])}
MODELS = {
    "UNet": (small_unet, {}, {"encoder_hidden_states": CONTEXT}),
    "unconditional UNet": (plain_unet, {}, {}),
    "unCLIP": (unclip_unet, {}, {"encoder_hidden_states": CONTEXT, "class_labels": VECTOR}),
    "PixArt": (small_pixart, {}, {"encoder_hidden_states": CONTEXT}),
    "SD3": (small_sd3, {}, {"encoder_hidden_states": CONTEXT, "pooled_projections": VECTOR}),
    "DiT": (small_dit, {"fixed": LABEL}, {"class_labels": torch.tensor([7, 7])}),
}


def context_of(net: DiffusersNetwork) -> Context:
    streams = {name: Tokens(CONTEXT) for name in net.widths}
    return Context(streams, None if net.vector_width is None else VECTOR)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_numbers_are_the_models_own(name: str) -> None:
    make, arguments, theirs = MODELS[name]
    model = make()
    net = DiffusersNetwork(model, **arguments)
    assert net.shape == (3, 8, 8)
    with torch.no_grad():
        image = "sample" if "UNet" in type(model).__name__ else "hidden_states"
        expected = model(**{image: X}, timestep=T, **theirs).sample[:, :3]
        assert torch.equal(net(X, T, context_of(net)), expected)
        assert torch.equal(net(X, T, net.prepare(context_of(net))), expected)
        half = DiffusersNetwork(model, time_scale=0.5, **arguments)
        assert torch.equal(half(X, 2 * T, context_of(net)), expected)
        assert net(X.double(), T, context_of(net)).dtype == torch.float64


@pytest.mark.parametrize("name", list(MODELS))
def test_denoisers_of_them_keep_the_contract(name: str) -> None:
    make, arguments, _ = MODELS[name]
    net = DiffusersNetwork(make(), **arguments)
    if net.vector_width is None:  # the contract check has no vectors
        check_denoiser(FlowDenoiser(net) if name == "SD3" else EpsDenoiser(net))
    both = Context.cat([context_of(net), context_of(net).zeros()])
    with torch.no_grad():
        parts = [net(X, T, context_of(net)), net(X, T, context_of(net).zeros())]
        if len(both):
            assert relative(net(X, T, both), torch.cat(parts)) < 1e-5


@torch.no_grad()
def test_a_model_of_it_samples_what_our_own_unet_samples(encoder: Any, database: Any) -> None:
    """The UNet with num_heads and diffusers' own, each through a whole sampling run."""
    own = randomized(UNet(**{**SMALL, "context_width": 8, "heads": 4}))
    recipe = (
        Builder().encoder(encoder).database(database).conditioner(NeighborEmbeddings("raw"))
        .guidance(ClassifierFree(2.0)).defaults(k=3, steps=4)
    )  # fmt: skip
    one, other = (
        recipe.denoiser(EpsDenoiser(net)).build().sample(
            prompts=["a", "b"], seed=1, progress=False
        ).latents
        for net in (own, DiffusersNetwork(diffusers_twin(own)))
    )  # fmt: skip
    assert relative(other, one) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("make", [small_unet, small_pixart])
def test_masked_tokens_take_no_part(make: Any) -> None:
    net = DiffusersNetwork(make())
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    masked = net(X, T, Context({"neighbors": Tokens(CONTEXT, mask)}))
    assert relative(masked[:1], net(X[:1], T[:1], CONTEXT[:1, :2])) < 1e-5
    assert relative(masked[1:], net(X[1:], T[1:], torch.zeros(1, 4, 12))) < 1e-5
    sd3 = DiffusersNetwork(small_sd3())
    with pytest.raises(ValueError, match=r"SD3Transformer2DModel takes no mask"):
        sd3(X, T, Context({"neighbors": Tokens(CONTEXT, mask)}, VECTOR))


def test_it_trains_and_its_weights_are_saved(encoder: Any, database: Any, tmp_path: Any) -> None:
    def denoiser() -> EDMDenoiser:
        return EDMDenoiser(DiffusersNetwork(small_unet(cross_attention_dim=8)))

    model = (
        Builder().encoder(encoder).database(database).conditioner(NeighborEmbeddings("raw"))
        .denoiser(denoiser).defaults(k=3, steps=2).build()
    )  # fmt: skip
    images = normal(8, 3, 8, 8).clamp(-1, 1)
    data = TrainingSet.of(images, encoder, database, NearestNeighbors(), 3, progress=False)
    fitted = fit(model, data, steps=2, batch_size=4, lr=1e-2, ema=0.5, seed=0, progress=False).model
    fitted.save(tmp_path / "m")
    with pytest.raises(ValueError, match=r"pass it as load\(\.\.\., denoiser=\.\.\.\)"):
        Model.load(tmp_path / "m", encoder=encoder, database=database)
    again = Model.load(tmp_path / "m", denoiser=denoiser(), encoder=encoder, database=database)
    one, other = (
        m.sample(query=Query(torch.ones(1, 8)), seed=0, progress=False).images
        for m in (fitted, again)
    )
    assert torch.equal(one, other)


def test_a_vector_and_tokens_together_in_a_model(encoder: Any, database: Any) -> None:
    net = DiffusersNetwork(
        small_unet(
            cross_attention_dim=8, class_embed_type="projection",
            projection_class_embeddings_input_dim=8,
        )
    )  # fmt: skip
    recipe = Builder().encoder(encoder).database(database).denoiser(EpsDenoiser(net))
    model = recipe.conditioner(QueryVector(NeighborEmbeddings("raw"), "unit")).build()
    assert model.sample(prompts=["a"], steps=2, progress=False).images.isfinite().all()
    with pytest.raises(ValueError, match=r"no vector through .*takes a vector of width 8"):
        recipe.conditioner(NeighborEmbeddings("raw")).build()
    plain = Builder().conditioner(Unconditional()).denoiser(EpsDenoiser(
        DiffusersNetwork(plain_unet())))  # fmt: skip
    assert plain.build().sample(n=2, steps=2, progress=False).images.shape == (2, 3, 8, 8)


def lumina() -> nn.Module:
    class Rotary(nn.Module):
        config = type("Config", (), {"in_channels": 3, "sample_size": 8})()

        def forward(self, hidden_states: Tensor, timestep: Tensor, image_rotary_emb: Tensor): ...

    return Rotary()


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, r"Linear is no 2-D diffusion model.*takes input"),
        (lumina, {}, r"Rotary also needs image_rotary_emb.*fixed=\{'image_rotary_emb': \.\.\.\}"),
        (small_dit, {}, r"DiTTransformer2DModel also needs class_labels"),
        (lambda: small_unet(num_class_embeds=5), {}, r"also needs class_labels"),
        (lambda: small_unet(in_channels=9), {}, r"takes 9 channels and predicts 3: it edits"),
        (lambda: small_unet(sample_size=None), {}, r"no sample_size: hand in size="),
        (small_unet, {"fixed": {"guidance": 1}}, r"fixed has guidance, which UNet2DConditionM"),
        (small_unet, {"time_scale": 0}, r"time_scale=0"),
        (
            lambda: small_unet(
                addition_embed_type="text_time", addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=54,
            ),
            {},
            r"also needs added_cond_kwargs",
        ),
    ],
)  # fmt: skip
def test_models_that_need_more_are_refused_in_one_line(
    make: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        DiffusersNetwork(make(), **arguments)
    assert "\n" not in str(error.value)


def test_contexts_that_do_not_fit_are_refused() -> None:
    net = DiffusersNetwork(small_unet(), size=16)
    assert net.shape == (3, 16, 16)
    for context, message in (
        (normal(2, 4, 7), r"'neighbors': 7"),
        (normal(2, 4, 3, 12), r"neighbors for each region"),
        (Context.of(CONTEXT, "query"), r"'query': 12"),
        (Context({"neighbors": Tokens(CONTEXT)}, VECTOR), r"vector has width 6, .* takes None"),
        (normal(3, 4, 12), r"x has 2 rows, the context 3"),
    ):
        with pytest.raises(ValueError, match=message):
            net(X, T, context)


@torch.no_grad()
def test_fixed_arguments_reach_models_with_more_conditions() -> None:
    """The XL UNets take sizes and a pooled prompt beside the tokens."""
    model = small_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=54,
    )  # fmt: skip
    added = {"text_embeds": normal(1, 6), "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]])}
    net = DiffusersNetwork(model, fixed={"added_cond_kwargs": added})
    wide = {name: value.expand(2, -1) for name, value in added.items()}
    expected = model(X, T, CONTEXT, added_cond_kwargs=wide).sample
    assert torch.equal(net(X, T, CONTEXT), expected)
