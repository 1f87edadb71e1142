"""A model as a folder: it comes back the same, or the damage is named."""

import json
from pathlib import Path

import pytest
import torch
from parts import HashingEncoder
from safetensors.torch import load_file, save_file

from retrodiff.databases import Subset, Union
from retrodiff.diffusion import EDMDenoiser, NeighborEmbeddings
from retrodiff.model import Model
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
    for arguments in ({"prompts": ["a"]}, {"n": 2}):
        a, b = (m.sample(**arguments, **QUIET).images for m in (model, again))
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
    components["sampler"] = {"class": "retrodiff.files.check_free", "config": {}}
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
         '"config": {"colour": 1}}}}', "'colour'.*another version"),
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
