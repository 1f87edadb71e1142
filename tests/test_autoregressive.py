"""The autoregressive sibling: its network against plain formulas, its draws, its seam."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from parts import HashingEncoder
from torch import Tensor

from retrodiff.autoregressive import AutoregressiveGenerator, GrayLevels, Tokenizer
from retrodiff.autoregressive.token_generator import draw
from retrodiff.builder import Builder
from retrodiff.checkpoints.card import model_card
from retrodiff.diffusion import ClassifierFree, Dropped, NeighborEmbeddings, Unconditional
from retrodiff.interfaces import Context, Generator, GuidedGenerator, Query, TrainableGenerator
from retrodiff.model import Model
from retrodiff.networks import CausalTransformer, VQAutoencoder
from retrodiff.retrieval import NearestNeighbors, Uniform
from retrodiff.testing import check_generator
from retrodiff.training import TrainingSet, fit

QUIET = {"progress": False}


def network(**numbers: Any) -> CausalTransformer:
    """A small network whose weights are all random, its norms and biases, too."""
    small = {"codes": 11, "grid": (4, 4), "width": 24, "depth": 3, "heads": 3, "context_width": 8}
    torch.manual_seed(0)
    net = CausalTransformer(**{**small, "extra_tokens": 2, **numbers}).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_codes(rows: int, i: int, vocabulary: int = 11) -> Tensor:
    return torch.randint(vocabulary, (rows, i), generator=torch.Generator().manual_seed(5))


# --- the network -------------------------------------------------------------------------------


def restated(net: CausalTransformer, codes: Tensor, near: Tensor) -> np.ndarray:
    """The same function in float64 from its description, one image and one head at a time."""
    w = {name: tensor.double().numpy() for name, tensor in net.state_dict().items()}

    def norm(x: np.ndarray, place: str) -> np.ndarray:
        spread = x.var(-1, keepdims=True)
        unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(spread + 1e-5)
        return unit * w[f"{place}.weight"] + w[f"{place}.bias"]

    def attention(x: np.ndarray, tokens: np.ndarray, place: str, causal: bool) -> np.ndarray:
        e = net.width // net.heads
        merged = []
        for head in range(net.heads):
            rows = slice(head * e, (head + 1) * e)
            q = x @ w[f"{place}.to_q.weight"][rows].T
            k = tokens @ w[f"{place}.to_k.weight"][rows].T
            v = tokens @ w[f"{place}.to_v.weight"][rows].T
            scores = q @ k.T / math.sqrt(e)
            if causal:
                scores[np.triu_indices(len(x), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            merged.append(weights / weights.sum(-1, keepdims=True) @ v)
        out = np.concatenate(merged, 1) @ w[f"{place}.to_out.weight"].T
        return out + w[f"{place}.to_out.bias"]

    gaussian = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))
    found = []
    for image, tokens in zip(codes.tolist(), near.double().numpy(), strict=True):
        inputs = [net.codes + net.extra_tokens - 1, *image]
        x = w["embed.weight"][inputs] + w["positional_encoding"][:, : len(inputs)].T
        for i in range(len(net.blocks)):
            block = f"blocks.{i}"
            place = f"{block}.self_attention"
            y = norm(x, f"{place}.norm")
            x = x + attention(y, y, place, True)
            place = f"{block}.cross_attention"
            x = x + attention(norm(x, f"{place}.norm"), tokens, place, False)
            place = f"{block}.feed_forward"
            h = norm(x, f"{place}.norm") @ w[f"{place}.expand.weight"].T + w[f"{place}.expand.bias"]
            value, gate = np.split(h, 2, axis=-1)
            h = value * gate * gaussian(gate)
            x = x + h @ w[f"{place}.reduce.weight"].T + w[f"{place}.reduce.bias"]
        found.append(x @ w["out.weight"].T + w["out.bias"])
    return np.stack(found)


def largest(found: Tensor, expected: Any) -> float:
    """Largest difference, as a share of the largest expected number."""
    expected = torch.as_tensor(expected).double()
    return float((found.double() - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 4, 20])
def test_the_network_equals_its_description_in_float64(k: int) -> None:
    net, codes, near = network(), some_codes(3, 15), normal(3, k, 8)
    expected = restated(net, codes, near)
    assert largest(net(codes, near), expected) < 1e-5
    assert largest(net.double()(codes, near.double()), expected) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 4, 20])
def test_cached_logits_equal_those_without_a_cache(k: int) -> None:
    net, codes, near = network(), some_codes(3, 15), normal(3, k, 8)
    whole = net(codes, near)
    run = net.decoding(near)
    steps = [run.next()] + [run.next(codes[:, i]) for i in range(15)]
    assert largest(torch.stack(steps, 1), whole) < 1e-5
    with pytest.raises(ValueError, match="all 16 codes are there"):
        run.next(codes[:, 0])
    part = net(codes[:, :6], near)  # a beginning has the logits that the whole has there
    assert largest(part, whole[:, :7]) < 1e-5
    net.double()
    run = net.decoding(near.double())
    steps = [run.next()] + [run.next(codes[:, i]) for i in range(15)]
    assert largest(torch.stack(steps, 1), net(codes, near.double())) < 1e-12


@torch.no_grad()
def test_no_code_sees_itself_or_what_follows() -> None:
    net, codes, near = network(), some_codes(2, 15), normal(2, 4, 8)
    other = codes.clone()
    other[:, 9] = (codes[:, 9] + 1) % 11
    before, after = net(codes, near), net(other, near)
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] - after[:, 10:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_neighbors_are_a_set_and_a_row_is_its_own() -> None:
    net, codes, near = network(), some_codes(3, 15), normal(3, 4, 8)
    whole = net(codes, near)
    assert largest(net(codes, near[:, [2, 0, 3, 1]]), whole) < 1e-5
    assert largest(net(codes[1:2], near[1:2]), whole[1:2]) < 1e-5
    assert largest(net(codes, near[[1, 2, 0]]), whole) > 1e-2
    both = Context.cat([Context.of(near), Context.of(near).zeros()])
    branches = net(codes, both)
    assert largest(branches, torch.cat([whole, net(codes, torch.zeros_like(near))])) < 1e-5


def test_the_published_size_is_exact() -> None:
    with torch.device("meta"):
        net = CausalTransformer(
            codes=16384, grid=(16, 16), width=768, depth=18, heads=12, context_width=512,
            extra_tokens=2,
        )  # fmt: skip
    assert sum(p.numel() for p in net.parameters()) == 230_874_112
    assert len(net.state_dict()) == 364
    assert (net.length, net.start) == (256, 16385)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"heads": 5}, "heads=5 does not divide width=24"),
        ({"heads": 0}, "heads=0 does not divide"),
        ({"codes": 0}, "codes=0: give 1 or more"),
        ({"extra_tokens": 0}, "extra_tokens=0: give 1 or more"),
    ],
)
def test_a_network_that_cannot_be_is_refused(numbers: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**numbers)


def test_what_does_not_fit_the_network_is_refused_in_one_line() -> None:
    net, near = network(), normal(2, 4, 8)
    vector = Context(Context.of(near).streams, torch.ones(2, 3))
    for call, message in (
        (lambda: net(some_codes(2, 16), near), r"shape \(2, 16\).*below the 16 codes"),
        (lambda: net(some_codes(3, 15), near), r"3 rows, the context 2"),
        (lambda: net(some_codes(2, 15), normal(2, 4, 7)), r"'neighbors': 7"),
        (lambda: net(some_codes(2, 15), normal(2, 4, 3, 8)), r"neighbors for each region"),
        (lambda: net(some_codes(2, 15), vector), r"a CausalTransformer takes none"),
        (lambda: net.decoding(near).next(torch.zeros(2).long()), r"the first one needs none"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


# --- drawing codes -----------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3), (1.0, 1)])
def test_codes_are_drawn_with_their_probabilities(temperature: float, top_k: int | None) -> None:
    logits = 2 * normal(7).double()
    probabilities = (logits / temperature).exp().numpy()
    if top_k is not None:
        probabilities[np.argsort(probabilities)[:-top_k]] = 0
    probabilities /= probabilities.sum()
    n = 20_000
    heights = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = draw(logits.expand(n, 7), heights, temperature, top_k)
    counts = np.bincount(drawn.numpy(), minlength=7)
    assert not counts[probabilities == 0].any()
    expected = n * probabilities[probabilities > 0]
    chi_square = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 25  # 6 degrees of freedom: one in 3,000


def test_the_ends_of_the_distribution() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert draw(logits, torch.tensor([0.0]), 1.0, None).tolist() == [1]
    assert draw(logits, torch.tensor([1.0]), 1.0, None).tolist() == [0]
    assert draw(logits, torch.tensor([1.0]), 1.0, 2).tolist() == [2]
    assert draw(logits, torch.tensor([1.0]), 1.0, 50).tolist() == [0]


# --- the generator -----------------------------------------------------------------------------


def generator(**numbers: Any) -> AutoregressiveGenerator:
    return AutoregressiveGenerator(network=network(), autoencoder=GrayLevels(11), **numbers)


@torch.no_grad()
def by_hand(made: AutoregressiveGenerator, near: Tensor, noise: Tensor) -> Tensor:
    """The same image without a cache: every code from a whole evaluation of each branch."""
    net: Any = made.network
    codes = torch.zeros(len(noise), 0, dtype=torch.long)
    heights = 0.5 * (1 + torch.erf(noise.double().flatten(1) / math.sqrt(2)))
    for i in range(16):
        cond, null = (net(codes, x)[:, -1].double() for x in (near, torch.zeros_like(near)))
        logits = null + made.guidance * (cond - null)
        chosen = draw(logits, heights[:, i], made.temperature, made.top_k)
        codes = torch.cat([codes, chosen[:, None]], 1)
    return codes.view(-1, 1, 4, 4)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_generation_equals_the_loop_without_a_cache(guidance: float) -> None:
    made = generator(guidance=guidance, top_k=6, temperature=1.5)
    near, noise = normal(5, 4, 8), normal(5, 1, 4, 4, seed=3)
    context = Context.of(near)
    found = made.generate(context, context.zeros(), noise, steps=1)
    assert torch.equal(found.long(), by_hand(made, near, noise))
    assert found.dtype == torch.float32


def test_guidance_moves_samples_and_one_is_the_condition_alone() -> None:
    near, noise = Context.of(normal(8, 4, 8)), normal(8, 1, 4, 4, seed=3)
    plain, strong = generator(), generator().guided(4)
    assert strong.guidance == 4.0
    one, other = (g.generate(near, near.zeros(), noise, steps=1) for g in (plain, strong))
    assert not torch.equal(one, other)
    null = plain.generate(near.zeros(), near.zeros(), noise, steps=1)
    assert torch.equal(generator(guidance=0).generate(near, near.zeros(), noise, steps=1), null)


def test_generator_contract_and_its_place_in_the_seam() -> None:
    made = generator(guidance=2.0)
    check_generator(made)
    assert isinstance(made, Generator | TrainableGenerator | GuidedGenerator)
    assert isinstance(made.autoencoder, Tokenizer)
    assert made.shape == (1, 4, 4)
    assert made.widths == {"neighbors": 8}
    seen: list[int] = []
    context = Context.of(normal(2, 4, 8))
    made.generate(
        context, context, normal(2, 1, 4, 4), steps=1, callback=lambda i, _: seen.append(i)
    )
    assert seen == list(range(16))


def test_the_loss_is_the_cross_entropy_of_each_code() -> None:
    made, near = generator(), normal(3, 4, 8)
    images = GrayLevels(11).decode_codes(some_codes(3, 16).view(3, 4, 4))
    codes = some_codes(3, 16)
    with torch.no_grad():
        logits = made.network(codes[:, :-1], near).double()
    chances = logits.softmax(-1).gather(-1, codes[..., None])[..., 0]
    expected = -chances.log().mean(1)
    torch.testing.assert_close(made.loss(images, Context.of(near)).double(), expected)
    with pytest.raises(ValueError, match=r"codes \(8, 8\), which do not match .*grid=\(4, 4\)"):
        made.loss(torch.zeros(3, 1, 8, 8), Context.of(near))


def test_gray_levels_are_exact_both_ways_and_round_what_is_between() -> None:
    gray, codes = GrayLevels(17), torch.arange(17).view(1, 1, 17)
    assert torch.equal(gray.codes(gray.decode_codes(codes)), codes)
    assert gray.decode_codes(codes).flatten()[[0, 8, 16]].tolist() == [-1, 0, 1]
    assert gray.codes(torch.tensor([[[[-2.0, 0.05, 0.07, 3.0]]]])).tolist() == [[[0, 8, 9, 16]]]
    with pytest.raises(ValueError, match=r"gray levels are of \(b, 1, h, w\)"):
        gray.codes(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="levels=1"):
        GrayLevels(1)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"guidance": -1.0}, "guidance=-1"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"autoencoder": GrayLevels(12)}, "predicts 11 codes, but GrayLevels has 12: .*codes=12"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(generator(), **numbers)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_show_in_the_images() -> None:
    made = generator()
    made.network.out.bias.data[3] = torch.nan
    context = Context.of(normal(2, 4, 8))
    latents = made.generate(context, context, normal(2, 1, 4, 4), steps=1)
    assert made.decode(latents).isnan().all()


# --- the model ---------------------------------------------------------------------------------


@pytest.fixture
def recipe(encoder: Any, database: Any) -> Builder:
    return (
        Builder()
        .encoder(encoder)
        .database(database)
        .proposal(Uniform())
        .conditioner(Dropped(NeighborEmbeddings("raw"), 0.1))
        .generator(lambda: dataclasses.replace(generator(), guidance=2.0))
        .defaults(k=4, steps=16)
    )


def test_it_samples_in_every_mode_and_each_image_is_its_own(recipe: Builder) -> None:
    model = recipe.build()
    for asked in (
        {"prompts": ["a", "b", "c"]},
        {"prompts": ["a", "b", "c"], "mode": "neighbors"},
        {"classes": ["a", "b", "c"]},
        {"n": 3},
    ):
        out = model.sample(**asked, seed=1, **QUIET)
        assert out.images.shape == (3, 1, 4, 4)
        assert out.latents.shape == (3, 1, 4, 4)
        assert float(out.images.abs().max()) <= 1
    small = model.sample(n=3, seed=1, batch_size=1, **QUIET)
    assert torch.equal(small.images, out.images)
    assert "guidance=2.0" in out.settings["generator"]
    again = model.sample(n=3, seed=1, guidance=0.5, **QUIET)
    assert "guidance=0.5" in again.settings["generator"]
    assert not torch.equal(model.sample(n=3, seed=2, **QUIET).images, out.images)


def test_a_sampler_is_refused_in_one_line(recipe: Builder) -> None:
    model = recipe.build()
    for wrong, message in (
        ({"sampler": "ddim"}, r"sampler='ddim' has no effect.*AutoregressiveGenerator, which has "),
        ({"guidance": ClassifierFree(2.0)}, r"mixes logits by a number, guidance=2.0"),
        ({"guidance": -1}, r"guidance=-1.0: give a finite number, at least 0"),
        ({"attribution": True}, r"attribution needs a network"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            model.sample(n=1, **wrong, **QUIET)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"expected \(b, 1, 4, 4\)"):
        model.sample_latents(context=normal(1, 4, 8), noise=normal(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"sampler=DDIM has no effect beside generator"):
        recipe.sampler("ddim").build()


def test_it_trains_with_fit_saves_and_loads(recipe: Builder, tmp_path: Any) -> None:
    model = recipe.build()
    gray = GrayLevels(11)
    images = gray.decode_codes(some_codes(1, 16).view(1, 4, 4).expand(24, 4, 4))
    data = TrainingSet.of(images, model.encoder, model.database, NearestNeighbors(), 4, **QUIET)
    result = fit(model, data, steps=40, batch_size=8, lr=5e-3, ema=0.8, seed=0, **QUIET)
    query = Query(data.embeddings[:4])
    near = model.database.search(query, 4)
    with torch.no_grad():
        losses = [float(m.loss(images[:4], query, near).mean()) for m in (model, result.model)]
    assert losses[1] < 0.3 < losses[0]
    learned = result.model.sample(query=query, guidance=1.0, seed=0, **QUIET)
    assert float((gray.codes(learned.images) == some_codes(1, 16).view(4, 4)).float().mean()) > 0.9
    result.model.save(tmp_path / "m")
    card = model_card(result.model.parts(), "me/codes")
    assert "| generator | AutoregressiveGenerator(network=CausalTransformer" in card
    assert "diffusion model" not in card
    again = Model.load(tmp_path / "m", encoder=model.encoder, database=model.database)
    assert again.generator == dataclasses.replace(
        result.model.generator, network=again.generator.network
    )
    assert torch.equal(again.sample(n=2, seed=3, **QUIET).images, result.model.sample(
        n=2, seed=3, **QUIET).images)  # fmt: skip


def test_the_first_stage_is_not_trained_and_moves_along(recipe: Builder) -> None:
    torch.manual_seed(0)
    first = VQAutoencoder(
        channels=32, multipliers=[1, 2], blocks_per_level=1, latent_channels=4, codes=11
    )
    images = normal(16, 3, 8, 8).clamp(-1, 1)
    made = AutoregressiveGenerator(network=network(), autoencoder=first)
    model = recipe.generator(made).build()
    codes = made.encode(images)
    assert codes.shape == (16, 4, 4)
    decoded = made.decode(codes[:, None].float())
    torch.testing.assert_close(decoded, first.decode_codes(codes).detach().clamp(-1, 1))
    encoder = HashingEncoder()
    data = TrainingSet.of(images, encoder, model.database, NearestNeighbors(), 4, **QUIET)
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    result = fit(model, data, steps=2, batch_size=4, lr=1e-3, ema=0.9, seed=0, **QUIET)
    trained = result.model.generator
    assert trained.autoencoder is first
    assert all(torch.equal(before[k], v) for k, v in first.state_dict().items())
    assert not torch.equal(trained.network.out.weight, made.network.out.weight)
    assert model.bfloat16().sample(n=2, seed=0, **QUIET).images.dtype == torch.float32


def test_without_a_condition_it_is_the_plain_model(recipe: Builder) -> None:
    made = AutoregressiveGenerator(network=network(context_width=None), autoencoder=GrayLevels(11))
    model = Builder().conditioner(Unconditional()).generator(made).build()
    out = model.sample(n=3, seed=0, **QUIET)
    assert out.images.shape == (3, 1, 4, 4)
    check_generator(made)


def test_fresh_weights_warn_until_trained(recipe: Builder) -> None:
    made = generator()
    made.network.untrained = True
    model = recipe.generator(made).build()
    with pytest.warns(UserWarning, match="fresh weights gives noise"):
        model.sample(n=1, **QUIET)
    images = torch.zeros(8, 1, 4, 4)
    data = TrainingSet.of(images, model.encoder, model.database, NearestNeighbors(), 4, **QUIET)
    result = fit(model, data, steps=1, batch_size=4, lr=1e-3, ema=0.9, seed=0, **QUIET)
    result.model.sample(n=1, **QUIET)
