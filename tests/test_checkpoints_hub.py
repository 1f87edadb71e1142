"""The Hugging Face Hub with its network replaced by a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parts import HashingEncoder, small_network

from retrodiff import presets
from retrodiff.checkpoints.foreign.load import load_published
from retrodiff.checkpoints.foreign.published import PUBLISHED
from retrodiff.checkpoints.foreign.tensor_names import diffusers_autoencoder, diffusers_unet
from retrodiff.checkpoints.foreign.transfer import their_names
from retrodiff.checkpoints.hub import SAVED, fetch, publish
from retrodiff.checkpoints.sharded import save_sharded
from retrodiff.diffusion import EDMDenoiser, NeighborEmbeddings
from retrodiff.interfaces import Database
from retrodiff.model import Model
from retrodiff.retrieval import NeighborCounts, Uniform

QUIET = {"progress": False}


class Hub:
    """Repositories as folders; a snapshot holds the files that were asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []
        self.uploads: list[dict[str, Any]] = []
        self.private: dict[str, bool] = {}

    def _taken(self, folder: Path, patterns: list[str]) -> list[Path]:
        files = [f.relative_to(folder) for f in sorted(folder.rglob("*")) if f.is_file()]
        return [f for f in files if any(fnmatch(str(f), pattern) for pattern in patterns)]

    def snapshot_download(self, repo: str, *, allow_patterns: list[str], **options: Any) -> str:
        source, snapshot = self.root / repo, self.root / "cache" / repo
        if not source.is_dir():
            from huggingface_hub.errors import LocalEntryNotFoundError

            raise LocalEntryNotFoundError("no such repository")
        for file in self._taken(source, allow_patterns):
            self.fetched.append(str(file))
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, snapshot / file)
        return str(snapshot)

    def api(self, token: str | None = None) -> Any:
        hub = self

        class Api:
            def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
                (hub.root / repo).mkdir(parents=True, exist_ok=exist_ok)
                hub.private.setdefault(repo, private)
                hub.uploads.append({"repo": repo, "private": private, "token": token})

            def repo_info(self, repo: str) -> Any:
                return SimpleNamespace(private=hub.private[repo])

            def file_exists(self, repo: str, name: str) -> bool:
                return (hub.root / repo / name).is_file()

            def upload_folder(
                self,
                *,
                repo_id: str,
                folder_path: Path,
                commit_message: str,
                allow_patterns: list[str],
                ignore_patterns: list[str] | None,
                delete_patterns: list[str],
            ) -> Any:
                for file in hub._taken(hub.root / repo_id, delete_patterns):
                    (hub.root / repo_id / file).unlink()
                ignored = hub._taken(Path(folder_path), ignore_patterns or [])
                for file in hub._taken(Path(folder_path), allow_patterns):
                    if file in ignored:
                        continue
                    target = hub.root / repo_id / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(Path(folder_path) / file, target)
                hub.uploads[-1]["message"] = commit_message
                return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})

        return Api()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import open_clip  # noqa: F401, it must not be imported under the stand-ins

    found = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", found.snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi", found.api)
    return found


# --- our own models ----------------------------------------------------------------------------


def test_a_model_goes_to_the_hub_and_comes_back(model: Model, database: Database, hub: Hub) -> None:
    counts = NeighborCounts(torch.tensor([1, 5]), torch.tensor([3, 1]), database.fingerprint)
    model = model.replace(proposal=counts)
    address = model.push_to_hub("me/model", token="secret", message="first")
    assert address == "https://hub/me/model/commit/1"
    assert hub.uploads == [
        {"repo": "me/model", "private": True, "token": "secret", "message": "first"}
    ]
    parts: dict[str, Any] = {"encoder": model.encoder, "database": database}
    again = Model.from_pretrained("me/model", **parts)
    for asked in ({"prompts": ["a"]}, {"n": 2}):
        a, b = (m.sample(**asked, **QUIET).images for m in (model, again))
        assert torch.equal(a, b)
    assert {Path(name).suffix for name in hub.fetched} == {".json", ".safetensors", ".md"}


def test_the_database_stays_at_home(recipe: Any, hub: Hub, tmp_path: Path) -> None:
    """Its path would tell strangers where things lie here."""
    from retrodiff.testing import small_database

    database = small_database(rows=40, dim=8, seed=0)
    object.__setattr__(database, "path", tmp_path / "private" / "d.rdb")
    recipe.database(database).build().push_to_hub("me/model", private=False)
    assert hub.uploads[0]["private"] is False
    for file in (hub.root / "me/model").rglob("*"):
        assert not file.is_file() or b"private" not in file.read_bytes()
    again = Model.from_pretrained("me/model", encoder=HashingEncoder())
    assert again.database is None
    assert again.sample(prompts=["a"], mode="text", **QUIET).images.shape[0] == 1
    with pytest.raises(ValueError, match=r"has no database.*open_database"):
        again.sample(prompts=["a"], **QUIET)


def test_a_second_upload_leaves_no_weights_of_the_first(
    model: Model, recipe: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading prefers the index of an earlier, larger model."""
    import retrodiff.checkpoints.native as native

    sharded = partial(save_sharded, max_bytes=4096)
    with monkeypatch.context() as small:
        small.setattr(native, "save_sharded", sharded)
        model.push_to_hub("me/model")
    there = hub.root / "me/model"
    assert (there / "weights.safetensors.index.json").is_file()
    (there / "encoder").mkdir()
    (there / "encoder/encoder.json").write_text("{}")
    (there / "README.md").write_text("written by hand")
    (there / "licence.txt").write_text("theirs")
    torch.manual_seed(5)
    other = recipe.denoiser(EDMDenoiser(small_network())).build()
    other.push_to_hub("me/model")
    assert {str(f.relative_to(there)) for f in there.rglob("*") if f.is_file()} == {
        "README.md", "licence.txt", "model.json", "weights.safetensors",
    }  # fmt: skip
    assert (there / "README.md").read_text() == "written by hand"
    again = Model.from_pretrained("me/model", encoder=model.encoder)
    mine, theirs = (m.denoiser.network.state_dict() for m in (other, again))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in mine.items())


def test_a_private_upload_is_not_put_where_everyone_sees_it(model: Model, hub: Hub) -> None:
    model.push_to_hub("me/open", private=False)
    before = (hub.root / "me/open/model.json").stat().st_mtime_ns
    with pytest.raises(PermissionError, match=r"me/open exists and everyone.*private=False"):
        model.push_to_hub("me/open")
    assert (hub.root / "me/open/model.json").stat().st_mtime_ns == before
    model.push_to_hub("me/open", private=False)
    model.push_to_hub("me/closed")
    model.push_to_hub("me/closed", private=False)  # stays private: nothing is given away


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_what_the_hub_says_is_one_line(
    step: str, model: Model, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import HFValidationError

    def refuse(*_: Any, **__: Any) -> None:
        raise HFValidationError("Repo id must be\n\nin the form name")

    api = hub.api()
    monkeypatch.setattr(type(api), step, refuse)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token=None: api)
    said = r"cannot upload a model as me/m: HFValidationError: Repo id must be in"
    with pytest.raises(OSError, match=said) as error:
        model.push_to_hub("me/m")
    assert "\n" not in str(error.value)


def test_the_token_opens_the_models_private_database(
    model: Model, database: Database, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "hf://datasets/me/private@" + "0" * 40
    object.__setattr__(database, "path", Path("cache"))
    object.__setattr__(database, "address", address)
    model.push_to_hub("me/model")
    asked: list[tuple[str, str | None]] = []

    def opened(path: str, *, token: str | None = None) -> Database:
        asked.append((path, token))
        return database

    monkeypatch.setattr("retrodiff.databases.open_database", opened)
    again = Model.from_pretrained("me/model", token="secret", encoder=model.encoder)
    assert asked == [(address, "secret")]
    assert again.database is database


def test_a_database_that_a_stranger_names_is_not_fetched(
    model: Model, database: Database, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the reader's token shown to it."""
    object.__setattr__(database, "path", Path("cache"))
    object.__setattr__(database, "address", "hf://datasets/evil/d@" + "0" * 40)
    model.push_to_hub("me/model")
    asked: list[Any] = []

    def opened(*given: Any, **named: Any) -> Database:
        asked.append((given, named))
        return database

    monkeypatch.setattr("retrodiff.databases.open_database", opened)
    monkeypatch.setenv("RETRODIFF_STATE", str(tmp_path / "another user"))
    given: dict[str, Any] = {"encoder": model.encoder, "token": "secret"}
    with pytest.raises(PermissionError, match=r"hf://datasets/evil/d.*trust_database=True"):
        Model.from_pretrained("me/model", **given)
    assert not asked
    assert Model.from_pretrained("me/model", database=None, **given).database is None
    found = Model.from_pretrained("me/model", trust_database=True, **given)
    assert found.database is database
    assert len(asked) == 1


def test_a_listing_that_leads_out_of_its_folder_is_not_followed(
    model: Model, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client keeps links to its own store; any other link is refused."""
    folder = model.save(tmp_path / "saved")
    cache = tmp_path / "models--me--m"
    snapshot, blobs = cache / "snapshots" / "c0", cache / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(snapshot))
    parts: dict[str, Any] = {"encoder": model.encoder, "database": model.database}
    assert Model.from_pretrained("me/m", **parts).k == model.k
    (snapshot / "weights.safetensors").unlink()
    (snapshot / "weights.safetensors").symlink_to(folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors is a link out of its folder"):
        Model.from_pretrained("me/m", **parts)


def test_what_a_link_leads_to_is_not_uploaded(model: Model, hub: Hub, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "saved")
    (tmp_path / "secret.md").write_text("secret")
    (folder / "README.md").symlink_to(tmp_path / "secret.md")
    with pytest.raises(ValueError, match=r"README\.md is a link out of its folder"):
        publish(folder, "me/model")
    assert not hub.uploads


def test_names_in_a_card_are_text(model: Model, hub: Hub) -> None:
    from retrodiff.retrieval import ExcludeGroup, NearestNeighbors

    column = "a](http://evil/x) <script>x</script> | `b` \n\n# c \x1b[2J <img src=x>"
    model.replace(retriever=ExcludeGroup(NearestNeighbors(), column)).push_to_hub("me/model")
    card = (hub.root / "me/model/README.md").read_text()
    assert "<script" not in card
    assert "<img" not in card
    assert "http://" not in card
    assert "\x1b" not in card
    (row,) = [line for line in card.splitlines() if line.startswith("| retriever")]
    assert row.replace("\\|", "").count("|") == 3
    assert "\n# c" not in card


def test_the_card_says_what_the_model_is(model: Model, hub: Hub) -> None:
    model.push_to_hub("me/model")
    card = (hub.root / "me/model/README.md").read_text()
    assert card.startswith("---\nlibrary_name: retrodiff\npipeline_tag: text-to-image\n")
    assert 'Model.from_pretrained("me/model", database=open_database("..."))' in card
    made = model.encoder.fingerprint  # type: ignore[union-attr]
    rows = model.database.fingerprint.rows  # type: ignore[union-attr]
    for fact in (
        f"encoder | {made.encoder}, weights {made.weights}, preprocessing {made.preprocessing}, "
        f"width {made.dim} |",
        f"database | 40 rows, hash {rows or 'unknown'}, stored raw",
        "Dropped(conditioner=NeighborEmbeddings(scale='raw'",
        "EDMDenoiser, DiT",
        "none of the published models",
    ):
        assert fact in card


def test_the_card_names_a_published_architecture(tiny: None, hub: Hub) -> None:
    presets.rdm_768().push_to_hub("me/rdm")
    card = (hub.root / "me/rdm/README.md").read_text()
    assert "| architecture | rdm_768 |" in card
    assert "open_clip:ViT-L-14-quickgelu:quick_gelu@224, published weights" in card
    assert "preprocessing rdm-224, width 768" in card
    assert "| database | none |" in card
    again = Model.from_pretrained("me/rdm")
    assert again.conditioner == NeighborEmbeddings("unit", convert=False)
    assert not again.encoder.loaded  # type: ignore[union-attr]


def test_from_pretrained_takes_a_folder_and_passes_on_what_it_is_told(
    model: Model, database: Database, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: dict[str, Any] = {"encoder": model.encoder, "database": database}
    folder = model.save(tmp_path / "saved")
    assert Model.from_pretrained(folder, **parts).k == model.k
    assert not hub.fetched
    calls: list[dict[str, Any]] = []

    def download(repo: str, **options: Any) -> str:
        calls.append(options)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    Model.from_pretrained("me/m", revision="v1", cache="there", token="t", **parts)
    assert calls == [
        {"revision": "v1", "cache_dir": "there", "token": "t", "allow_patterns": list(SAVED)}
    ]
    assert not any(fnmatch(f"unet/{name}", p) for p in SAVED for name in ("a.safetensors", "a.bin"))


def test_what_the_hub_lacks_is_named(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match="me/none is neither a folder here nor"):
        Model.from_pretrained("me/none")


# --- published models in the layout of diffusers -----------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 768 model with few channels."""
    from dataclasses import replace

    known = PUBLISHED["rdm_768"]
    unet = {**known.unet, "channels": 32, "size": 8, "blocks_per_level": 1, "multipliers": [1, 2]}
    unet["attention_factors"] = [1, 2]
    first = {**known.autoencoder, "channels": 32, "multipliers": [1, 1, 2], "blocks_per_level": 1}
    first |= {"attention_factors": [4], "latent_channels": 16}
    monkeypatch.setitem(PUBLISHED, "rdm_768", replace(known, unet=unet, autoencoder=first))


@pytest.fixture
def pipeline(tiny: None, hub: Hub) -> Callable[..., dict[str, torch.Tensor]]:
    """Writes ``fusing/rdm`` as it is on the Hub: old names, pickled weights, no scaling factor."""

    def write(*, safe: bool = False) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        unet, vae = PUBLISHED["rdm_768"].build()
        folder = hub.root / "fusing/rdm"
        states = {
            "unet": (unet, diffusers_unet(unet.config())),
            "vae": (vae, diffusers_autoencoder(vae.config(), old=True)),
        }
        for part, (network, names) in states.items():
            (folder / part).mkdir(parents=True)
            theirs = their_names(network, names)
            state = {theirs[k]: v for k, v in network.state_dict().items()}
            torch.save(state, folder / part / "diffusion_pytorch_model.bin")
            if safe:
                save_sharded(state, folder / part, "diffusion_pytorch_model")
        configs = {
            "unet/config.json": {
                "_class_name": "UNet2DConditionModel",
                "sample_size": 8,
                "in_channels": 16,
                "out_channels": 16,
                "block_out_channels": [32, 64],
                "layers_per_block": 1,
                "down_block_types": ["CrossAttnDownBlock2D"] * 2,
                "up_block_types": ["CrossAttnUpBlock2D"] * 2,
                "cross_attention_dim": 768,
                "attention_head_dim": [1, 2],
            },
            "vae/config.json": {
                "_class_name": "AutoencoderKL",
                "in_channels": 3,
                "block_out_channels": [32, 32, 64],
                "layers_per_block": 1,
                "latent_channels": 16,
                "down_block_types": ["DownEncoderBlock2D"] * 2 + ["AttnDownEncoderBlock2D"],
            },
            "scheduler/scheduler_config.json": {
                "beta_start": 0.0015,
                "beta_end": 0.015,
                "beta_schedule": "scaled_linear",
            },
            "model_index.json": {"_class_name": "RDMPipeline"},
        }
        for name, config in configs.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(config))
        (folder / "text_encoder").mkdir()
        (folder / "text_encoder/pytorch_model.bin").write_bytes(b"0" * 100)
        return unet.state_dict()

    return write


@pytest.mark.parametrize("safe", [True, False])
def test_the_768_model_by_its_name_on_the_hub(
    safe: bool, pipeline: Callable[..., dict[str, torch.Tensor]], hub: Hub
) -> None:
    state = pipeline(safe=safe)
    model = presets.rdm_768(checkpoint="fusing/rdm")
    found = model.denoiser.network.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert model.autoencoder.scale_factor == 0.22765929  # type: ignore[attr-defined]
    assert model.denoiser.schedule.beta_end == 0.015  # type: ignore[attr-defined]
    assert model.denoiser.untrained is False  # type: ignore[attr-defined]
    ends = {Path(name).suffix for name in hub.fetched if name.startswith(("unet", "vae"))}
    assert ends == {".json", ".safetensors" if safe else ".bin"}
    assert not any(name.startswith("text_encoder") for name in hub.fetched)


def test_a_pipeline_and_a_saved_model_are_not_taken_for_each_other(
    pipeline: Callable[..., dict[str, torch.Tensor]], hub: Hub, tmp_path: Path
) -> None:
    pipeline()
    with pytest.raises(FileNotFoundError, match=r"diffusers pipeline.*presets\.rdm_768"):
        Model.from_pretrained("fusing/rdm")
    assert hub.fetched == ["model_index.json"]
    folder = presets.rdm_768(proposal=Uniform()).save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"is a saved model.*Model\.load"):
        load_published(folder)


# --- files -------------------------------------------------------------------------------------


def test_fetch_takes_safe_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch("someone/model", revision="v1", cache=tmp_path / "cache") == tmp_path
    repo, options = calls.pop()
    assert (repo, options["revision"], options["cache_dir"]) == (
        "someone/model", "v1", tmp_path / "cache",
    )  # fmt: skip
    assert not any("bin" in p or "ckpt" in p or p == "*" for p in options["allow_patterns"])
    assert fetch(str(tmp_path)) == tmp_path
    assert not calls


def test_fetch_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="someone/model is neither a folder here nor"):
        fetch("someone/model")


def test_publish_uploads_safe_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo: str, **options: Any) -> None:
            calls.append((repo, options))

        def repo_info(self, repo: str) -> Any:
            return SimpleNamespace(private=True)

        def file_exists(self, repo: str, name: str) -> bool:
            return False

        def upload_folder(self, **options: Any) -> Any:
            calls.append(("upload", options))
            return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(FileNotFoundError, match="no saved model"):
        publish(tmp_path, "me/model")
    assert not calls
    save_sharded({"a": torch.ones(2)}, tmp_path)
    (tmp_path / "model.json").write_text("{}")
    assert publish(tmp_path, "me/model") == "https://hub/commit"
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True})
    patterns = calls[1][1]["allow_patterns"]
    assert "*.safetensors" in patterns
    assert not any("bin" in p or "ckpt" in p or p == "*" for p in patterns)
