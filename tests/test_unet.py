"""The UNet against diffusers' independent implementation, and its own promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrodiff.checkpoints.foreign.published import PUBLISHED
from retrodiff.checkpoints.foreign.tensor_names import diffusers_unet
from retrodiff.checkpoints.foreign.transfer import their_names
from retrodiff.interfaces import Context, Tokens
from retrodiff.networks.blocks import Upsample, timestep_embedding
from retrodiff.networks.unet import UNet

SMALL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "size": 8,
    "channels": 32,
    "multipliers": (1, 2),
    "blocks_per_level": 1,
    "attention_factors": (2,),
    "context_width": 12,
    "channels_per_head": 16,
}


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """No zero-initialized output, no unit gains: every weight must matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan = max(1, math.prod(parameter.shape[1:]))
            gain = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if gain else noise / fan**0.5)
    return module.eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def _no_grad(request: pytest.FixtureRequest):
    with torch.set_grad_enabled("needs_grad" in request.fixturenames):
        yield


@pytest.fixture
def needs_grad() -> None: ...


@pytest.fixture
def unet() -> UNet:
    return randomized(UNet(**SMALL))  # type: ignore[return-value]


X, T, CONTEXT = normal(2, 3, 8, 8), torch.tensor([3, 801]), normal(2, 4, 12, seed=2)


@pytest.mark.parametrize(
    ("name", "unet_parameters", "first_stage_parameters"),
    [
        ("rdm_imagenet", 400_920_579, 55_322_782),
        ("rdm_ffhq", 414_713_603, 55_322_782),
        ("rdm_768", 1_335_480_400, 69_610_963),
    ],
)
def test_published_parameter_counts(
    name: str, unet_parameters: int, first_stage_parameters: int
) -> None:
    with torch.device("meta"):
        unet, first_stage = PUBLISHED[name].build()
    assert sum(p.numel() for p in unet.parameters()) == unet_parameters
    assert sum(p.numel() for p in first_stage.parameters()) == first_stage_parameters


def diffusers_twin(unet: UNet) -> nn.Module:
    """diffusers' network with the same weights."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers, the oracle, is not installed")
    config = unet.config()
    widths = [m * config["channels"] for m in config["multipliers"]]
    attends = [2**level in config["attention_factors"] for level in range(len(widths))]
    twin = diffusers.UNet2DConditionModel(
        sample_size=config["size"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        block_out_channels=widths,
        layers_per_block=config["blocks_per_level"],
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        cross_attention_dim=config["context_width"],
        transformer_layers_per_block=config["depth"],
        attention_head_dim=[config["heads"] or w // config["channels_per_head"] for w in widths],
    ).eval()
    names = their_names(unet, diffusers_unet(config))
    state = unet.state_dict()
    shapes = {name: p.shape for name, p in twin.state_dict().items()}
    assert set(names.values()) == set(shapes)
    twin.load_state_dict({names[k]: v.reshape(shapes[names[k]]) for k, v in state.items()})
    return twin


@pytest.mark.parametrize(
    "numbers",
    [
        {"heads": 8},
        {"heads": 1},
        {"channels_per_head": 8},
        {"heads": 8, "attention_factors": (1, 2, 4), "multipliers": (1, 2, 4), "depth": 2},
    ],
    ids=["eight", "one", "eight wide", "eight, deep"],
)
def test_heads_agree_with_the_reference_arithmetic(numbers: dict[str, Any]) -> None:
    """The text-to-image models have 8 heads of channels / 8, the class-conditional ones have 1."""
    numbers = {**SMALL, "multipliers": (1, 2), "attention_factors": (1, 2), **numbers}
    unet = randomized(UNet(**numbers))
    expected = diffusers_twin(unet).double()(X.double(), T, CONTEXT.double()).sample
    assert relative(unet(X, T, CONTEXT).double(), expected) < 5e-6  # rounding; their own is alike
    assert relative(unet.double()(X.double(), T, CONTEXT.double()), expected) < 1e-12
    other = UNet(**{**numbers, "heads": 4}).double()
    other.load_state_dict(unet.state_dict())
    assert relative(other(X.double(), T, CONTEXT.double()), expected) > 1e-3


@pytest.mark.parametrize("name", ["rdm_imagenet", "rdm_ffhq", "rdm_768"])
def test_agrees_with_diffusers_on_reduced_widths(name: str) -> None:
    numbers = {**PUBLISHED[name].unet, "channels": 32, "channels_per_head": 16, "size": 32}
    unet = randomized(UNet(**numbers))
    x = normal(2, numbers["in_channels"], 32, 32)
    context = normal(2, 4, numbers["context_width"], seed=2)
    expected = diffusers_twin(unet)(x, T, context).sample  # type: ignore[operator]
    assert relative(unet(x, T, context), expected) < 1e-5


def test_timestep_embedding_is_cosines_then_sines() -> None:
    t = torch.tensor([0, 1, 999, 0.5], dtype=torch.float64)
    frequencies = torch.tensor([10_000 ** (-i / 8) for i in range(8)], dtype=torch.float64)
    angles = t[:, None] * frequencies
    expected = torch.cat([torch.cos(angles), torch.sin(angles)], 1)
    torch.testing.assert_close(timestep_embedding(t, 16).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(15, 20), (16, 16)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upsampling_repeats_pixels_then_convolves(size: tuple[int, int], layout: Any) -> None:
    up = randomized(Upsample(5)).double()
    x = normal(2, 5, *size).double().contiguous(memory_format=layout)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.conv2d(repeated, up.conv.weight, up.conv.bias, padding=1)
    torch.testing.assert_close(up(x), expected, atol=1e-12, rtol=1e-12)


def test_upsampling_has_the_same_gradients_on_both_paths(needs_grad: None) -> None:
    up = randomized(Upsample(4)).double()
    x = normal(1, 4, 16, 16).double().requires_grad_()
    up(x).square().sum().backward()
    found = x.grad, up.conv.weight.grad, up.conv.bias.grad
    x.grad = up.conv.weight.grad = up.conv.bias.grad = None
    up.conv(F.interpolate(x, scale_factor=2)).square().sum().backward()
    for ours, expected in zip(found, (x.grad, up.conv.weight.grad, up.conv.bias.grad), strict=True):
        torch.testing.assert_close(ours, expected)


def test_branches_of_guidance_equal_the_repeated_batch(unet: UNet) -> None:
    both = torch.cat([CONTEXT, torch.zeros_like(CONTEXT)])
    shared = unet(X, T, both)
    apart = torch.cat([unet(X, T, CONTEXT), unet(X, T, torch.zeros_like(CONTEXT))])
    assert shared.shape[0] == 4
    assert relative(shared, apart) < 1e-5


def test_marked_null_equals_zeros(unet: UNet) -> None:
    context = Context.of(CONTEXT)
    marked = unet(X, T, Context.cat([context, context.zeros()]))
    assert relative(marked, unet(X, T, torch.cat([CONTEXT, 0 * CONTEXT]))) < 1e-5


def test_prepared_context_gives_the_same(unet: UNet) -> None:
    prepared = unet.prepare(Context.of(CONTEXT))
    assert relative(unet(X, T, prepared), unet(X, T, CONTEXT)) < 1e-5


def test_neighbors_are_a_set_and_masked_ones_do_not_count(unet: UNet) -> None:
    expected = unet(X, T, CONTEXT)
    assert relative(unet(X, T, CONTEXT.flip(1)), expected) < 1e-5
    padded = torch.cat([CONTEXT, normal(2, 3, 12, seed=7)], 1)
    mask = torch.arange(7).expand(2, -1) < 4
    assert relative(unet(X, T, padded), expected) > 1e-3
    assert relative(unet(X, T, Context({"neighbors": Tokens(padded, mask)})), expected) < 1e-5


def test_regions_attend_to_their_own_tokens(unet: UNet) -> None:
    everywhere = CONTEXT[:, None].expand(-1, 4, -1, -1)
    expected = unet(X, T, CONTEXT)
    assert relative(unet(X, T, everywhere), expected) < 1e-5
    elsewhere = everywhere.clone()
    elsewhere[:, 3] = 0
    assert relative(unet(X, T, elsewhere), expected) > 1e-3


def test_streams_are_joined_along_k() -> None:
    unet = randomized(UNet(**{**SMALL, "streams": ("query", "neighbors")}))
    context = Context({"query": Tokens(CONTEXT[:, :1]), "neighbors": Tokens(CONTEXT[:, 1:])})
    assert unet.widths == {"query": 12, "neighbors": 12}
    assert relative(unet(X, T, context), unet(X, T, CONTEXT)) < 1e-5


def test_vector_joins_the_timestep() -> None:
    unet = randomized(UNet(**{**SMALL, "vector_width": 6}))
    streams = {"neighbors": Tokens(CONTEXT)}
    vector = normal(2, 6, seed=5)
    eps = unet(X, T, Context(streams, vector))
    assert relative(unet(X, T, Context(streams, 0 * vector)), eps) > 1e-3
    both = Context.cat([Context(streams, vector), Context(streams, 0 * vector)])
    assert relative(unet(X, T, both)[:2], eps) < 1e-5


def test_without_cross_attention_it_takes_no_tokens() -> None:
    unet = randomized(UNet(**{**SMALL, "context_width": None}))
    assert unet.widths == {}
    assert unet(X, T).shape == X.shape
    with pytest.raises(ValueError, match="context_width=None"):
        unet(X, T, CONTEXT)


def test_gradient_checkpointing_changes_no_gradient(unet: UNet, needs_grad: None) -> None:
    gradients: list[list[Tensor]] = []
    for recompute in (False, True):
        unet.gradient_checkpointing = recompute
        unet.zero_grad()
        unet(X, T, CONTEXT).square().mean().backward()
        gradients.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(unet.parameters()))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_near(unet: UNet, dtype: torch.dtype, bound: float) -> None:
    expected = unet(X, T, CONTEXT)
    half = UNet(**unet.config()).to(dtype)
    half.load_state_dict(unet.state_dict())
    found = half(X, T, CONTEXT)
    assert found.dtype == torch.float32
    assert relative(found, expected) < bound
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(unet(X, T, CONTEXT), expected) < 0.05


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_does_not_matter(unet: UNet, layout: Any) -> None:
    expected = unet(X, T, CONTEXT)
    found = unet.to(memory_format=layout)(X.contiguous(memory_format=layout), T, CONTEXT)
    assert found.is_contiguous()
    assert relative(found, expected) < 1e-5


def test_float64_stays_exact(unet: UNet) -> None:
    double = UNet(**unet.config()).double()
    double.load_state_dict(unet.state_dict())
    found = double(X.double(), T, CONTEXT.double())
    assert found.dtype == torch.float64
    assert relative(found.float(), unet(X, T, CONTEXT)) < 1e-5


def test_config_builds_the_same_architecture(unet: UNet) -> None:
    import json

    again = UNet(**json.loads(json.dumps(unet.config())))
    again.load_state_dict(unet.state_dict())
    torch.testing.assert_close(again(X, T, CONTEXT), unet(X, T, CONTEXT))


def test_new_network_predicts_nothing() -> None:
    assert UNet(**SMALL)(X, T, CONTEXT).abs().max() == 0


def test_samples_do_not_mix(unet: UNet) -> None:
    poisoned = CONTEXT.clone()
    poisoned[1] = math.nan
    found = unet(X, T, poisoned)
    torch.testing.assert_close(found[0], unet(X[:1], T[:1], CONTEXT[:1])[0])
    assert found[1].isnan().all()


@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        (normal(2, 3, 7, 8), CONTEXT, "7x8 cannot be halved 1 times: use multiples of 2"),
        (normal(2, 4, 8, 8), CONTEXT, r"the network takes \(b, 3, h, w\)"),
        (X, CONTEXT[:, :0], "has no tokens"),
        (X, None, "takes {'neighbors': 12}"),
        (X, CONTEXT[..., :5], "context_width=12"),
        (X, CONTEXT.flatten(1), "context_width=12"),
        (X, torch.cat([CONTEXT, CONTEXT[:1]]), "x has 2 rows, the context 3"),
        (X, Context.of(CONTEXT[:, :0]), "has no tokens"),
        (X, Context.of(CONTEXT, "query"), "streams"),
        (X, Context.of(CONTEXT[..., :5]), "'neighbors': 5"),
        (X, Context({"neighbors": Tokens(CONTEXT)}, normal(2, 6)), "vector_width=None"),
        (X, CONTEXT[:, None].expand(-1, 3, -1, -1), "3 regions"),
        (X, CONTEXT[:1], "x has 2 rows, the context 1"),
        (X[:0], CONTEXT, "x has 0 rows, the context 2"),
        (X.long(), CONTEXT, r"latents have dtype torch\.int64, expected floating-point"),
    ],
)
def test_bad_input_names_what_disagrees(unet: UNet, x: Tensor, context: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unet(x, T, context)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 48}, "multiple of 32"),
        ({"channels_per_head": 24}, "channels_per_head=24 does not divide 64"),
        ({"heads": 24}, "heads=24 does not divide 64"),
        ({"heads": 0}, "heads=0 does not divide 64"),
    ],
)
def test_impossible_numbers_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        UNet(**{**SMALL, **change})


def test_the_first_level_may_be_wider_than_the_first_convolution() -> None:
    unet = UNet(
        in_channels=3,
        out_channels=3,
        size=8,
        channels=32,
        multipliers=(2, 3),
        blocks_per_level=1,
        attention_factors=(2,),
        context_width=8,
    )
    assert unet(torch.randn(1, 3, 8, 8), torch.ones(1), torch.randn(1, 2, 8)).shape == (1, 3, 8, 8)
