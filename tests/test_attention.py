"""Neighbor cross-attention against the formula in float64, on every path that runs on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import SHARED, needs_shared
from torch import Tensor, nn

from retrodiff.attention import (
    AttentionTables,
    KeysValues,
    NeighborAttention,
    OneNeighbor,
    absorbed,
    reference_attention,
    use_path,
)
from retrodiff.attention.absorbed import absorb, absorbed_attention
from retrodiff.attention.dispatch import Problem, choose
from retrodiff.attention.reference import keys_values, reference_weights, standard_attention
from retrodiff.builder import Builder
from retrodiff.diffusion import EpsDenoiser
from retrodiff.interfaces import Context, Query, Tokens
from retrodiff.model import Model
from retrodiff.networks import DiT, UNet

PATHS = ("absorbed", "standard")


def block(width: int = 32, context: int = 12, heads: int = 4, seed: int = 0) -> NeighborAttention:
    """A block in float64 with weights large enough that the softmax is far from uniform."""
    torch.manual_seed(seed)
    module = NeighborAttention(width, context, heads).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    nn.init.normal_(module.norm.weight, 1.0, 0.3)
    return module


def by_hand(x: Tensor, values: Tensor, module: NeighborAttention) -> Tensor:
    """The formula, position by position and head by head: no shared code, no mask, one region."""
    w, out = module.weights, torch.empty_like(x)
    e = module.width // module.heads
    for b, row in enumerate(x):
        for n, v in enumerate(row):
            y = (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt() * w.gain + w.shift
            heads = []
            for h in range(module.heads):
                part = slice(h * e, (h + 1) * e)
                scores = (w.key[part] @ values[b].T).T @ (w.query[part] @ y) / e**0.5
                share = scores.exp() / scores.exp().sum()
                heads.append(share @ (w.value[part] @ values[b].T).T)
            out[b, n] = v + w.out @ torch.cat(heads) + w.bias
    return out


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_the_formula(path: Any) -> None:
    module = block()
    module.path = path
    x, values = torch.randn(2, 5, 32).double(), torch.randn(2, 3, 12).double()
    expected = by_hand(x, values, module)
    torch.testing.assert_close(reference_attention(x, values, module.weights), expected)
    torch.testing.assert_close(module(x, values), expected)
    torch.testing.assert_close(module(x, module.prepare(values)), expected)


def test_one_neighbor_is_an_addition() -> None:
    module = block()
    x, values = torch.randn(2, 5, 32).double(), torch.randn(2, 1, 12).double()
    with torch.no_grad():
        prepared = module.prepare(values)
        assert isinstance(prepared, OneNeighbor)
        torch.testing.assert_close(module(x, prepared), by_hand(x, values, module))
    assert not isinstance(module.prepare(values), OneNeighbor)  # norm and to_q need gradients


cases = st.fixed_dictionaries(
    {
        "b": st.integers(1, 3),
        "grid": st.sampled_from([(1, 1), (2, 2), (4, 6), (3, 3)]),
        "regions": st.sampled_from([None, 1, 4]),
        "blocks": st.booleans(),
        "k": st.integers(1, 6),
        "heads": st.sampled_from([1, 2, 3]),
        "width": st.sampled_from([6, 18]),
        "masked": st.booleans(),
        "nulls": st.integers(0, 3),
        "seed": st.integers(0, 1000),
    }
)


@pytest.mark.parametrize("path", ["absorbed", "standard", "one"])
@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_random_shapes_masks_regions_and_nulls(path: Any, case: dict[str, Any]) -> None:
    height, width = case["grid"]
    regions = case["regions"]
    if regions == 4 and (height % 2 or width % 2):
        regions = 1
    module = block(case["width"], 5, case["heads"], case["seed"])
    k = 1 if path == "one" else case["k"]
    module.path = path
    rows = (case["b"], k) if regions is None else (case["b"], regions, k)
    values = torch.randn(*rows, 5).double()
    mask = torch.rand(rows) > 0.4 if case["masked"] else None
    nulls = min(case["nulls"], case["b"])
    values[case["b"] - nulls :] = 0
    shape = (height, width) if case["blocks"] else None
    x = torch.randn(case["b"], height * width, case["width"]).double()
    tokens = Tokens(values, mask, nulls)
    expected = reference_attention(x, Tokens(values, mask), module.weights, shape)
    with torch.no_grad():
        torch.testing.assert_close(module(x, tokens, shape), expected)
        torch.testing.assert_close(module(x, module.prepare(tokens), shape), expected)
    if path == "absorbed":
        shares = module.attention_weights(x, tokens, shape)
        torch.testing.assert_close(shares, reference_weights(x, tokens, module.weights, shape))


def test_regions_are_blocks_of_the_latent_that_see_their_own_neighbors_only() -> None:
    module, (height, width) = block(), (4, 8)
    x = torch.randn(1, height * width, 32).double()
    values = torch.randn(1, 4, 3, 12).double()
    out = rearrange(module(x, values, (height, width)), "1 (h w) c -> h w c", h=height)
    image = rearrange(x, "1 (h w) c -> h w c", h=height)
    for region, (top, left) in enumerate([(0, 0), (0, 4), (2, 0), (2, 4)]):
        patch = image[top : top + 2, left : left + 4].reshape(1, 8, 32)
        alone = by_hand(patch, values[:, region], module)
        torch.testing.assert_close(out[top : top + 2, left : left + 4].reshape(1, 8, 32), alone)
    runs = module(x, values)
    torch.testing.assert_close(runs[:, 8:16], by_hand(x[:, 8:16], values[:, 1], module))


@pytest.mark.parametrize("path", PATHS)
def test_null_rows_get_the_bias_exactly(path: Any) -> None:
    module = block().float()
    module.path = path
    x = torch.randn(4, 6, 32)
    tokens = Tokens.cat([Tokens(torch.randn(2, 3, 12)), Tokens(torch.randn(2, 3, 12)).zeros()])
    for prepared in (tokens, module.prepare(tokens)):
        out = module(x, prepared)
        assert torch.equal(out[2:], x[2:] + module.to_out.bias)
        with torch.no_grad():
            whole = module(x, module.prepare(tokens.zeros()))
        assert torch.equal(whole, x + module.to_out.bias)


@pytest.mark.parametrize("path", [*PATHS, "one"])
def test_zero_masked_and_null_agree(path: Any) -> None:
    module = block().float()
    module.path = path
    x, values = torch.randn(2, 6, 32), torch.randn(2, 1, 12)
    hidden = torch.zeros(2, 1, dtype=torch.bool)
    masked = module(x, Tokens(values, hidden))
    zero = module(x, Tokens(torch.zeros_like(values)))
    null = module(x, Tokens(values).zeros())
    assert torch.equal(zero, null)
    assert torch.equal(masked, null)


def test_a_mask_of_nothing_has_finite_gradients() -> None:
    module = block()
    x = torch.randn(1, 4, 32).double().requires_grad_()
    values = torch.randn(1, 3, 12).double().requires_grad_()
    tokens = Tokens(values, torch.zeros(1, 3, dtype=torch.bool))
    module(x, tokens).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    assert values.grad is not None
    assert torch.equal(values.grad, torch.zeros_like(values))
    assert not module.attention_weights(x, tokens).any()


@pytest.mark.parametrize("path", PATHS)
def test_nan_stays_in_its_sample_and_out_of_sight_when_masked(path: Any) -> None:
    module = block()
    module.path = path
    x, values = torch.randn(2, 4, 32).double(), torch.randn(2, 3, 12).double()
    values[0, 1] = torch.nan
    out = module(x, values)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 1] = False
    expected = module(x[:1], values[:1, [0, 2]])
    torch.testing.assert_close(module(x, Tokens(values, mask))[:1], expected)


def test_permuted_neighbors_change_nothing() -> None:
    module = block()
    x, values = torch.randn(2, 4, 32).double(), torch.randn(2, 5, 12).double()
    torch.testing.assert_close(module(x, values), module(x, values[:, torch.randperm(5)]))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_the_absorbed_form(masked: bool) -> None:
    module = block(6, 4, 2)
    x = torch.randn(2, 4, 6).double().requires_grad_()
    values = torch.randn(2, 2, 3, 4).double().requires_grad_()
    mask = torch.tensor([[[True, False, True], [True] * 3], [[False] * 3, [True] * 3]])
    parameters = dict(module.named_parameters())

    def run(x: Tensor, values: Tensor, *weights: Tensor) -> Tensor:
        tokens = Tokens(values, mask if masked else None)
        state = dict(zip(parameters, weights, strict=True))
        out = torch.func.functional_call(module, state, (x, tokens))
        return out

    module.path = "absorbed"
    assert torch.autograd.gradcheck(run, (x, values, *parameters.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0, 3, 30])
@pytest.mark.parametrize("k", [1, 4, 11, 20])
def test_error_is_at_most_twice_that_of_the_plain_block(
    dtype: torch.dtype, mean: float, k: int
) -> None:
    """Also where gradients are recorded, which takes all positions at once; unit and raw scale."""
    torch.manual_seed(0)
    module = NeighborAttention(192, 64, 6)
    nn.init.normal_(module.norm.weight, 1.0, 0.2)
    nn.init.normal_(module.norm.bias, 0.0, 0.2)
    module = module.to(dtype)
    x = (torch.randn(2, 64, 192) + mean).to(dtype)
    for scale in (0.1, 1):
        values = (scale * torch.randn(2, k, 64)).to(dtype)
        exact = reference_attention(x.double(), values.double(), module.weights.to(torch.float64))
        plain = standard_attention(x, keys_values(values, module.weights), module.weights)
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded):
                ours = absorbed_attention(x, absorb(values, module.weights), module.to_out.bias)
            # x is added last, so that float32 is rounded as seldom as in the plain block.
            bound = 1.5 if dtype == torch.float32 else 2
            assert (ours - exact).norm() <= bound * (plain - exact).norm()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", [None, "absorbed", "standard", "one"])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_every_path_runs_under_autocast(path: Any, k: int, narrow: torch.dtype) -> None:
    """x keeps its dtype, what is added has the precision of the narrow one; null rows are exact."""
    if path == "one" and k != 1:
        return
    module = block().float()
    module.path = path
    x, values = torch.randn(3, 16, 32), torch.randn(3, k, 12)
    tokens = Tokens(values, torch.tensor([[True] * k, [False] * k, [True] * k]), 1)
    expected = module(x, tokens)
    with torch.autocast("cpu", narrow):
        found = [module(x, tokens), module(x, module.prepare(tokens, 16))]
        shares = module.attention_weights(x, tokens)
        reference = reference_attention(x, Tokens(values[:1]), module.weights)
    for out in found:
        assert out.dtype == torch.float32
        assert (out - expected).norm() <= 0.02 * (expected - x).norm()
        assert torch.equal(out[2], x[2] + module.to_out.bias)
    assert (reference[0] - expected[0]).norm() <= 0.02 * (expected[0] - x[0]).norm()
    torch.testing.assert_close(shares[0].sum(-1).float(), torch.ones(4, 16), rtol=0, atol=0.02)
    assert not shares[1:].any()
    found[0].sum().backward()
    parameters = [p for n, p in module.named_parameters() if path != "one" or "q" not in n]
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in parameters)


@pytest.mark.parametrize("tile", [1, 1000, 6000, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tiles_of_a_cpu_change_nothing(
    tile: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One position at a time, some, some samples, all: with null rows, a mask, x of its dtype."""
    monkeypatch.setattr(absorbed, "TILE", tile // torch.get_num_threads())
    module = block().to(dtype)
    module.path = "absorbed"
    x, values = torch.randn(5, 7, 32), torch.randn(5, 3, 12).to(dtype)
    x, kept = x.to(torch.promote_types(dtype, torch.float32)).mT.contiguous().mT, x.clone()
    tokens = Tokens(values, torch.rand(5, 3) > 0.3, 2)
    tables = module.prepare(tokens)
    expected = module(x, tables)  # recorded, so in one piece
    with torch.no_grad():
        found = module(x, tables)
    assert torch.equal(x, kept.to(x.dtype))
    assert found.dtype == expected.dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=tolerance)


def test_non_contiguous_input() -> None:
    module = block()
    x = torch.randn(2, 32, 6).double().mT
    values = torch.randn(2, 12, 3).double().mT
    for path in PATHS:
        module.path = path
        torch.testing.assert_close(module(x, values), module(x.contiguous(), values.contiguous()))


# --- what is prepared ---------------------------------------------------------------------------


def test_prepared_tables_are_immutable_and_modules_keep_none() -> None:
    module = block()
    module.path = "absorbed"
    before = set(vars(module))
    tables = module.prepare(torch.randn(2, 3, 12).double())
    assert isinstance(tables, AttentionTables)
    with pytest.raises(AttributeError):
        tables.m = tables.u  # pyright: ignore[reportAttributeAccessIssue]
    module(torch.randn(2, 4, 32).double(), tables)
    assert set(vars(module)) == before


@pytest.mark.parametrize("path", PATHS)
def test_each_preparation_sees_the_weights_as_they_are(path: Any) -> None:
    module = block().float()
    module.path = path
    x, values = torch.randn(2, 4, 32), torch.randn(2, 3, 12)
    old = module.prepare(values)

    def fresh() -> None:
        expected = reference_attention(
            x.double(), values.double(), module.weights.to(torch.float64)
        )
        out = module(x.to(module.to_q.weight), module.prepare(values.to(module.to_q.weight)))
        tolerance = 1e-4 if module.to_q.weight.dtype == torch.float32 else 1e-9
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)

    average = copy.deepcopy(module)
    for parameter in average.parameters():
        parameter.data.add_(0.1)
    for mine, theirs in zip(module.parameters(), average.parameters(), strict=True):
        mine.data.copy_(theirs.data)  # as torch-ema swaps: no version counter moves
    fresh()
    assert not torch.allclose(module(x, module.prepare(values)), module(x, old))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(x, values).square().mean().backward()
    optimizer.step()
    fresh()
    module.double()
    fresh()
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        prepared = module.prepare(values)
        narrow = module(x, prepared)
    held = prepared.keys if isinstance(prepared, KeysValues) else prepared.m
    assert held.dtype == torch.bfloat16
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, module(x, values), rtol=0, atol=0.2)
    fresh()


@contextmanager
def swapped(model: Model) -> Iterator[None]:
    """The averaged weights instead of the trained ones, as torch-ema swaps them."""
    from torch_ema import ExponentialMovingAverage

    parameters = list(model.denoiser.parameters())  # type: ignore[attr-defined]
    average = ExponentialMovingAverage(parameters, 0.5)
    average.shadow_params = [p + 0.1 * torch.randn_like(p) for p in average.shadow_params]
    with average.average_parameters():
        yield


@contextmanager
def stepped(model: Model) -> Iterator[None]:
    """After a step of training."""
    query = Query(torch.randn(2, 8))
    optimizer = torch.optim.AdamW(model.denoiser.parameters(), 1e-2)  # type: ignore[attr-defined]
    model.loss(torch.randn(2, 1, 8, 8), query, model.database.search(query, 4)).mean().backward()  # type: ignore[union-attr]
    optimizer.step()
    yield


@contextmanager
def moved(model: Model) -> Iterator[None]:
    """In another dtype."""
    model.denoiser.to(torch.bfloat16)  # type: ignore[attr-defined]
    yield
    model.denoiser.to(torch.float32)  # type: ignore[attr-defined]


@contextmanager
def narrowed(model: Model) -> Iterator[None]:
    """Under autocast."""
    del model
    with torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("change", [swapped, stepped, moved, narrowed])
def test_two_samples_have_tables_of_their_own(recipe: Builder, change: Any, path: Any) -> None:
    """What changed between two calls of `sample` is seen, as by a model that never sampled."""

    def built() -> Model:
        network = UNet(
            in_channels=1, out_channels=1, size=8, channels=32, multipliers=(1, 2),
            blocks_per_level=1, attention_factors=(2,), context_width=8,
        )  # fmt: skip
        use_path(network, path)
        return recipe.denoiser(EpsDenoiser(network)).build()

    def sample(model: Model) -> Tensor:
        return model.sample(prompts=["a", "b"], k=4, steps=2, progress=False).latents

    torch.manual_seed(0)
    model = built()
    for parameter in model.denoiser.parameters():  # type: ignore[attr-defined]
        nn.init.normal_(parameter, std=0.1)
    before = sample(model)
    with change(model):
        found = sample(model)
        fresh = built()
        kept = next(model.denoiser.parameters()).dtype  # type: ignore[attr-defined]
        fresh.denoiser.to(kept).load_state_dict(model.denoiser.state_dict())  # type: ignore[attr-defined]
        assert torch.equal(found, sample(fresh))
        assert not torch.equal(found, before)
    if change in (swapped, narrowed):
        assert torch.equal(sample(model), before)


@needs_shared
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["rdm_vq_tiny", "rdm_kl_tiny"])
def test_published_miniatures_on_every_path(name: str, path: Any) -> None:
    from safetensors.torch import load_file

    from retrodiff.checkpoints.foreign.compvis import load_compvis
    from retrodiff.presets import from_published

    stem = SHARED / "parity" / name
    published = load_compvis(stem.with_suffix(".ckpt"), stem.with_suffix(".yaml"))
    io = load_file(f"{stem}.io.safetensors")
    use_path(published.unet, path)
    with torch.no_grad():
        eps = published.unet(io["x"], io["timesteps"], io["context"])
    latents = (
        from_published(published, scale="raw")
        .build()
        .sample_latents(
            context=io["context"], noise=io["x"], sampler="ddim", steps=10, guidance=3.0
        )
    )
    for mine, theirs in ((eps, io["eps"]), (latents, io["ddim_cfg"])):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


def test_parameter_names_are_those_of_published_layouts() -> None:
    assert set(dict(NeighborAttention(8, 4, 2).named_parameters())) == {
        "norm.weight", "norm.bias", "to_q.weight", "to_k.weight", "to_v.weight",
        "to_out.weight", "to_out.bias",
    }  # fmt: skip


# --- dispatch -----------------------------------------------------------------------------------


def problem(**changes: Any) -> Problem:
    usual: dict[str, Any] = dict(
        batch=8, positions=1024, width=384, context_width=512, heads=12, k=4,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    return Problem(**usual | changes)


@pytest.mark.parametrize(
    ("changes", "refused", "expected"),
    [
        ({}, "no GPU", "absorbed"),
        ({"k": 1}, "no GPU", "one"),
        ({"k": 77 * 4}, "no GPU", "standard"),  # patch tokens: k·T >= e
        ({"k": 20, "positions": 64, "width": 960, "heads": 30, "evaluations": 1}, "no", "standard"),
        ({"device": "cuda", "dtype": torch.bfloat16, "batch": 64}, None, "fused"),
        ({"device": "cuda", "dtype": torch.bfloat16, "batch": 64, "evaluations": 1}, None, "fused"),
        ({"device": "cuda", "k": 65, "heads": 3}, "k=65 is above", "absorbed"),
        # M and U of each sample are larger than the weights that all share:
        ({"device": "cuda", "dtype": torch.bfloat16, "batch": 64, "k": 20, "positions": 36,
          "width": 1792, "heads": 56}, None, "standard"),
    ],
)  # fmt: skip
def test_the_cheapest_path_is_taken(changes: Any, refused: str | None, expected: str) -> None:
    choice = choose(problem(**changes), refused)
    assert choice.path == expected
    assert expected in str(choice)


def test_explain_says_what_forward_does() -> None:
    module = NeighborAttention(384, 16, 12)
    x = torch.randn(2, 1024, 384)
    with torch.no_grad():
        told = module.explain(x, torch.randn(2, 4, 16))
        assert told.path == "absorbed"
        assert "not fused: no Triton kernels on device cpu" in told.reason
        assert set(told.estimates) == {"absorbed", "standard"}
        assert module.explain(x, torch.randn(2, 1, 16)).path == "one"
        long = torch.randn(2, 200, 16)
        assert module.explain(x, long).path == "standard"
        assert isinstance(module.prepare(long), KeysValues)
        assert module.explain(x, module.prepare(long)).path == "standard"
        assert module.explain(x, module.prepare(torch.randn(2, 4, 16))).path == "absorbed"


def test_a_path_can_be_forced_in_a_whole_network() -> None:
    network = nn.ModuleList([NeighborAttention(32, 8, 2) for _ in range(2)])
    values = torch.randn(1, 4, 8)
    use_path(network, "standard")
    assert all(isinstance(m.prepare(values), KeysValues) for m in network)  # pyright: ignore
    use_path(network, "absorbed")
    assert all(isinstance(m.prepare(values), AttentionTables) for m in network)  # pyright: ignore
    use_path(network, "fused")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="path='fused' cannot be taken: no Triton kernels"):
            network[0].prepare(values)  # pyright: ignore


# --- compiled, checkpointed, distributed --------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_compiles_without_graph_breaks(path: Any) -> None:
    module = block().float()
    module.path = path
    x, values = torch.randn(3, 8, 32), torch.randn(3, 4, 12)
    tokens = Tokens(values, torch.rand(3, 4) > 0.2, 1)
    expected = module(x, tokens)
    compiled = torch.compile(
        lambda x, values: module(x, Tokens(values, tokens.mask, 1)),
        backend="aot_eager",
        fullgraph=True,
    )
    torch.testing.assert_close(compiled(x, values), expected)
    step = torch.compile(lambda x, prepared: module(x, prepared), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(step(x, module.prepare(tokens)), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("path", PATHS)
def test_a_whole_network_compiles_without_graph_breaks(path: Any) -> None:
    """A training step from tokens, and a sampling step from what was prepared."""
    torch.manual_seed(0)
    net = DiT(shape=(1, 8, 8), patch=4, width=16, depth=1, heads=2, widths={"neighbors": 8})
    nn.init.normal_(net.out.weight, std=0.1)
    use_path(net, path)
    x, t, values = torch.randn(4, 1, 8, 8), torch.full((4,), 500.0), torch.randn(2, 3, 8)
    context = Context.cat([Context.of(values), Context.of(values).zeros()])
    torch._dynamo.reset()
    step = torch.compile(net, backend="eager", fullgraph=True)
    expected = net(x, t, context)
    found = step(x, t, context)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected.square().sum(), list(net.parameters()))
    grads = torch.autograd.grad(found.square().sum(), list(net.parameters()))
    for mine, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(step(x, t, net.prepare(context)), expected.detach())
    torch._dynamo.reset()


@pytest.mark.parametrize("path", PATHS)
def test_gradient_checkpointing(path: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    module = block()
    module.path = path
    x, values = torch.randn(2, 4, 32).double(), torch.randn(2, 3, 12).double()
    module(x, values).square().sum().backward()
    expected = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    out = checkpoint(module, x, values, use_reentrant=False)
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    assert len(expected) == 7
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("null", [False, True])
def test_every_parameter_gets_a_gradient(k: int, null: bool) -> None:
    """As DDP demands: a parameter that a rank leaves out would hang the others."""
    module = block()
    tokens = Tokens(torch.randn(2, k, 12).double())
    module(torch.randn(2, 4, 32).double(), tokens.zeros() if null else tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.randn(2, 0, 12), "has no tokens: give at least one"),
        (torch.randn(2, 3, 11), "context width 11 does not match context_width=12"),
        (torch.randn(2, 12), r"expected \(b, k, d\)"),
        (Tokens(torch.randn(2, 3, 12), torch.ones(2, 4) > 0), r"mask of shape \(2, 4\) does not"),
        (Tokens(torch.randn(2, 3, 12), torch.ones(2, 3)), "expected bool"),
        (Tokens(torch.randn(2, 3, 12), None, 3), "null_rows=3 does not fit a context of 2 rows"),
        (torch.randn(3, 3, 12), "x has 2 rows, the context 3"),
        (torch.randn(2, 5, 3, 12), "5 regions do not divide 16 positions"),
    ],
)
@pytest.mark.parametrize("path", [None, *PATHS])
def test_bad_contexts_are_refused_in_one_line(tokens: Any, message: str, path: Any) -> None:
    module = block().float()
    module.path = path
    with pytest.raises(ValueError, match=message) as error:
        module(torch.randn(2, 16, 32), tokens)
    assert "\n" not in str(error.value)


def test_other_bad_input() -> None:
    module = block().float()
    values = torch.randn(2, 4, 3, 12)
    with pytest.raises(ValueError, match="does not match width=32"):
        module(torch.randn(2, 16, 31), values)
    with pytest.raises(ValueError, match=r"shape=\(4, 5\) does not have the 16 positions"):
        module(torch.randn(2, 16, 32), values, (4, 5))
    with pytest.raises(ValueError, match="4 regions do not tile a latent of 1x16"):
        module(torch.randn(2, 16, 32), values, (1, 16))
    with pytest.raises(ValueError, match="heads=5 does not divide width=32"):
        NeighborAttention(32, 12, 5)
    module.path = "one"
    with pytest.raises(ValueError, match="path='one' takes a single neighbor, not k=3"):
        module.prepare(torch.randn(2, 3, 12))
    with torch.no_grad():
        one = module.prepare(torch.randn(2, 1, 12))
        assert (module.attention_weights(torch.randn(2, 16, 32), one) == 1).all()
