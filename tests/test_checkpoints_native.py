"""A model as a folder: it comes back the same, or the damage is named."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import HashingEncoder, small_network
from safetensors.torch import load_file, save_file

from retrodiff.checkpoints.descriptions import arguments
from retrodiff.checkpoints.public import ALIASES, ROOMS, class_named, public_name
from retrodiff.checkpoints.public import _public as public
from retrodiff.databases import Images, Subset, Union, build_database
from retrodiff.diffusion import (
    DDIM,
    ClassifierFree,
    EDMDenoiser,
    Interval,
    NeighborEmbeddings,
)
from retrodiff.interfaces import Fingerprint
from retrodiff.model import Model
from retrodiff.networks import PrincipalPatches
from retrodiff.networks.dit import DiT
from retrodiff.retrieval import (
    ExcludeSelf,
    MultiQuery,
    NearestNeighbors,
    NeighborCounts,
    ReciprocalRankFusion,
)

QUIET = {"progress": False}


def test_a_saved_model_samples_the_same(model, database, tmp_path):
    proposal = NeighborCounts(torch.tensor([1, 5]), torch.tensor([3, 1]), database.fingerprint)
    model = model.replace(proposal=proposal)
    model.save(tmp_path / "model")
    again = Model.load(tmp_path / "model", encoder=model.encoder, database=database)
    for asked in ({"prompts": ["a"]}, {"n": 2}):
        a, b = (m.sample(**asked, **QUIET).images for m in (model, again))
        assert torch.equal(a, b)
    assert again.sampler == model.sampler
    assert again.conditioner == model.conditioner


def test_a_component_of_ones_own_must_be_handed_in_again(model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"HashingEncoder.*never imported.*encoder=\.\.\."):
        Model.load(tmp_path / "model")


@pytest.mark.parametrize("kind", ["Union", "Subset"])
def test_a_database_that_is_not_kept_is_said_once(kind, model, database, tmp_path, recwarn):
    model.save(tmp_path / "in_memory")  # evidently nowhere to be opened again from
    assert not recwarn.list
    some = Union(database) if kind == "Union" else Subset(database, torch.arange(20))
    mine = model.replace(database=some)
    with pytest.warns(UserWarning, match=rf"a {kind} has no folder.*database=\.\.\.") as said:
        mine.save(tmp_path / "model")
    assert [Path(w.filename).name for w in said] == [Path(__file__).name]
    assert "\n" not in str(said[0].message)
    assert Model.load(tmp_path / "model", encoder=model.encoder).database is None
    assert Model.load(tmp_path / "model", encoder=model.encoder, database=some).database is some


def test_multi_query_has_to_be_handed_in_again(model, database, tmp_path):
    merge = ReciprocalRankFusion(NearestNeighbors(), 10)
    wide = MultiQuery(merge, model.encoder, ["a painting of {}"])
    for retriever in (wide, ExcludeSelf(wide)):
        folder = model.replace(retriever=retriever).save(tmp_path / "model", overwrite=True)
        parts = {"encoder": model.encoder, "database": database}
        with pytest.raises(ValueError, match=r"MultiQuery.*cannot describe.*retriever=") as error:
            Model.load(folder, **parts)
        assert "not part of retrodiff" not in str(error.value)
        assert Model.load(folder, retriever=retriever, **parts).retriever is retriever


def test_damaged_models_are_refused(model, tmp_path):
    folder = model.save(tmp_path / "model")
    parts = {"encoder": model.encoder, "database": model.database}
    described = json.loads((folder / "model.json").read_text())

    def rewritten(**change):
        (folder / "model.json").write_text(json.dumps({**described, **change}))

    rewritten(format=99)
    with pytest.raises(ValueError, match=r"format 99.*update"):
        Model.load(folder, **parts)
    components = dict(described["components"])
    components["sampler"] = {"class": "os.system", "config": {"command": "true"}}
    rewritten(components=components)
    with pytest.raises(ValueError, match=r"'os.system', which is not part of retrodiff"):
        Model.load(folder, **parts)
    components["sampler"] = {"class": "retrodiff.disk.files.check_free", "config": {}}
    rewritten(components=components)
    with pytest.raises(ValueError, match=r"no component"):
        Model.load(folder, **parts)
    network = dict(described["components"]["denoiser"])
    network["config"] = {**network["config"]}
    network["config"]["network"] = json.loads(json.dumps(network["config"]["network"]))
    network["config"]["network"]["config"]["width"] = 32
    rewritten(components={**described["components"], "denoiser": network})
    with pytest.raises(ValueError, match=r"do not match denoiser.network \(DiT\)"):
        Model.load(folder, **parts)
    (folder / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"damaged"):
        Model.load(folder, **parts)
    with pytest.raises(FileNotFoundError, match=r"no model.json"):
        Model.load(tmp_path, **parts)


class Own(torch.nn.Module):
    """A network of the user's: saved by its weights, never imported from a file."""

    shape, widths = (1, 8, 8), {"neighbors": 8}

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, timesteps, context):
        return self.conv(x)


def test_weights_of_a_network_of_ones_own_come_back(recipe, model, tmp_path):
    torch.manual_seed(1)
    mine = recipe.denoiser(EDMDenoiser(Own())).build()
    mine.save(tmp_path / "model")
    parts = {"encoder": model.encoder, "database": model.database}
    with pytest.raises(ValueError, match=r"Own.*denoiser=\.\.\."):
        Model.load(tmp_path / "model", **parts)
    again = Model.load(tmp_path / "model", denoiser=EDMDenoiser(Own()), **parts)
    a, b = (m.sample(prompts=["a"], **QUIET).images for m in (mine, again))
    assert torch.equal(a, b)


def test_published_weights_that_were_never_fetched_are_saved_by_name(recipe, tmp_path):
    from retrodiff.diffusion import QueryOnly
    from retrodiff.encoders import CLIPEncoder

    encoder = CLIPEncoder("ViT-B-32-quickgelu", "openai")
    torch.manual_seed(0)
    network = DiT(shape=(1, 8, 8), patch=4, width=16, depth=1, heads=2, widths={"query": 512})
    built = (
        recipe.set(database=None)
        .encoder(encoder)
        .conditioner(QueryOnly("raw"))
        .denoiser(EDMDenoiser(network))
        .build()
    )
    built.save(tmp_path / "model")
    again = Model.load(tmp_path / "model")
    assert not again.encoder.loaded
    assert again.encoder.identity == encoder.identity


def edited(folder, **changes):
    """``model.json`` with some of its entries changed."""
    file = folder / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_encoders_fingerprint_is_kept_and_compared(model, database, tmp_path):
    folder = model.save(tmp_path / "model")
    saved = json.loads((folder / "model.json").read_text())["fingerprint"]
    assert saved == vars(model.encoder.fingerprint)
    other = HashingEncoder(seed=1)
    with pytest.raises(ValueError, match=r"weights='1' against weights='0'.*encoder=None") as error:
        Model.load(folder, encoder=other, database=database)
    assert "\n" not in str(error.value)
    changed = Model.load(folder, encoder=None, database=None).replace(encoder=other)
    assert changed.encoder is other
    edited(folder, fingerprint=None)  # as written by the first version
    assert Model.load(folder, encoder=other, database=None).encoder is other


@pytest.mark.parametrize("how", ["missing", "extra", "misshapen"])
def test_wrong_tensors_are_named_ten_at_most(how, model, tmp_path):
    folder = model.save(tmp_path / "model")
    state = load_file(folder / "weights.safetensors")
    names = [name for name in state if name.startswith("denoiser.network.")]
    assert len(names) > 10
    if how == "missing":
        state = {k: v for k, v in state.items() if k not in names}
    elif how == "misshapen":
        state = {k: v[..., None] if k in names else v for k, v in state.items()}
    else:
        state |= {f"{name}.more": torch.zeros(1) for name in names}
    save_file(state, folder / "weights.safetensors")
    with pytest.raises(
        ValueError, match=rf"{len(names)} tensors.*and {len(names) - 10} mo"
    ) as error:
        Model.load(folder, encoder=model.encoder, database=model.database)
    word = "has shape" if how == "misshapen" else how
    assert str(error.value).count(word) == 10
    assert "\n" not in str(error.value)


def test_tensors_of_no_component_are_named(model, tmp_path):
    folder = model.save(tmp_path / "model")
    file = folder / "weights.safetensors"
    save_file({**load_file(file), "adapter.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"1 tensors of no component: adapter\.weight"):
        Model.load(folder, encoder=model.encoder, database=model.database)


def test_truncated_weights_say_so(model, tmp_path):
    folder = model.save(tmp_path / "model")
    content = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"weights\.safetensors .*truncated"):
        Model.load(folder, encoder=model.encoder, database=model.database)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "no format number"),
        ('{"format": 1}', "lists no components"),
        ('{"format": 1, "components": {"sampler": {"class": "retrodiff.diffusion.DDIM", '
         '"config": {"color": 1}}}}', "'color'.*another version"),
        ('{"format": 1, "components": {"proposal": {"tensor": "proposal.rows"}}}',
         "lack proposal.rows"),
    ],
)  # fmt: skip
def test_a_description_that_describes_nothing(content, message, tmp_path):
    (tmp_path / "model.json").write_text(content)
    save_file({}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=message):
        Model.load(tmp_path)


def test_older_conditioners_load_as_they_were(recipe, encoder, database, tmp_path):
    model = recipe.conditioner(NeighborEmbeddings("unit")).build()
    folder = model.save(tmp_path / "model")
    components = json.loads((folder / "model.json").read_text())["components"]
    del components["conditioner"]["config"]["convert"]
    edited(folder, components=components)
    assert Model.load(folder, encoder=encoder, database=database).conditioner.convert


def test_a_diffusers_pipeline_is_no_saved_model(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"diffusers pipeline.*presets\.rdm_768"):
        Model.load(tmp_path)


# --- names and arguments -------------------------------------------------------------------------


def named(value):
    """All names of classes in a description."""
    if isinstance(value, dict):
        inner = [name for entry in value.values() for name in named(entry)]
        return [value["class"], *inner] if "class" in value and "config" in value else inner
    return [name for entry in value for name in named(entry)] if isinstance(value, list) else []


def test_files_keep_public_names(model, database, tmp_path):
    counts = NeighborCounts(torch.tensor([1]), torch.tensor([3]), database.fingerprint)
    folder = model.replace(proposal=counts).save(tmp_path / "model")
    saved = json.loads((folder / "model.json").read_text())
    assert saved["format"] == 2
    names = named(saved["components"])
    assert {"networks.DiT", "diffusion.Dropped", "interfaces.Fingerprint"} <= set(names)
    assert all(name.split(".")[0] in (*ROOMS, "interfaces") for name in names)


def test_format_1_is_read(model, database, tmp_path):
    """It kept module paths in place of public names, and no seal."""
    counts = NeighborCounts(torch.tensor([1, 5]), torch.tensor([3, 1]), database.fingerprint)
    model = model.replace(proposal=counts)
    folder = model.save(tmp_path / "model")
    text = (folder / "model.json").read_text().replace('"format": 2', '"format": 1')
    for name in set(named(json.loads(text)["components"])):
        module = class_named(name).__module__
        module = "retrodiff.interfaces" if name == "interfaces.Fingerprint" else module
        text = text.replace(f'"{name}"', f'"{module}.{name.split(".")[1]}"')
    (folder / "model.json").write_text(text)
    assert "retrodiff.diffusion.conditioner.NeighborEmbeddings" in text
    again = Model.load(folder, encoder=model.encoder, database=database)
    a, b = (m.sample(prompts=["a"], **QUIET).images for m in (model, again))
    assert torch.equal(a, b)


def test_the_modules_of_format_1_are_known():
    for room, modules in ALIASES.items():
        for module in modules:
            found = importlib.import_module(f"retrodiff.{room}.{module}")
            kinds = [k for k in vars(found).values() if isinstance(k, type) and public_name(k)]
            own = [k for k in kinds if k.__module__ == found.__name__]
            assert own, f"{room}.{module} has no component any more: say where it went"
            assert all(class_named(f"{k.__module__}.{k.__name__}") is k for k in own)


@pytest.mark.parametrize("room", ROOMS)
def test_every_argument_of_a_public_component_is_of_a_kind_that_is_checked(room):
    kinds = public(room)
    assert len(kinds) > 1

    def plain(expected):
        if typing.get_origin(expected) in (typing.Union, __import__("types").UnionType):
            return all(plain(x) for x in typing.get_args(expected))
        if typing.get_origin(expected) in (list, tuple, Sequence, dict, Mapping):
            return all(plain(x) for x in typing.get_args(expected) if x is not ...)
        return typing.get_origin(expected) is typing.Literal or isinstance(expected, type)

    for kind in kinds.values():
        for name, (expected, _) in arguments(kind).items():
            assert plain(expected), f"{kind.__name__}({name}: {expected})"


@pytest.mark.parametrize(
    ("slot", "description", "said"),
    [
        ("sampler", {"class": "diffusion.DDIM", "config": {"eta": "x"}}, r"eta is 'x', not a n"),
        ("sampler", {"class": "diffusion.DDIM", "config": {"eta": True}}, "eta is True, not a num"),
        ("sampler", {"class": "diffusion.Sampler", "config": {}}, "no component of this version"),
        ("sampler", {"class": "diffusion.ClassifierFree", "config": {"scale": 2}}, "not a comp"),
        ("sampler", {"class": "diffusion.sampler_named", "config": {"name": "x"}}, "no component"),
        ("sampler", {"class": "diffusion.Preconditioned", "config": {}}, "no component"),
        ("sampler", {"class": ["x"], "config": {}}, "which is no name"),
        ("sampler", {"class": "diffusion.DDIM", "config": []}, "not the arguments of DDIM"),
        ("sampler", {"class": "diffusion.DDIM", "config": {}, "more": 1}, "not a component"),
        ("sampler", 3, "sampler is 3, not a component"),
        ("guidance", {"class": "diffusion.ClassifierFree", "config": {}}, "lacks scale"),
        ("conditioner", {"class": "diffusion.QueryOnly", "config": {"scale": 1}}, "'raw' or 'u"),
        ("steps", 10**9, "steps is 1000000000, not a whole number from 1"),
        ("k", 2.5, "k is 2.5, not a whole number"),
        ("k", True, "k is True"),
        ("prompt_template", "x" * 5000, "at most 4096"),
        ("color", 1, "argument 'color'.*does not take"),
        ("schedule", {"class": "diffusion.ScaledLinear", "config": {"length": 10**12}}, "length"),
    ],
)  # fmt: skip
def test_what_does_not_belong_there_is_named(slot, description, said, model, tmp_path):
    folder = model.save(tmp_path / "model")
    components = json.loads((folder / "model.json").read_text())["components"]
    edited(folder, components={**components, slot: description})
    with pytest.raises(ValueError, match=said) as error:
        Model.load(folder, encoder=model.encoder, database=model.database)
    assert "\n" not in str(error.value)


def test_a_given_part_that_no_model_has(model, tmp_path):
    folder = model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no decoder: its parts are .*denoiser"):
        Model.load(folder, decoder=1)


@dataclass(frozen=True)
class Mine(DDIM):
    """A sampler of one's own."""


def test_a_subclass_of_ones_own_is_not_saved_as_ours(model, tmp_path):
    folder = model.replace(sampler=Mine()).save(tmp_path / "model")
    parts = {"encoder": model.encoder, "database": model.database}
    with pytest.raises(ValueError, match=r"sampler was saved as .*Mine.*sampler=\.\.\."):
        Model.load(folder, **parts)
    assert Model.load(folder, sampler=Mine(), **parts).sampler == Mine()


# --- values --------------------------------------------------------------------------------------


def test_numbers_of_numpy_and_infinities_come_back(model, tmp_path):
    guidance = Interval(ClassifierFree(np.float32(2.5)), np.float64(0.5), math.inf)  # type: ignore[arg-type]
    odd = model.replace(guidance=guidance, k=np.int64(3), steps=np.int32(2))
    folder = odd.save(tmp_path / "model")
    again = Model.load(folder, encoder=model.encoder, database=model.database)
    assert again.guidance == Interval(ClassifierFree(2.5), 0.5, math.inf)
    assert (again.k, again.steps) == (3, 2)
    assert type(again.k) is int
    components = json.loads((folder / "model.json").read_text())["components"]
    components["guidance"]["config"]["high"] = {"float": "nan"}
    edited(folder, components=components)
    with pytest.raises(ValueError, match=r"guidance.high is 'nan', not a number"):
        Model.load(folder, encoder=model.encoder, database=model.database)


def test_text_that_is_no_unicode_is_kept_escaped(model, tmp_path):
    folder = model.replace(prompt_template="a \udcff {}").save(tmp_path / "model")
    again = Model.load(folder, encoder=model.encoder, database=model.database)
    assert again.prompt_template == r"a \xff {}"


def test_the_home_folder_is_known(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert model.save("~/m") == tmp_path / "m"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    Model.load("~/m", encoder=model.encoder, database=model.database)
    Model.from_pretrained("~/m", encoder=model.encoder, database=model.database)


def test_half_precision_comes_back(recipe, model, tmp_path):
    half = recipe.denoiser(EDMDenoiser(small_network().half())).build()
    folder = half.save(tmp_path / "model")
    again = Model.load(folder, encoder=model.encoder, database=model.database)
    kinds = {p.dtype for p in again.denoiser.parameters()}
    assert kinds == {torch.float16}


@pytest.mark.parametrize("where", ["network", "denoiser", "inside", "autoencoder"])
def test_a_compiled_network_is_saved_as_what_it_is(where, recipe, model, tmp_path):
    network = small_network()
    expected = {f"denoiser.network.{name}": tensor for name, tensor in network.state_dict().items()}
    denoiser, first = EDMDenoiser(network), PrincipalPatches(channels=1, patch=1, components=1)
    if where == "network":
        denoiser = EDMDenoiser(torch.compile(network))  # type: ignore[arg-type]
    elif where == "denoiser":
        denoiser = torch.compile(denoiser)
    elif where == "inside":
        network.blocks[0] = torch.compile(network.blocks[0])  # type: ignore[index]
    else:
        first = torch.compile(first)
    built = recipe.denoiser(denoiser).autoencoder(first).build()
    folder = built.save(tmp_path / "model")
    assert "_orig_mod" not in (folder / "model.json").read_text()
    assert "OptimizedModule" not in (folder / "model.json").read_text()
    saved = load_file(folder / "weights.safetensors")
    assert {k: v for k, v in saved.items() if k.startswith("denoiser")}.keys() == expected.keys()
    again = Model.load(folder, encoder=model.encoder, database=model.database)
    assert type(again.denoiser) is EDMDenoiser
    assert type(again.denoiser.network) is DiT
    for name, tensor in again.denoiser.state_dict().items():
        assert torch.equal(tensor, expected[f"denoiser.{name}"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_said_and_refused(value, model, tmp_path):
    with torch.no_grad():
        model.denoiser.network.embed.bias[0] = value
    with pytest.warns(UserWarning, match=r"not finite.*denoiser\.network\.embed\.bias"):
        folder = model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"not finite, in embed\.bias"):
        Model.load(folder, encoder=model.encoder, database=model.database)


@pytest.mark.parametrize(
    "change",
    [{"depth": 60_000}, {"width": 2**30}, {"widths": {"neighbors": 2**38}}, {"patch": 1}],
    ids=str,
)
def test_no_more_is_built_than_was_saved(change, model, tmp_path):
    """The first three ask for up to a terabyte."""
    import resource

    folder = model.save(tmp_path / "model")
    components = json.loads((folder / "model.json").read_text())["components"]
    components["denoiser"]["config"]["network"]["config"].update(change)
    edited(folder, components=components)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"describes a network of more than|do not match") as error:
        Model.load(folder, encoder=model.encoder, database=model.database)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


# --- the database's place ------------------------------------------------------------------------


class Pooled(HashingEncoder):
    """Mean colors."""

    def encode_image(self, images):
        return images.mean((2, 3)).repeat(1, 3)[:, :8]


@pytest.fixture
def placed(tmp_path, recipe):
    """A model whose database lies elsewhere on the disk."""
    pictures = Images([torch.rand(3, 8, 8) * 2 - 1 for _ in range(12)])
    database = build_database(tmp_path / "data/d.rdb", pictures, Pooled(), progress=False)
    model = recipe.encoder(Pooled()).database(database).build()
    return model, model.save(tmp_path / "models/m")


def test_the_own_database_is_found_wherever_it_is(placed, tmp_path):
    model, folder = placed
    rows = model.database.fingerprint.rows
    assert Model.load(folder, encoder=model.encoder).database.fingerprint.rows == rows
    shutil.move(folder, tmp_path / "moved")  # the model alone
    assert Model.load(tmp_path / "moved", encoder=model.encoder).database is not None
    (tmp_path / "both").mkdir()
    shutil.move(tmp_path / "data", tmp_path / "both/data")  # both, with their way to each other
    shutil.move(tmp_path / "moved", tmp_path / "both/models/m")
    assert Model.load(tmp_path / "both/models/m", encoder=model.encoder).database is not None
    shutil.rmtree(tmp_path / "both/data")
    with pytest.raises(FileNotFoundError, match=r"neither at .*d\.rdb nor at \.\./"):
        Model.load(tmp_path / "both/models/m", encoder=model.encoder)


def test_a_place_that_someone_else_wrote_is_not_touched(placed, tmp_path, monkeypatch):
    model, folder = placed
    monkeypatch.setenv("RETRODIFF_STATE", str(tmp_path / "another user"))
    opened = []
    monkeypatch.setattr("retrodiff.databases.open_database", lambda *a, **k: opened.append(a))
    with pytest.raises(PermissionError, match=r"d\.rdb, outside.*trust_database=True") as error:
        Model.load(folder, encoder=model.encoder)
    assert "\n" not in str(error.value)
    assert not opened
    assert not (tmp_path / "another user").exists()
    monkeypatch.undo()
    for trusted in ({"trust_database": True}, {"database": model.database}):
        assert Model.load(folder, encoder=model.encoder, **trusted).database is not None
        assert Model.from_pretrained(folder, encoder=model.encoder, **trusted).database is not None
    assert Model.load(folder, encoder=model.encoder, database=None).database is None


@pytest.mark.parametrize("change", ["path", "relative", "fingerprint", "seal", "address"])
def test_a_seal_holds_for_what_was_written_only(change, placed, monkeypatch):
    model, folder = placed
    components = json.loads((folder / "model.json").read_text())["components"]
    value = components["database"]
    if change == "address":
        value = {"address": "hf://datasets/a/b", **{k: value[k] for k in ("fingerprint", "seal")}}
    elif change == "fingerprint":
        value["fingerprint"]["rows"] = "0"
    else:
        value[change] = f"{value[change]}x"
    edited(folder, components={**components, "database": value})
    monkeypatch.setattr("retrodiff.databases.open_database", lambda *a, **k: 1 / 0)
    with pytest.raises(PermissionError, match=r"unasked: say trust_database=True"):
        Model.load(folder, encoder=model.encoder)


def test_a_database_inside_the_models_folder_needs_no_seal(placed, tmp_path, monkeypatch):
    model, folder = placed
    shutil.copytree(model.database.path, folder / "d.rdb")
    components = json.loads((folder / "model.json").read_text())["components"]
    components["database"] |= {"relative": "d.rdb", "path": "/nowhere", "seal": None}
    edited(folder, components=components)
    monkeypatch.setenv("RETRODIFF_STATE", str(tmp_path / "another user"))
    found = Model.load(folder, encoder=model.encoder).database
    assert found.path == folder / "d.rdb"
    shutil.rmtree(folder / "d.rdb")
    (folder / "d.rdb").symlink_to(model.database.path)  # a link leads out of it
    with pytest.raises(PermissionError, match=r"outside of its folder"):
        Model.load(folder, encoder=model.encoder)


def test_where_no_key_can_be_kept_models_are_saved_all_the_same(placed, tmp_path, monkeypatch):
    model, _ = placed
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETRODIFF_STATE", str(tmp_path / "file/below"))
    folder = model.save(tmp_path / "other")
    with pytest.raises(PermissionError, match="trust_database=True"):
        Model.load(folder, encoder=model.encoder)
    assert Model.load(folder, encoder=model.encoder, trust_database=True).database is not None


# --- writing -------------------------------------------------------------------------------------


def test_overwriting_takes_the_models_own_files_only(placed, tmp_path):
    model, folder = placed
    shutil.copytree(model.database.path, folder / "photos.rdb")
    with pytest.raises(FileExistsError, match=r"also holds photos\.rdb"):
        model.save(folder, overwrite=True)
    shutil.move(folder / "photos.rdb", tmp_path)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"also holds notes\.txt"):
        model.save(folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    model.save(folder, overwrite=True)
    with pytest.raises(FileExistsError, match="exists"):
        model.save(folder)


SAVING = """
import sys, time, torch
sys.path[:0] = sys.argv[3:]
from parts import HashingEncoder, small_network
from retrodiff import presets
from retrodiff.diffusion import *
from retrodiff.model import Model
from retrodiff.retrieval import NearestNeighbors
model = Model(denoiser=EDMDenoiser(small_network()), conditioner=NeighborEmbeddings("raw"),
              retriever=NearestNeighbors(), guidance=Unguided(), sampler=DDIM(),
              autoencoder=Identity(), steps=int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(10):
    try:
        model.save(sys.argv[1], overwrite=int(sys.argv[2]) < 90)
        print("saved", flush=True)
    except FileExistsError as error:
        print(str(error).replace(chr(10), "|"), flush=True)
"""


@pytest.mark.parametrize("overwrite", [True, False])
def test_two_saves_at_one_path_take_turns(overwrite, tmp_path):
    """As every rank of torchrun does."""
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    folder = tmp_path / "model"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SAVING, str(folder), str(n + (1 if overwrite else 91)), *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for n in range(2)
    ]
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
    said = [run.communicate("\n", timeout=120)[0].splitlines() for run in runs]
    assert all(run.returncode == 0 for run in runs)
    lines = [line for lines in said for line in lines]
    assert len(lines) == 20
    if overwrite:
        assert lines == ["saved"] * 20
    else:
        assert lines.count("saved") == 1
        assert sum("exists" in line for line in lines) == 19
    again = Model.load(folder)
    assert again.steps in (1, 2, 91, 92)
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "weights.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_encoder_that_is_saved_keeps_the_umask(recipe, tmp_path):
    from retrodiff.diffusion import Unconditional
    from retrodiff.encoders import TimmEncoder

    plain = DiT(shape=(1, 8, 8), patch=4, width=16, depth=1, heads=2, widths={})
    encoder = TimmEncoder("test_resnet", image_size=32)
    built = recipe.set(database=None).encoder(encoder).conditioner(Unconditional())
    before = os.umask(0o027)
    try:
        folder = built.denoiser(EDMDenoiser(plain)).build().save(tmp_path / "model")
    finally:
        os.umask(before)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) == 4
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o640"}
    assert Model.load(folder).encoder.fingerprint == encoder.fingerprint


def test_a_fingerprint_that_is_none_is_named(model, tmp_path):
    folder = model.save(tmp_path / "model")
    edited(folder, fingerprint={**vars(model.encoder.fingerprint), "dim": "x"})
    with pytest.raises(
        ValueError, match=r"the fingerprint in model.json has dim='x', not a whole number"
    ):
        Model.load(folder, encoder=model.encoder, database=None)
    assert isinstance(model.encoder.fingerprint, Fingerprint)


def test_weights_inside_of_parts_without_weights_come_back(model, database, tmp_path):
    """``Dropped`` is no module, but holds one; a module may hold such a part again."""
    from retrodiff.diffusion import Dropped, LearnedNull, Projected

    torch.manual_seed(3)
    inner = Dropped(Projected(NeighborEmbeddings("raw"), dim=8, width=8), 0.1)
    made = model.replace(conditioner=Dropped(LearnedNull(inner, dim=8), 0.2))
    folder = made.save(tmp_path / "model")
    again = Model.load(folder, encoder=model.encoder, database=database)
    a, b = (m.sample(prompts=["a"], **QUIET).images for m in (made, again))
    assert torch.equal(a, b)
    assert torch.equal(
        again.conditioner.conditioner.token["neighbors"],
        made.conditioner.conditioner.token["neighbors"],
    )
