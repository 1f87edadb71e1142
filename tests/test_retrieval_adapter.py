"""Retrieval adapters on diffusers' networks, tiny and with random weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from parts import HashingEncoder
from torch import nn

from retrodiff.attention import NeighborAttention
from retrodiff.builder import Builder
from retrodiff.databases import ArrayDatabase
from retrodiff.diffusion import (
    ClassifierFree,
    Dropped,
    EDMDenoiser,
    FlowDenoiser,
    NeighborEmbeddings,
)
from retrodiff.interfaces import Context, Fingerprint, Neighbors, Query, Tokens, unit
from retrodiff.networks import Adapted, RetrievalAdapter
from retrodiff.networks.decoupled import OwnQueries
from retrodiff.retrieval import NearestNeighbors
from retrodiff.testing import check_denoiser, small_database
from retrodiff.training import TrainingSet, fit

diffusers = pytest.importorskip("diffusers")

DIM, K = 8, 3


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32),
        layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=12,
        attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip


def sd3():
    torch.manual_seed(0)
    made = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=3, out_channels=3, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=8,
        qk_norm="rms_norm",
    ).eval()  # fmt: skip
    return loud(made)


def flux():
    torch.manual_seed(0)
    made = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    return loud(made)


def loud(network):
    """All weights random: at their start, such networks do not depend on their attention."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return network


def inputs(name, rows=2):
    """Arguments of a network."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(rows, 5, 12, generator=generator)
    pooled = torch.randn(rows, 10, generator=generator)
    x = torch.randn(rows, 3, 8, 8, generator=generator)
    times = torch.full((rows,), 300.0)
    if name == "unet":
        return {"sample": x, "timestep": times, "encoder_hidden_states": text}
    given = {"timestep": times, "encoder_hidden_states": text, "pooled_projections": pooled}
    if name == "sd3":
        return {"hidden_states": x, **given}
    places = torch.randn(16, 3, generator=generator).round()
    return {
        "hidden_states": torch.randn(rows, 16, 4, generator=generator),
        "img_ids": places, "txt_ids": torch.zeros(5, 3), **given,
    }  # fmt: skip


BASES = {"unet": unet, "sd3": sd3, "flux": flux}


def output(network, name, rows=2, **more):
    with torch.no_grad():
        return network(**inputs(name, rows), return_dict=False, **more)[0]


def trained(adapter, seed=3):
    """As after a training: every weight of its own is something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter.weights().values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return adapter


def near(rows=2, k=K, seed=2):
    return torch.randn(rows, k, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=BASES)
def name(request):
    return request.param


# --- what it computes ----------------------------------------------------------------------------


def test_untrained_it_is_the_base_bit_for_bit(name):
    base = BASES[name]()
    before = output(base, name)
    adapter = RetrievalAdapter(base, DIM)
    assert torch.equal(output(adapter, name, neighbors=near()), before)
    assert torch.equal(output(adapter, name), before)
    assert not any(p.requires_grad for p in base.parameters())


def test_trained_it_depends_on_neighbors_and_without_them_it_is_the_base(name):
    base = BASES[name]()
    before = output(base, name)
    adapter = trained(RetrievalAdapter(base, DIM))
    one, other = (output(adapter, name, neighbors=near(seed=s)) for s in (2, 3))
    assert not torch.allclose(one, before, atol=1e-4)
    assert not torch.allclose(one, other, atol=1e-4)
    for nothing in (
        torch.zeros(2, K, DIM),
        Tokens(near()).zeros(),
        Tokens(near(), torch.zeros(2, K, dtype=torch.bool)),
    ):
        assert torch.allclose(output(adapter, name, neighbors=nothing), before, atol=1e-6)
    assert torch.equal(output(base, name), before)  # and by itself it stays what it was


def test_the_unet_is_that_of_diffusers_ip_adapter():
    """Its processor adds before the layer's output projection; ours then has the same weights."""
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    base, values = unet(), near()
    adapter = trained(RetrievalAdapter(base, DIM))
    theirs, processors = copy.deepcopy(base), {}
    for where in theirs.attn_processors:
        layer = where.removesuffix(".processor")
        if layer not in adapter.names:
            processors[where] = AttnProcessor2_0()
            continue
        mine = adapter.layers[adapter.names.index(layer)]
        with torch.no_grad():
            mine.to_out.weight.copy_(base.get_submodule(layer).to_out[0].weight)
        width = mine.to_k.out_features
        made = IPAdapterAttnProcessor2_0(width, DIM, num_tokens=[K])
        made.to_k_ip[0].weight = mine.to_k.weight
        made.to_v_ip[0].weight = mine.to_v.weight
        processors[where] = WithNeighbors(made, values)
    theirs.set_attn_processor(processors)
    assert all(isinstance(layer, NeighborAttention) for layer in adapter.layers)
    expected = output(theirs, "unet")
    for path in (None, "absorbed", "standard"):
        for layer in adapter.layers:
            layer.path = path
        assert torch.allclose(output(adapter, "unet", neighbors=values), expected, atol=2e-5)


class WithNeighbors(nn.Module):
    """diffusers' processor, handed neighbors in the place of an encoded picture."""

    def __init__(self, inner, neighbors):
        super().__init__()
        self.inner, self.neighbors = inner, neighbors

    def forward(self, attn, hidden_states, encoder_hidden_states=None, **more):
        both = (encoder_hidden_states, [self.neighbors])
        return self.inner(attn, hidden_states, encoder_hidden_states=both, **more)


@pytest.mark.parametrize("base", ["sd3", "flux"])
def test_a_joint_layer_is_the_formula(base):
    adapter = trained(RetrievalAdapter(BASES[base](), DIM)).double()
    layer, place = adapter.layers[0], adapter._places[0].attention
    assert isinstance(layer, OwnQueries)
    y = torch.randn(2, 16, place.to_q.in_features, dtype=torch.float64)
    values = near().double()
    mask = torch.tensor([[True, False, True], [True, True, True]])
    with torch.no_grad():
        found = layer(y, layer.prepare(Tokens(values, mask)))
        q = y @ place.to_q.weight.T + place.to_q.bias
        q = q.unflatten(-1, (layer.heads, -1))
        if place.norm_q is not None:
            q = q * (q.square().mean(-1, keepdim=True) + place.norm_q.eps).rsqrt()
            q = q * place.norm_q.weight
        keys = (values @ layer.to_k.weight.T).unflatten(-1, (layer.heads, -1))
        held = (values @ layer.to_v.weight.T).unflatten(-1, (layer.heads, -1))
        scores = torch.einsum("bnhe,bkhe->bhnk", q, keys) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~mask[:, None, None], -math.inf).softmax(-1)
        expected = torch.einsum("bhnk,bkhe->bnhe", weights, held).flatten(2)
        expected = expected @ layer.to_out.weight.T
    assert torch.allclose(found, expected, atol=1e-12)


@torch.no_grad()
def test_what_a_block_adds_ends_with_it(name):
    base = BASES[name]()
    adapter = trained(RetrievalAdapter(base, DIM))
    before = output(base, name)
    full = output(adapter, name, neighbors=near())
    with adapter.attending(near()):
        assert torch.equal(output(base, name), full)  # as a pipeline calls it
    with adapter.attending(near(), strength=0):
        assert torch.equal(output(base, name), before)
    with pytest.raises(ZeroDivisionError), adapter.attending(near()):
        raise ZeroDivisionError
    assert torch.equal(output(base, name), before)


def test_guidance_gives_neighbors_to_the_second_half_only():
    adapter = trained(RetrievalAdapter(unet(), DIM))
    before = output(adapter.base, "unet", rows=4)
    with adapter.attending(near(2), guidance=True):
        both = output(adapter.base, "unet", rows=4)
    assert torch.allclose(both[:2], before[:2], atol=1e-6)
    alone = torch.cat([near(2), near(2)])
    assert torch.allclose(both[2:], output(adapter, "unet", rows=4, neighbors=alone)[2:], atol=1e-5)
    assert not torch.allclose(both[2:], before[2:], atol=1e-3)


def test_no_neighbor_reaches_another_row():
    adapter = trained(RetrievalAdapter(unet(), DIM))
    values = near(2)
    changed = torch.stack([values[0], -values[1]])
    one, other = (output(adapter, "unet", neighbors=v) for v in (values, changed))
    assert torch.equal(one[0], other[0])
    assert not torch.allclose(one[1], other[1], atol=1e-3)


def test_what_was_retrieved_is_brought_to_its_scale():
    values = near()
    found = Neighbors(torch.zeros(2, K, dtype=torch.int64), torch.zeros(2, K), values)
    for scale, expected in (("unit", unit(values)), ("raw", values)):
        adapter = trained(RetrievalAdapter(unet(), DIM, scale=scale))
        one = output(adapter, "unet", neighbors=found)
        assert torch.equal(one, output(adapter, "unet", neighbors=expected))


# --- training ------------------------------------------------------------------------------------


def toy():
    """Images of one color each, and a database of such: neighbors say which color an image has."""
    encoder = HashingEncoder(DIM)

    def colors(n, seed):
        drawn = torch.rand(n, 3, 1, 1, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        return drawn.expand(-1, 3, 8, 8).clone()

    database = ArrayDatabase(encoder.encode_image(colors(80, 5)), encoder.fingerprint)
    images = colors(64, 6)
    data = TrainingSet.of(images, encoder, database, NearestNeighbors(), 2, progress=False)
    return encoder, database, data


def model_of(network, denoiser, encoder, database):
    return (
        Builder()
        .encoder(encoder)
        .database(database)
        .conditioner(Dropped(NeighborEmbeddings("raw"), 0.1))
        .denoiser(denoiser(network))
        .guidance(ClassifierFree(1.5))
        .defaults(k=2, steps=2)
        .build()
    )


def test_fit_trains_the_adapter_alone_and_the_loss_falls(tmp_path):
    encoder, database, data = toy()
    base = unet()
    adapter = RetrievalAdapter(base, DIM, scale="raw", fingerprint=encoder.fingerprint)
    text = torch.zeros(1, 5, 12)
    network = Adapted(adapter, (3, 8, 8), {"encoder_hidden_states": text})
    model = model_of(network, EDMDenoiser, encoder, database)
    before = {n: p.clone() for n, p in model.denoiser.network.adapter.base.named_parameters()}
    file = tmp_path / "state.safetensors"
    settings = {"batch_size": 16, "lr": 1e-2, "ema": 0.5, "progress": False, "checkpoint": file}
    before_own, before_other = at_one_noise(model, data)
    assert before_own == before_other
    result = fit(model, data, steps=40, **settings)
    own, other = at_one_noise(result.model, data)
    assert own < 0.7 * before_own, (own, before_own)
    assert own < 0.7 * other, (own, other)  # it follows its neighbors: those of others cost more
    learned = result.model.denoiser.network.adapter
    for name, parameter in learned.base.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert all(tensor.any() for tensor in learned.weights().values())
    untouched = model.denoiser.network.adapter.weights()
    assert not any(t.any() for n, t in untouched.items() if n.endswith("to_out.weight"))
    assert file.stat().st_size < 12 * sum(t.nbytes for t in untouched.values())  # no base in it
    out = result.model.sample(images=data.images[:8], seed=1)
    assert out.images.isfinite().all()

    saved = learned.save(tmp_path / "adapter.safetensors")
    again = RetrievalAdapter.load(saved, unet(), encoder=encoder)
    assert torch.equal(
        output(again, "unet", neighbors=near()), output(learned, "unet", neighbors=near())
    )
    assert (again.scale, again.fingerprint) == ("raw", encoder.fingerprint)


def at_one_noise(model, data):
    """Mean loss with an image's own neighbors, and with those of another."""
    images = data.images[torch.arange(64)]
    losses = []
    for shift in (0, 17):
        rows = torch.arange(64).roll(shift)
        tokens = data.database.embeddings(data.table[rows])
        with torch.no_grad():
            found = model.denoiser.loss(
                images,
                torch.full((64,), 1.5),
                torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(8)),
                Context.of(tokens),
            )
        losses.append(found.mean().item())
    return losses


def test_a_transformer_is_trained_and_sampled():
    encoder, database, data = toy()
    adapter = RetrievalAdapter(sd3(), DIM, scale="raw")
    more = {
        "encoder_hidden_states": torch.zeros(1, 5, 12),
        "pooled_projections": torch.zeros(1, 10),
    }
    network = Adapted(adapter, (3, 8, 8), more)
    model = model_of(network, FlowDenoiser, encoder, database)
    result = fit(model, data, steps=3, batch_size=8, lr=1e-2, ema=0.5, progress=False)
    learned = result.model.denoiser.network.adapter
    assert any(not torch.equal(a, b) for a, b in zip(
        learned.weights().values(), model.denoiser.network.adapter.weights().values(), strict=True
    ))  # fmt: skip
    assert result.model.sample(images=data.images[:8]).images.shape == (8, 3, 8, 8)


def test_it_is_a_denoiser_like_others():
    adapter = trained(RetrievalAdapter(unet(), DIM))
    network = Adapted(adapter, (3, 8, 8), {"encoder_hidden_states": torch.randn(1, 5, 12)})
    check_denoiser(EDMDenoiser(network))


def test_a_half_precision_base_has_a_half_precision_adapter():
    base = unet().to(torch.bfloat16)
    adapter = RetrievalAdapter(base, DIM)
    assert {tensor.dtype for tensor in adapter.weights().values()} == {torch.bfloat16}
    given = {n: t.bfloat16() if t.ndim > 1 else t for n, t in inputs("unet").items()}
    with torch.no_grad():
        before = base(**given).sample
        assert torch.equal(adapter(**given, neighbors=near()).sample, before)


# --- files and refusals --------------------------------------------------------------------------


def test_save_and_load_are_exact_and_hold_no_base(name, tmp_path):
    adapter = trained(RetrievalAdapter(BASES[name](), DIM))
    file = adapter.save(tmp_path / "a.safetensors")
    again = RetrievalAdapter.load(file, BASES[name]())
    assert torch.equal(
        output(again, name, neighbors=near()), output(adapter, name, neighbors=near())
    )
    held = sum(tensor.nbytes for tensor in adapter.weights().values())
    assert held < file.stat().st_size < held + 4096
    assert again.fingerprint is None


def test_files_of_others_are_refused(tmp_path):
    from safetensors.torch import save_file

    file = RetrievalAdapter(unet(), DIM).save(tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"another network \(UNet2DConditionModel\): .* on this SD3"
    ):
        RetrievalAdapter.load(file, sd3())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        RetrievalAdapter.load(file, unet())
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="SHA-256"):
        RetrievalAdapter.load(tmp_path / "b.safetensors", unet())
    with pytest.raises(FileNotFoundError):
        RetrievalAdapter.load(tmp_path / "none.safetensors", unet())


def test_another_encoder_is_refused(tmp_path):
    encoder = HashingEncoder(DIM)
    adapter = RetrievalAdapter(unet(), DIM, fingerprint=encoder.fingerprint)
    file = adapter.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"the encoder is not that of .*: weights='1' against"):
        RetrievalAdapter.load(file, unet(), encoder=HashingEncoder(DIM, seed=1))
    mark = Fingerprint(encoder="x", weights="", preprocessing="", dim=9)
    with pytest.raises(ValueError, match="dim=8 does not match the embeddings of x"):
        RetrievalAdapter(unet(), DIM, fingerprint=mark)


def test_networks_and_neighbors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="Linear has no cross-attention or joint attention layers"):
        RetrievalAdapter(nn.Linear(2, 2), DIM)
    unconditional = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(4, 8), norm_num_groups=2, attention_head_dim=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="UNet2DModel has no cross-attention"):
        RetrievalAdapter(unconditional, DIM)
    adapter = RetrievalAdapter(unet(), DIM)
    with pytest.raises(ValueError, match="the neighbors are 9 wide, but the adapter takes 8"):
        output(adapter, "unet", neighbors=torch.zeros(2, 1, 9))
    with pytest.raises(ValueError, match=r"shape \(2, 4, 3, 8\) are given, but the adapter takes"):
        output(adapter, "unet", neighbors=torch.zeros(2, 4, 3, 8))
    with pytest.raises(ValueError, match="called with 2 rows, but neighbors are given for 3"):
        output(adapter, "unet", neighbors=near(3))
    with adapter.attending(near()), pytest.raises(ValueError, match="attends to neighbors already"):
        output(adapter, "unet", neighbors=near())
    with pytest.raises(ValueError, match="not prepared yet"):
        adapter.attending(adapter.prepare(near()), guidance=True).__enter__()
    with pytest.raises(ValueError, match="strength=-1"):
        adapter.attending(near(), strength=-1).__enter__()
    adapter.base.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="gradient checkpointing computes the base again"):
        adapter(**inputs("unet"), neighbors=near())
    assert output(adapter, "unet", neighbors=near()).isfinite().all()  # nothing is computed again
    with pytest.raises(ValueError, match="scale='cosine' is neither"):
        RetrievalAdapter(unet(), DIM, scale="cosine")


def test_inputs_that_the_base_does_not_take_are_refused():
    adapter = RetrievalAdapter(unet(), DIM)
    with pytest.raises(ValueError, match="UNet2DConditionModel takes no 'pooled' beside latents"):
        Adapted(adapter, (3, 8, 8), {"pooled": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match="encoder_hidden_states has 2 rows: give one"):
        Adapted(adapter, (3, 8, 8), {"encoder_hidden_states": torch.zeros(2, 5, 12)})
    network = Adapted(adapter, (3, 8, 8), {"encoder_hidden_states": torch.zeros(1, 5, 12)})
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 8, 8\), the network takes"):
        network(torch.zeros(1, 4, 8, 8), torch.zeros(1), Context.of(near(1)))
    with pytest.raises(ValueError, match="streams of widths"):
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1), Context.of(torch.zeros(1, 2, 9)))


def test_its_neighbors_are_those_of_a_database():
    database = small_database(dim=DIM)
    found = NearestNeighbors().retrieve(Query(torch.randn(2, DIM)), database, K)
    adapter = trained(RetrievalAdapter(unet(), DIM, fingerprint=database.fingerprint))
    assert output(adapter, "unet", neighbors=found).isfinite().all()
