"""Autoregressive checkpoints in the published layout, in small: names, numbers, and presets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from published_files import write_checkpoint
from torch import Tensor

from retrodiff import presets
from retrodiff.builder import Builder
from retrodiff.checkpoints import (
    PUBLISHED_TOKENS,
    PublishedTransformer,
    TokenArchitecture,
    load_compvis,
    load_published,
)
from retrodiff.checkpoints.foreign.compvis import read_config
from retrodiff.checkpoints.foreign.tensor_names import published_autoencoder
from retrodiff.checkpoints.foreign.transfer import their_names
from retrodiff.cli import main
from retrodiff.interfaces import Query
from retrodiff.model import Model

QUIET = {"progress": False}
HEADS, EACH, DEPTH, CODES, SIDE, CONTEXT = 2, 8, 2, 20, 4, 512
WIDTH = HEADS * EACH


def configuration() -> dict[str, Any]:
    """The keys of a released yaml with small numbers."""
    graph = {
        "double_z": False, "z_channels": 6, "resolution": 8, "in_channels": 3, "out_ch": 3,
        "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [4], "dropout": 0.0,
    }  # fmt: skip
    transformer = {
        "in_channels": CODES + 2, "n_heads": HEADS, "d_head": EACH, "depth": DEPTH,
        "context_dim": CONTEXT, "positional_encodings": True, "sequence_length": SIDE**2,
        "out_channels": CODES, "cross_attend": True, "causal": True, "continuous": False,
    }  # fmt: skip
    encoders = "rdm.modules.encoders.nn_encoders"
    params = {
        "mask_token": CODES,
        "sos_token": CODES + 1,
        "p_mask_max": 0.0,
        "nn_key": "nn_embeddings",
        "nn_memory": "nn_memory/oi_imagenet-dogs.p",
        "nn_reshaper_cfg": {"target": f"{encoders}.CLIPEmbeddingReshaper"},
        "nn_encoder_cfg": {"target": f"{encoders}.IdentityEncoder"},
        "transformer_config": {
            "target": "rdm.modules.attention.RetrievalPatchTransformer",
            "params": transformer,
        },
        "first_stage_config": {
            "target": "taming.models.vqgan.VQModel",
            "params": {
                "embed_dim": 6, "n_embed": CODES, "monitor": "val/rec_loss", "ddconfig": graph,
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        "retrieval_cfg": {"target": "rdm.data.DatasetBuilder", "params": {"k": 20}},
        "cond_stage_config": "__is_unconditional__",
    }  # fmt: skip
    target = "rdm.models.autoregression.transformer.LatentImageRETRO"
    model = {"base_learning_rate": 5e-6, "target": target, "params": params}
    return {"model": model, "data": {"target": "main.DataModuleFromConfig"}}


def transformer_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the transformer's tensors, as released; written out independently."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.proj_in.weight": (CODES + 2, WIDTH),
        "transformer.positional_encoding": (WIDTH, SIDE**2),
        "transformer.proj_out.weight": (CODES, WIDTH, 1),
        "transformer.proj_out.bias": (CODES,),
    }
    for i in range(DEPTH):
        block = f"transformer.transformer_blocks.{i}"
        for name, width in (("attn1", WIDTH), ("attn2", CONTEXT)):
            shapes[f"{block}.{name}.to_q.weight"] = (WIDTH, WIDTH)
            shapes[f"{block}.{name}.to_k.weight"] = (WIDTH, width)
            shapes[f"{block}.{name}.to_v.weight"] = (WIDTH, width)
            shapes[f"{block}.{name}.to_out.0.weight"] = (WIDTH, WIDTH)
            shapes[f"{block}.{name}.to_out.0.bias"] = (WIDTH,)
        shapes[f"{block}.ff.net.0.proj.weight"] = (8 * WIDTH, WIDTH)
        shapes[f"{block}.ff.net.0.proj.bias"] = (8 * WIDTH,)
        shapes[f"{block}.ff.net.2.weight"] = (WIDTH, 4 * WIDTH)
        shapes[f"{block}.ff.net.2.bias"] = (WIDTH,)
        for norm in ("norm1", "norm2", "norm3"):
            shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (WIDTH,)
    return shapes


def state() -> dict[str, Tensor]:
    """All tensors of such a file."""
    seeded = torch.Generator().manual_seed(0)
    found = {k: torch.randn(s, generator=seeded) / 4 for k, s in transformer_shapes().items()}
    _, autoencoder = read_config(configuration()).build()
    names = their_names(autoencoder, published_autoencoder(autoencoder.config()))
    for own, tensor in autoencoder.state_dict().items():
        values = torch.randn(tensor.shape, generator=seeded) / 4
        if ".to_" in own and values.ndim == 2:
            values = values[:, :, None, None]
        found[f"first_stage_model.{names[own]}"] = values
    found["sos_token"] = torch.tensor([CODES + 1])
    found["mask_token"] = torch.tensor([CODES])
    found["first_stage_model.loss.discriminator.main.0.weight"] = torch.zeros(2, 2)
    return found


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    return partial(write_checkpoint, tmp_path / "model.ckpt")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> TokenArchitecture:
    """The published models with the numbers of the small file."""
    architecture = replace(read_config(configuration()), scale="raw")
    assert isinstance(architecture, TokenArchitecture)
    for name in PUBLISHED_TOKENS:
        monkeypatch.setitem(PUBLISHED_TOKENS, name, replace(architecture, name=name))
    return architecture


def test_every_tensor_arrives(save: Callable[..., Path]) -> None:
    tensors = state()
    found = load_compvis(save(tensors), configuration())
    assert isinstance(found, PublishedTransformer)
    net = found.transformer
    assert len(net.state_dict()) == len(transformer_shapes())
    assert torch.equal(net.embed.weight, tensors["transformer.proj_in.weight"])
    assert torch.equal(net.positional_encoding, tensors["transformer.positional_encoding"])
    assert torch.equal(net.out.weight, tensors["transformer.proj_out.weight"][..., 0])
    block: Any = net.blocks[1]
    for ours, theirs in (
        (block.self_attention.norm.weight, "norm1.weight"),
        (block.self_attention.to_out.bias, "attn1.to_out.0.bias"),
        (block.cross_attention.to_k.weight, "attn2.to_k.weight"),
        (block.cross_attention.norm.bias, "norm2.bias"),
        (block.feed_forward.norm.bias, "norm3.bias"),
        (block.feed_forward.expand.weight, "ff.net.0.proj.weight"),
        (block.feed_forward.reduce.bias, "ff.net.2.bias"),
    ):
        assert torch.equal(ours, tensors[f"transformer.transformer_blocks.1.{theirs}"])
    book = tensors["first_stage_model.quantize.embedding.weight"]
    assert torch.equal(found.autoencoder.codebook.weight, book)
    assert (found.scale, found.name, found.weights) == (None, None, "raw")
    assert not net.training
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert found.autoencoder.codes(images).shape == (2, SIDE, SIDE)
    half = load_compvis(save(tensors), configuration(), dtype=torch.bfloat16)
    assert half.autoencoder.dtype == torch.bfloat16


def test_the_published_architecture_is_that_of_the_paper() -> None:
    architecture = PUBLISHED_TOKENS["rarm_dogs"]
    with torch.device("meta"):
        transformer, autoencoder = architecture.build()
    assert sum(p.numel() for p in transformer.parameters()) == 230_874_112
    assert autoencoder.factor == 16
    assert autoencoder.codebook.weight.shape == (16384, 256)
    assert list(PUBLISHED_TOKENS) == ["rarm_dogs", "rarm_mammals", "rarm_animals"]


def test_a_released_yaml_gives_the_published_numbers() -> None:
    config = configuration()
    params = config["model"]["params"]
    params |= {"mask_token": 16384, "sos_token": 16385}
    params["transformer_config"]["params"] |= {
        "in_channels": 16386, "n_heads": 12, "d_head": 64, "depth": 18, "context_dim": 512,
        "sequence_length": 256, "out_channels": 16384,
    }  # fmt: skip
    stage = params["first_stage_config"]["params"]
    stage |= {"embed_dim": 256, "n_embed": 16384}
    stage["ddconfig"] |= {
        "z_channels": 256, "resolution": 256, "ch": 128, "ch_mult": [1, 1, 2, 2, 4],
        "num_res_blocks": 2, "attn_resolutions": [16],
    }  # fmt: skip
    found, known = read_config(config), PUBLISHED_TOKENS["rarm_dogs"]
    assert found == replace(known, name=None)  # the three differ in their training only


def test_a_first_stage_in_a_file_of_its_own(tmp_path: Path) -> None:
    tensors = state()
    start = "first_stage_model."
    rest = {k: v for k, v in tensors.items() if not k.startswith(start)}
    own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    torch.save({"state_dict": rest}, tmp_path / "transformer.ckpt")
    torch.save({"state_dict": own}, tmp_path / "first.ckpt")
    with pytest.raises(ValueError, match="first_stage="):
        load_compvis(tmp_path / "transformer.ckpt", configuration())
    found = load_compvis(
        tmp_path / "transformer.ckpt", configuration(), first_stage=tmp_path / "first.ckpt"
    )
    assert torch.equal(found.autoencoder.codebook.weight, own["quantize.embedding.weight"])


def without(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if not k.startswith(start)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "adapter.weight": torch.zeros(1)}, r"1 tensors: extra adapter\.weight"),
        (lambda t: without(t, "transformer."), r"has no transformer .*begin with first_stage"),
        (lambda t: without(t, "transformer.proj_out"), r"missing transformer\.proj_out\.weight"),
        (
            lambda t: {**t, "transformer.positional_encoding": torch.zeros(WIDTH, 9)},
            r"positional_encoding has shape \(16, 9\) for \(16, 16\)",
        ),
        (lambda t: {**t, "sos_token": torch.tensor([3])}, r"starts an image with token \[3\]"),
        (
            lambda t: {**t, "transformer.proj_out.bias": torch.full((CODES,), torch.nan)},
            r"not finite .*transformer\.proj_out\.bias",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(
    change: Callable[[Any], Any], message: str, save: Callable[..., Path]
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_compvis(save(change(state())), configuration())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("transformer_config.target", "x.GPT", "its transformer_config is 'x.GPT'"),
        ("transformer_config.params.causal", False, "causal=False, expected True"),
        ("transformer_config.params.cross_attend", False, "cross_attend=False"),
        ("transformer_config.params.continuous", True, "continuous=True"),
        ("transformer_config.params.sequence_length", 15, "sequence_length=15, expected a square"),
        ("transformer_config.params.in_channels", CODES, "in_channels=20, expected more than"),
        ("transformer_config.params.new", 1, "has new, which is not known"),
        ("transformer_config.params.depth", 10**9, "depth=1000000000"),
        ("first_stage_config.params.n_embed", 30, "n_embed=30, expected out_channels=20"),
        ("first_stage_config.target", "ldm.AutoencoderKL", "another model family"),
        ("nn_encoder_cfg", {"target": "rdm.Encoder"}, "expected the neighbors' embeddings as they"),
        ("sos_token", 3, "sos_token=3"),
        ("new", 1, "has new, which is not known"),
    ],
)
def test_a_yaml_that_may_change_numbers_is_refused(path: str, value: Any, message: str) -> None:
    config = copy.deepcopy(configuration())
    *parents, last = path.split(".")
    section = config["model"]["params"]
    for name in parents:
        section = section[name]
    section[last] = value
    with pytest.raises(ValueError, match=message) as error:
        read_config(config)
    assert "\n" not in str(error.value)


# --- presets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rarm_dogs", "rarm_mammals", "rarm_animals"])
def test_presets_build_offline_and_keep_their_numbers(small: Any, name: str) -> None:
    preset = getattr(presets, name)
    model = preset()
    assert model.encoder.dim == 512
    assert not model.encoder.loaded
    made = model.generator
    assert (made.guidance, made.temperature, made.top_k) == (1.0, 1.0, 256)
    assert (model.k, model.steps) == (4, SIDE**2)
    other = preset(guidance=2.0, temperature=0.9, top_k=None, k=2)
    made = other.generator
    assert (made.guidance, made.temperature, made.top_k, other.k) == (2.0, 0.9, None, 2)
    with pytest.raises(TypeError, match=f"{name} has no argument sampler: it takes checkpoint"):
        preset(sampler="ddim")
    one, two = (Builder.from_preset(preset).build().generator.network for _ in range(2))
    assert not torch.equal(one.out.weight, two.out.weight)


def test_a_checkpoint_through_a_preset_samples_saves_and_loads(
    small: Any, save: Callable[..., Path], tmp_path: Path
) -> None:
    path = save(state())
    model = presets.rarm_dogs(checkpoint=path).replace(encoder=None)
    query = Query(torch.randn(2, CONTEXT, generator=torch.Generator().manual_seed(1)))
    out = model.sample(query=query, mode="text", seed=1, **QUIET)
    assert out.images.shape == (2, 3, 8, 8)
    assert out.latents.shape == (2, 1, SIDE, SIDE)
    model.save(tmp_path / "m")
    again = Model.load(tmp_path / "m")
    assert torch.equal(again.sample(query=query, mode="text", seed=1, **QUIET).images, out.images)
    with pytest.raises(ValueError, match=r"sampler='ddim' has no effect") as error:
        model.sample(query=query, mode="text", sampler="ddim", **QUIET)
    assert "\n" not in str(error.value)


def test_fresh_weights_warn(small: Any) -> None:
    model = presets.rarm_animals().replace(encoder=None)
    with pytest.warns(UserWarning, match="fresh weights gives noise"):
        model.sample(query=Query(torch.randn(1, CONTEXT)), mode="text", **QUIET)


def test_one_family_is_not_loaded_as_the_other(small: Any, save: Callable[..., Path]) -> None:
    dogs = load_published(save(state()), preset="rarm_dogs")
    assert (dogs.name, dogs.scale) == ("rarm_dogs", "raw")
    with pytest.raises(ValueError, match=r"is the model rarm_dogs, not rarm_animals"):
        presets.rarm_animals(checkpoint=dogs)
    unnamed = replace(dogs, name=None)
    with pytest.raises(ValueError, match=r"PublishedTransformer, but rdm_ffhq takes a PublishedM"):
        presets.rdm_ffhq(checkpoint=unnamed)
    with pytest.raises(ValueError, match=r"scale='unit' was asked for"):
        presets.from_published(dogs, scale="unit")
    model = presets.from_published(replace(unnamed, scale=None), scale="raw").build()
    assert model.generator.network is dogs.transformer


def test_convert_on_the_command_line(
    small: Any, save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    path = save(state())
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(configuration()))
    code = main(["convert", str(path), str(tmp_path / "m"), "--config", str(config), "--scale=raw"])
    assert code == 0, capsys.readouterr().err
    assert "with its raw weights" in capsys.readouterr().out
    assert Model.load(tmp_path / "m").generator.shape == (1, SIDE, SIDE)
