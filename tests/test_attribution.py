"""Which neighbor painted which region: recorded beside the network, never changing a sample."""

import json

import pytest
import torch
from parts import HashingEncoder, small_network
from PIL import Image
from torch import Tensor

from retrodiff.attention import NeighborAttention, Recorder, recording, use_path
from retrodiff.attention.recording import MEASURES
from retrodiff.attention.reference import reference_attention, reference_weights
from retrodiff.builder import Builder
from retrodiff.diffusion import (
    ClassifierFree,
    DPMpp2M,
    EDMDenoiser,
    Interval,
    LearnedNull,
    NeighborEmbeddings,
    QueryAndNeighbors,
    QueryOnly,
    Unconditional,
)
from retrodiff.interfaces import Context, Query, Tokens
from retrodiff.model.attribution_sheet import COLORS, attribution_sheet
from retrodiff.networks.dit import DiT
from retrodiff.networks.unet import UNet
from retrodiff.retrieval import Uniform
from retrodiff.testing import small_database

PATHS = [None, "absorbed", "standard"]


def unet() -> UNet:
    torch.manual_seed(0)
    net = UNet(
        in_channels=1,
        out_channels=1,
        size=8,
        channels=32,
        multipliers=(1, 2),
        blocks_per_level=1,
        attention_factors=(1, 2),
        context_width=8,
    )
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return net


def built(network=None, conditioner=None, guidance=2.0):
    conditioner = conditioner or NeighborEmbeddings("raw")
    return (
        Builder()
        .encoder(HashingEncoder())
        .database(small_database(rows=40, dim=8))
        .proposal(Uniform())
        .conditioner(conditioner)
        .denoiser(EDMDenoiser(network or small_network()))
        .sampler(DPMpp2M())
        .guidance(ClassifierFree(guidance) if isinstance(guidance, float) else guidance)
        .defaults(k=4, steps=3)
        .build()
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("make", [small_network, unet], ids=["DiT", "UNet"])
def test_samples_are_the_same_to_the_bit(make, path):
    model = built(make())
    use_path(model.denoiser.network, path)
    for asked in ({"n": 3}, {"prompts": ["a", "b"], "mode": ["text", "text+neighbors"]}):
        plain = model.sample(**asked, batch_size=2, steps=2)
        assert plain.attribution is None
        for measure in ("weights", "removal"):
            out = model.sample(**asked, batch_size=2, steps=2, attribution=measure)
            assert torch.equal(out.images, plain.images)
            assert torch.equal(out.latents, plain.latents)
    hooks = [m._forward_pre_hooks for m in model.denoiser.modules()]
    assert not any(hooks)  # nothing of it is left


@pytest.mark.parametrize("measure", MEASURES)
def test_paths_agree_and_shares_sum_to_one(measure):
    model, found = built(unet()), []
    for path in PATHS:
        use_path(model.denoiser.network, path)
        found.append(model.sample(n=3, steps=1, attribution=measure).attribution)
    for attribution in found:
        weights = attribution.weights
        assert weights.shape == (3, 4, 8, 8)
        assert attribution.measure == measure
        torch.testing.assert_close(weights.sum(1), torch.ones(3, 8, 8))
        assert float(weights.min()) >= 0
        assert float(weights.std()) > 1e-3  # and not all alike
        torch.testing.assert_close(attribution.grid, found[0].grid, atol=1e-4, rtol=1e-3)


def by_hand(network, measure: str, x: Tensor, tokens: Tokens, module, shape) -> Tensor:
    """Shares (b, n, k) of one layer from its formula in float64: tokens are really taken away."""
    del network
    w, x = module.weights.to(torch.float64), x.double()
    values = tokens.values.double()
    attention = reference_weights(x, values, w, shape)
    if measure == "weights":
        return attention.mean(1)
    whole = reference_attention(x, values, w, shape)
    norms = []
    for j in range(values.shape[-2]):
        if measure == "removal":
            others = [i for i in range(values.shape[-2]) if i != j]
            norms.append((reference_attention(x, values[:, others], w, shape) - whole).norm(dim=-1))
        else:
            v = (values[:, j] @ w.value.T).view(len(x), w.heads, -1)
            mixed = torch.einsum("bhn,bhe->bnhe", attention[..., j], v).flatten(2)
            norms.append((mixed @ w.out.T).norm(dim=-1))
    found = torch.stack(norms, -1)
    return found / found.sum(-1, keepdim=True)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("measure", MEASURES)
def test_a_layer_is_recorded_as_its_formula_says(measure, path):
    torch.manual_seed(0)
    module = NeighborAttention(32, 12, 4, path=path)
    torch.nn.init.normal_(module.to_q.weight, std=0.5)
    torch.nn.init.normal_(module.norm.bias, std=0.5)
    x, tokens = torch.randn(2, 16, 32), Tokens(torch.randn(2, 3, 12))
    with torch.no_grad(), recording([module], 2, (4, 4), measure) as recorder:
        module(x, module.prepare(tokens), (4, 4))
    expected = by_hand(None, measure, x, tokens, module, (4, 4)).mT.unflatten(-1, (4, 4))
    torch.testing.assert_close(recorder.shares, expected.float(), atol=2e-5, rtol=1e-3)
    assert recorder.evaluations == 1


@pytest.mark.parametrize("path", PATHS)
def test_masked_tokens_null_rows_and_regions(path):
    torch.manual_seed(0)
    module = NeighborAttention(32, 12, 4, path=path)
    values = torch.randn(2, 4, 3, 12)  # four regions
    mask = torch.ones(2, 4, 3, dtype=torch.bool)
    mask[0, 0, 1] = False
    mask[1, 3] = False
    context = Context({"a": Tokens(values, mask)})
    joined = Context.cat([context, context.zeros()]).streams["a"]
    x = torch.randn(4, 16, 32)
    for measure in MEASURES:
        with torch.no_grad(), recording([module], 2, (8, 8), measure) as recorder:
            module(x, module.prepare(joined), (4, 4))
        shares = recorder.shares
        assert shares.shape == (2, 3, 8, 8)  # the null branch is left out
        assert not shares[0, 1, :4, :4].any()  # the masked token of the first region
        torch.testing.assert_close(shares[0].sum(0), torch.ones(8, 8))
        assert not shares[1, :, 4:, 4:].any()  # the region that attends to nothing
        assert (shares[0, :, 4:, 4:] > 0).all()


def test_a_single_neighbor_has_everything():
    out = built().sample(n=2, k=1, attribution=True)
    assert torch.equal(out.attribution.weights, torch.ones(2, 1, 8, 8))
    hidden = torch.tensor([[True], [False]])
    module = NeighborAttention(32, 12, 4)
    x, tokens = torch.randn(2, 16, 32), Tokens(torch.randn(2, 1, 12), hidden)
    with torch.no_grad():
        weights = module.attention_weights(x, module.prepare(tokens))
    assert torch.equal(weights, reference_weights(x, tokens, module.weights))


def test_an_evaluation_counts_as_much_as_any_other():
    torch.manual_seed(0)
    module = NeighborAttention(32, 12, 4)
    tokens = module.prepare(torch.randn(1, 3, 12))
    xs = torch.randn(3, 1, 16, 32)
    each = []
    with torch.no_grad():
        for x in xs:
            with recording([module], 1, (4, 4)) as recorder:
                module(x, tokens, (4, 4))
            each.append(recorder.shares)
        with recording([module], 1, (4, 4)) as recorder:
            for x in xs:
                module(x, tokens, (4, 4))
    assert recorder.evaluations == 3
    torch.testing.assert_close(recorder.shares, torch.stack(each).mean(0))


@pytest.mark.parametrize("guidance", [1.0, 3.0, Interval(ClassifierFree(3.0), 0.1, 10.0)], ids=str)
def test_the_null_branch_takes_no_part(guidance):
    """A learned null attends to tokens of its own; only rows of the condition are recorded."""
    model = built(small_network(), LearnedNull(NeighborEmbeddings("raw"), dim=8), guidance)
    plain = model.sample(n=3)
    out = model.sample(n=3, attribution=True)
    assert torch.equal(out.images, plain.images)
    torch.testing.assert_close(out.attribution.weights.sum(1), torch.ones(3, 8, 8))
    alone = model.sample(n=3, steps=1, guidance=1.0, attribution=True).attribution
    guided = model.sample(n=3, steps=1, guidance=7.0, attribution=True).attribution
    torch.testing.assert_close(alone.grid, guided.grid)  # the first step's x is the same


def test_prompts_are_told_apart_from_neighbors():
    asked = {"prompts": ["a", "b", "c"], "mode": ["text", "text+neighbors", "neighbors"]}
    out = built().sample(**asked, attribution="weights", batch_size=2)
    attribution = out.attribution
    query, near = (attribution.streams[name] for name in ("query", "neighbors"))
    torch.testing.assert_close(query + near, torch.ones(3, 8, 8))
    assert (query[0] == 1).all()
    assert (query[2] == 0).all()
    assert ((query[1] > 0) & (query[1] < 1)).all()
    sums = attribution.weights.sum(1)
    assert not sums[0].any()  # no neighbors at all
    torch.testing.assert_close(sums[1:], torch.ones(2, 8, 8))
    assert not attribution.weights[1, 0].any()  # its first column is the prompt
    assert out.neighbors.indices[1, 0] == -1


def test_streams_of_a_query_are_told_apart():
    torch.manual_seed(0)
    widths = {"query": 8, "neighbors": 8}
    network = DiT(shape=(1, 8, 8), patch=4, width=16, depth=1, heads=2, widths=widths)
    out = built(network, QueryAndNeighbors("raw")).sample(n=2, attribution="weights")
    assert set(out.attribution.streams) == {"query", "neighbors"}
    torch.testing.assert_close(sum(out.attribution.streams.values()), torch.ones(2, 8, 8))
    torch.testing.assert_close(out.attribution.weights.sum(1), torch.ones(2, 8, 8))


def test_batches_are_put_in_order():
    model = built()
    prompts = ["a", "b", "c", "d", "e"]
    modes = ["text", "neighbors", "text", "text+neighbors", "neighbors"]
    whole = model.sample(prompts=prompts, mode=modes, attribution=True).attribution
    parts = model.sample(prompts=prompts, mode=modes, attribution=True, batch_size=1).attribution
    torch.testing.assert_close(whole.grid, parts.grid, atol=1e-5, rtol=1e-4)
    assert len(whole) == 5
    some = whole.rows(torch.tensor([3, 1]))
    assert torch.equal(some.weights, whole.weights[[3, 1]])
    assert whole == whole.rows(torch.arange(5))


def test_a_compiled_network_runs_uncompiled_meanwhile():
    model = built()
    plain = model.sample(n=1)
    model.compile(backend="eager")
    out = model.sample(n=1, attribution=True)
    torch.testing.assert_close(out.images, plain.images, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.attribution.weights.sum(1), torch.ones(1, 8, 8))


def test_networks_without_neighbors_are_refused_in_one_line():
    plain = DiT(shape=(1, 8, 8), patch=4, width=16, depth=1, heads=2, widths={})
    cases = [
        (built(plain, Unconditional()), "attends to neighbors, which EDMDenoiser does not"),
        (
            built(small_network(stream="query"), QueryOnly("raw")),
            r"a token for each neighbor, but the conditioner makes streams \{'query': 1\}",
        ),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            model.sample(prompts=["a"], mode="text", attribution=True)
        assert "\n" not in str(error.value)
        assert "leave attribution out" in str(error.value)
    with pytest.raises(ValueError, match="attribution='all': give True, False, or one of weights"):
        built().sample(n=1, attribution="all")
    with pytest.raises(ValueError, match="measure='all' is none of weights"):
        Recorder(1, (2, 2), "all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no attention was recorded"):
        _ = Recorder(1, (2, 2)).shares
    with pytest.raises(ValueError, match="no attribution: sample"):
        attribution_sheet(built().sample(n=1))


def test_a_folder_of_samples_has_a_picture_and_shares(tmp_path):
    out = built().sample(prompts=["a", "b"], mode="text+neighbors", attribution=True)
    folder = out.save(tmp_path / "out")
    with Image.open(folder / "attribution.png") as sheet:
        colors = {color for _, color in sheet.convert("RGB").getcolors(1 << 24)}
    framed = [tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in COLORS[1:4]]
    assert set(framed) <= colors  # column 0 is the prompt
    told = json.loads((folder / "generation.json").read_text())["images"][1]["neighbors"]
    assert told[0]["share"] == 0
    assert sum(one["share"] for one in told) == pytest.approx(1, abs=1e-5)
    out.save(tmp_path / "out", overwrite=True)
    built().sample(n=1).save(tmp_path / "out", overwrite=True)
    assert not (folder / "attribution.png").exists()


def test_the_larger_share_gives_the_color():
    out = built().sample(n=1, attribution=True)
    grid = torch.zeros(1, 4, 8, 8)
    grid[0, 0, :, :4], grid[0, 2, :, 4:] = 1, 1
    object.__setattr__(out.attribution, "grid", grid)
    sheet = attribution_sheet(out, [0], side=64)
    left, right = (sheet.getpixel((x, 6 + 64 + 14 + 6 + 32)) for x in (10, 64))
    for found, color in ((left, COLORS[0]), (right, COLORS[2])):
        expected = torch.tensor([int(color[i : i + 2], 16) for i in (1, 3, 5)]).float()
        pixel = torch.tensor(found).float()
        assert float(torch.cosine_similarity(pixel, expected, 0)) > 0.99


def test_queries_of_several_regions():
    query = Query(torch.randn(2, 4, 8))
    out = built(unet()).sample(query=query, attribution=True)
    assert out.neighbors.indices.shape == (2, 4, 4)
    torch.testing.assert_close(out.attribution.weights.sum(1), torch.ones(2, 8, 8))
