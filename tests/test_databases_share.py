"""Shared databases: pushed to a stand-in of the Hub, opened from it, fetched as needed, checked.

The stand-in is a web server over a folder, read through the Hub's real client and its real cache;
uploads go straight into the folder.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from test_databases import RECORDS, Pooled, pictures

from retrodiff import Model, presets
from retrodiff.checkpoints.card import model_card
from retrodiff.databases import (
    EmbeddingDatabase,
    ImageFolder,
    Images,
    append_to_database,
    build_database,
    delete_rows,
    open_database,
    opening,
)
from retrodiff.databases import shared as hub
from retrodiff.indexes import Annoy, Exact
from retrodiff.interfaces import Database, Query
from retrodiff.testing import check_database


class Hub:
    """Datasets as folders, one per commit."""

    def __init__(self, root: Path):
        self.root, self.offline = root, False
        self.refs: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.fetched: list[str] = []
        self.url = ""

    def commit(self, repo: str) -> Path:
        """The folder of the newest commit."""
        return self.root / repo / self.refs[repo]["main"]

    def find(self, repo: str, revision: str, name: str) -> tuple[int, str, str, Path]:
        """Status, error code, commit, file."""
        if repo not in self.refs:
            return 404, "RepoNotFound", "", Path()
        commit = self.refs[repo].get(revision, revision)
        if not (self.root / repo / commit).is_dir():
            return 404, "RevisionNotFound", "", Path()
        file = self.root / repo / commit / name
        return (200, "", commit, file) if file.is_file() else (404, "EntryNotFound", commit, file)

    def download(self, *args: Any, real: Any, **options: Any) -> str:
        return real(*args, **options, endpoint=self.url, local_files_only=self.offline)

    # --- what HfApi does in a push ---

    def create_repo(self, repo: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert (repo_type, exist_ok) == ("dataset", True)
        if repo not in self.refs:
            self.refs[repo], self.private[repo] = {"main": "0" * 40}, private
            self.commit(repo).mkdir(parents=True)

    def repo_info(self, repo: str, *, repo_type: str) -> Any:
        assert repo_type == "dataset"
        return SimpleNamespace(private=self.private[repo])

    def list_repo_files(self, repo: str, *, repo_type: str) -> list[str]:
        assert repo_type == "dataset"
        folder = self.commit(repo)
        return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]

    def create_commit(
        self, repo: str, operations: list[Any], *, commit_message: str, repo_type: str
    ) -> Any:
        assert repo_type == "dataset"
        assert commit_message
        before = self.commit(repo)
        oid = hashlib.sha1(str(len(list((self.root / repo).iterdir()))).encode()).hexdigest()
        after = self.root / repo / oid
        shutil.copytree(before, after)
        for operation in operations:
            target = after / operation.path_in_repo
            if isinstance(operation, huggingface_hub.CommitOperationDelete):
                target.unlink()
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(operation.path_or_fileobj, target)
        self.refs[repo]["main"] = oid
        return SimpleNamespace(oid=oid)


def handler_of(stand_in: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            _, kind, owner, name, resolve, revision, *rest = self.path.split("/")
            assert (kind, resolve) == ("datasets", "resolve")
            file_name = "/".join(rest)
            status, code, commit, file = stand_in.find(f"{owner}/{name}", revision, file_name)
            body = file.read_bytes() if status == 200 else b""
            self.send_response(status)
            for key, value in (("X-Error-Code", code), ("X-Repo-Commit", commit)):
                if value:
                    self.send_header(key, value)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                stand_in.fetched.append(file_name)
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in = Hub(tmp_path / "hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(stand_in))
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    real = functools.partial(huggingface_hub.hf_hub_download, cache_dir=tmp_path / "cache")
    download = functools.partial(stand_in.download, real=real)
    assets = functools.partial(huggingface_hub.cached_assets_path, assets_dir=tmp_path / "assets")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.cached_assets_path", assets)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: stand_in)
    yield stand_in
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def local(tmp_path: Path) -> EmbeddingDatabase:
    records = [
        {**r, "license": ["CC0", "CC-BY|4.0", None][i % 3], "credit": f"person {i}"}
        for i, r in enumerate(RECORDS)
    ]
    return build_database(
        tmp_path / "d.rdb",
        Images(pictures(50), records),
        Pooled(),
        shard_rows=16,
        thumbnails=8,
        progress=False,
    )


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the same database ---------------------------------------------------------------------------


def test_what_was_shared_is_what_is_opened(remote, local):
    address = local.push_to_hub("me/photos")
    assert address == f"hf://datasets/me/photos@{remote.refs['me/photos']['main']}"
    for name in (address, "hf://datasets/me/photos", "hf://datasets/me/photos@main/"):
        shared = open_database(name)
        assert isinstance(shared, Database)
        assert shared.address == address
        assert shared.fingerprint == local.fingerprint
    assert shared.columns == local.columns
    query = Query(torch.randn(7, 48))
    mine, theirs = shared.search(query, 6), local.search(query, 6)
    assert torch.equal(mine.indices, theirs.indices)
    assert torch.equal(mine.similarity, theirs.similarity)
    assert torch.equal(mine.embeddings, theirs.embeddings)
    rows = torch.arange(50)
    assert shared.records(rows) == local.records(rows)
    assert shared.table().equals(local.table())
    assert torch.equal(shared.image(33), local.image(33))
    chosen = "label == 'dog' and year > 20"
    assert torch.equal(shared.where(chosen).rows, local.where(chosen).rows)
    assert shared.verify() == []
    check_database(shared)


def test_a_model_names_its_shared_database(remote, local, tmp_path):
    shared = open_database(local.push_to_hub("me/photos"))
    model = presets.rdm_small(encoder=Pooled(), database=shared, size=32, channels=32)
    model.save(tmp_path / "model")
    assert str(tmp_path / "cache") not in (tmp_path / "model/model.json").read_text()
    again = Model.load(tmp_path / "model", encoder=Pooled())
    assert again.database.address == shared.address
    card = model_card(vars(model), "me/model")
    assert "me/photos" in card, card
    delete_rows(local.path, [3])
    other = open_database(local.path).push_to_hub("me/photos")
    text = (tmp_path / "model/model.json").read_text()
    (tmp_path / "model/model.json").write_text(text.replace(shared.address, other))
    with pytest.raises(ValueError, match=r"not the one the model was saved with"):
        Model.load(tmp_path / "model", encoder=Pooled(), trust_database=True)


def test_only_what_is_needed_is_fetched(remote, local):
    local.push_to_hub("me/photos")
    shared = open_database("hf://datasets/me/photos")
    assert len(shared) == 50
    assert shared.columns == local.columns
    assert remote.fetched == ["manifest.json"]
    shared.embeddings(torch.tensor([17, 20]))
    assert remote.fetched[1:] == ["vectors-000001.safetensors"]
    shared.records(torch.tensor([0]))
    shared.image(49)
    assert remote.fetched[2:] == ["records-000000.parquet", "thumbnails-000003.safetensors"]
    shared.search(Query(torch.randn(1, 48)), 3)
    assert sorted(remote.fetched[4:]) == [f"vectors-{i:06d}.safetensors" for i in (0, 2, 3)]
    before = len(remote.fetched)
    again = open_database("hf://datasets/me/photos")
    again.search(Query(torch.randn(1, 48)), 3)
    assert len(remote.fetched) == before


def test_a_revision_is_pinned(remote, local):
    first = local.push_to_hub("me/photos")
    opened = open_database("hf://datasets/me/photos")
    longer = append_to_database(local.path, Images(pictures(5, seed=9)), Pooled(), progress=False)
    second = longer.push_to_hub("me/photos", message="five more")
    remote.refs["me/photos"]["v1"] = first.split("@")[1]
    assert first != second
    assert len(open_database("hf://datasets/me/photos")) == 55
    for address in (first, "hf://datasets/me/photos@v1"):
        old = open_database(address)
        assert (len(old), old.address) == (50, first)
        assert old.fingerprint == local.fingerprint
    # The one who had it open reads on from the commit it was opened at.
    assert opened.records(torch.tensor([49]))[0]["year"] == 49
    assert opened.search(Query(torch.randn(1, 48)), 50).indices.max() == 49


def test_deleted_rows_stay_hidden(remote, local):
    fewer = delete_rows(local.path, [0, 16, 17, 49])
    fewer.push_to_hub("me/photos")
    shared = open_database("hf://datasets/me/photos")
    assert sorted(remote.fetched)[1:] == ["manifest.json"]
    assert len(shared) == 46
    assert shared.fingerprint == fewer.fingerprint
    years = [i for i in range(50) if i not in (0, 16, 17, 49)]
    assert shared.column("year").tolist() == years
    query = Query(torch.randn(4, 48))
    assert torch.equal(shared.search(query, 46).indices, fewer.search(query, 46).indices)
    # Another deletion leaves another list; the old one goes, so that none is taken for the other.
    delete_rows(local.path, [0]).push_to_hub("me/photos")
    lists = [n for n in remote.list_repo_files("me/photos", repo_type="dataset") if "deleted" in n]
    assert len(lists) == 1
    assert len(open_database("hf://datasets/me/photos")) == 45


def test_without_network_all_that_was_fetched_works(remote, local):
    local.push_to_hub("me/photos")
    open_database("hf://datasets/me/photos").fetch(progress=False)
    remote.offline = True
    shared = open_database("hf://datasets/me/photos")
    assert torch.equal(shared.embeddings(torch.arange(50)), local.embeddings(torch.arange(50)))
    assert shared.records(torch.tensor([3])) == local.records(torch.tensor([3]))
    assert shared.verify() == []


def test_without_network_what_is_missing_is_named(remote, local):
    local.push_to_hub("me/photos")
    open_database("hf://datasets/me/photos").fetch("vectors", progress=False)
    remote.offline = True
    shared = open_database("hf://datasets/me/photos")
    shared.search(Query(torch.randn(1, 48)), 3)
    with pytest.raises(FileNotFoundError, match=r"records-000000.*cannot be reached") as caught:
        shared.records(torch.tensor([3]))
    assert "database.fetch()" in one_line(caught)
    with pytest.raises(FileNotFoundError, match="cannot be reached"):
        open_database("hf://datasets/me/others")


def test_indexes_travel(remote, local, monkeypatch):
    recipe = Annoy(trees=10, components=8)
    built = local.build_index(recipe, progress=False)
    local.push_to_hub("me/photos")
    monkeypatch.setattr(Annoy, "build", None)
    shared = open_database("hf://datasets/me/photos", "annoy")
    assert (shared.recipe, shared.recall) == (recipe, built.recall)
    assert not any(name.startswith("records") for name in remote.fetched)
    query = Query(torch.randn(3, 48))
    assert torch.equal(shared.search(query, 4).indices, built.search(query, 4).indices)
    assert open_database("hf://datasets/me/photos").recipe == Exact()


def test_a_shared_index_is_read_only_when_it_is_named(remote, local, monkeypatch):
    built = local.build_index(Annoy(trees=10, components=48), progress=False)
    assert built.recall.value >= 0.95
    local.push_to_hub("me/photos")
    monkeypatch.setattr(opening, "EXACT_ROWS", 10)
    assert open_database(local.path).recipe.name == "annoy"
    assert open_database("hf://datasets/me/photos").recipe == Exact()
    assert not any(name.startswith("indexes") for name in remote.fetched)
    assert open_database("hf://datasets/me/photos", "annoy").recipe == built.recipe


def test_an_index_built_here_for_another_commit_does_not_hide_the_shared_one(remote, local):
    first = local.push_to_hub("me/photos")
    mine = open_database(first, Annoy(trees=5, components=8))
    longer = append_to_database(local.path, Images(pictures(5, seed=9)), Pooled(), progress=False)
    shared = longer.build_index(Annoy(trees=9, components=8), progress=False)
    second = longer.push_to_hub("me/photos")
    assert open_database(second, "annoy").recipe == shared.recipe
    assert open_database(second).saved_indexes()["annoy"][0] == shared.recipe
    assert open_database(first, "annoy").recipe == mine.recipe


def test_fetch_refuses_what_it_does_not_know(remote, local):
    local.push_to_hub("me/photos")
    shared = open_database("hf://datasets/me/photos")
    with pytest.raises(ValueError, match=r"'images'.*vectors, records, thumbnails, indexes") as one:
        shared.fetch("vectors", "images", progress=False)
    one_line(one)
    assert remote.fetched == ["manifest.json"]


def test_a_shared_database_is_not_changed_from_afar(remote, local):
    address = local.push_to_hub("me/photos")
    for change in (
        lambda: append_to_database(address, Images(pictures(1)), Pooled(), progress=False),
        lambda: delete_rows(address, [0]),
    ):
        with pytest.raises(ValueError, match=f"shared databases are read-only: {address}") as one:
            change()
        one_line(one)


def test_a_card_that_is_there_is_left_alone(remote, local):
    local.push_to_hub("me/photos")
    (remote.commit("me/photos") / "README.md").write_text("# Mine")
    delete_rows(local.path, [0]).push_to_hub("me/photos")
    assert (remote.commit("me/photos") / "README.md").read_text() == "# Mine"
    assert len(open_database("hf://datasets/me/photos")) == 49


def test_the_card_lists_the_indexes_that_were_uploaded(remote, local):
    local.build_index(Annoy(trees=5, components=8), progress=False)
    (local.path / "indexes" / "annoy" / "more.pkl").write_bytes(b"x")
    local.push_to_hub("me/photos")
    names = remote.list_repo_files("me/photos", repo_type="dataset")
    assert not any(name.startswith("indexes") for name in names)
    card = (remote.commit("me/photos") / "README.md").read_text()
    assert "| indexes | none; search is exact |" in card


def test_an_index_built_over_a_shared_database_is_kept_here(remote, local, monkeypatch):
    local.push_to_hub("me/photos")
    recipe = Annoy(trees=5, components=8)
    open_database("hf://datasets/me/photos", recipe)
    monkeypatch.setattr(Annoy, "build", None)
    assert open_database("hf://datasets/me/photos", recipe).recipe == recipe
    assert open_database("hf://datasets/me/photos", "annoy").recipe == recipe
    assert not (local.path / "indexes").exists()
    with pytest.raises(FileNotFoundError, match=r"hf://datasets/me/photos@\w+ has no index 'x'"):
        open_database("hf://datasets/me/photos", "x")


def test_a_home_that_cannot_be_written_is_no_hindrance(remote, local, monkeypatch):
    local.build_index(Annoy(trees=5, components=8), progress=False)
    local.push_to_hub("me/photos")

    def refuse(*_: Any, **__: Any) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("huggingface_hub.cached_assets_path", refuse)
    shared = open_database("hf://datasets/me/photos", "annoy")
    assert len(shared.search(Query(torch.randn(2, 48)), 3)) == 2
    assert shared.verify() == []


# --- what is uploaded ----------------------------------------------------------------------------


def test_nothing_but_the_database_is_uploaded(remote, local):
    local.build_index(Annoy(trees=5, components=8), progress=False)
    (local.path / "secrets.env").write_text("key")
    (local.path / "notes.pkl").write_bytes(b"x")
    other = local.path / "indexes" / "scann"
    shutil.copytree(local.path / "indexes" / "annoy", other)
    (other / "docids.pkl").write_bytes(b"x")
    local.push_to_hub("me/photos")
    names = set(remote.list_repo_files("me/photos", repo_type="dataset"))
    kinds = [("vectors", "safetensors"), ("records", "parquet"), ("thumbnails", "safetensors")]
    expected = {f"{kind}-{i:06d}.{ending}" for kind, ending in kinds for i in range(4)}
    indexes = {f"indexes/annoy/{n}" for n in ("index.json", "axes.safetensors", "trees.ann")}
    assert names == expected | indexes | {"manifest.json", "README.md"}
    assert remote.private["me/photos"]


def test_a_second_push_leaves_no_file_of_the_first_and_all_of_the_owner(remote, local, tmp_path):
    local.push_to_hub("me/photos")
    (remote.commit("me/photos") / "figures.md").write_text("mine")
    few = build_database(tmp_path / "few", Images(pictures(3)), Pooled(), progress=False)
    few.push_to_hub("me/photos")
    names = set(remote.list_repo_files("me/photos", repo_type="dataset"))
    assert names == {*few.manifest.files, "manifest.json", "README.md", "figures.md"}
    assert len(open_database("hf://datasets/me/photos")) == 3


def test_folders_of_this_machine_are_not_told(remote, tmp_path):
    from PIL import Image

    root = tmp_path / "private name" / "photos"
    root.mkdir(parents=True)
    for i, image in enumerate(pictures(3, 20)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / f"p{i}.png")
    built = build_database(tmp_path / "d", ImageFolder(root), Pooled(), progress=False)
    built.push_to_hub("me/photos")
    for file in remote.commit("me/photos").iterdir():
        assert b"private name" not in file.read_bytes()
    with pytest.raises(ValueError, match=r"p1\.png, which the database does not.*root=") as caught:
        open_database("hf://datasets/me/photos").image(1)
    one_line(caught)
    shared = open_database("hf://datasets/me/photos", root=root)
    assert torch.equal(shared.image(1), built.image(1))


def test_card_says_what_it_is_and_whose(remote, local):
    local.build_index(Annoy(trees=10, components=8), progress=False)
    delete_rows(local.path, local.where("license is None and year > 30").rows)
    fewer = open_database(local.path)
    fewer.push_to_hub("me/photos")
    card = (remote.commit("me/photos") / "README.md").read_text()
    head, body = card.split("---\n")[1:]
    assert "- retrodiff" in head
    licenses = [r["license"] for r in fewer.records(torch.arange(len(fewer)))]
    assert f"| CC0 | {licenses.count('CC0')} |" in body
    assert f"| CC\\-BY\\|4.0 | {licenses.count('CC-BY|4.0')} |" in body
    assert f"| (none stated) | {licenses.count(None)} |" in body
    for text in (
        "`pooled`", "| weights | `w` |", "| preprocessing | `none` |", "48 wide, raw scale",
        f"| rows | {len(fewer)} ({50 - len(fewer)} more are deleted) |", "`file`, `label`, `year`",
        "annoy (recall@20", "`credit`", fewer.fingerprint.rows,
        'open_database("hf://datasets/me/photos")',
    ):  # fmt: skip
        assert text in body, text


def test_card_without_licenses_says_so(remote, tmp_path):
    built = build_database(tmp_path / "d", Images(pictures(3)), Pooled(), progress=False)
    built.push_to_hub("me/photos", private=False)
    assert "No row states a license" in (remote.commit("me/photos") / "README.md").read_text()
    assert not remote.private["me/photos"]


def test_a_public_dataset_is_not_written_by_mistake(remote, local):
    local.push_to_hub("me/photos", private=False)
    with pytest.raises(PermissionError, match=r"everyone can see it: say private=False") as caught:
        local.push_to_hub("me/photos")
    one_line(caught)


def test_a_damaged_database_is_not_shared(remote, local):
    file = local.path / "records-000002.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"is damaged \(records-000002"):
        local.push_to_hub("me/photos")
    assert not remote.refs


def test_a_shared_database_is_shared_again(remote, local):
    local.build_index(Annoy(trees=5, components=8), progress=False)
    local.push_to_hub("me/photos")
    again = open_database("hf://datasets/me/photos").push_to_hub("me/copy")
    assert open_database(again, "annoy").fingerprint == local.fingerprint
    first, second = (
        {n: (remote.commit(repo) / n).read_bytes() for n in remote.list_repo_files(
            repo, repo_type="dataset") if n != "README.md"}
        for repo in ("me/photos", "me/copy")
    )  # fmt: skip
    assert first == second


def test_a_push_that_the_hub_refuses_is_one_line(remote, local, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.HFValidationError("Repo id must be\nin the form name")

    monkeypatch.setattr(remote, "create_repo", refuse)
    with pytest.raises(OSError, match=r"cannot share .*d\.rdb as a b c: HFValidationError") as one:
        local.push_to_hub("a b c")
    one_line(one)


# --- what is refused -----------------------------------------------------------------------------


def test_a_changed_shard_is_refused_and_not_kept(remote, local, tmp_path):
    local.push_to_hub("me/photos")
    file = remote.commit("me/photos") / "vectors-000001.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    shared = open_database("hf://datasets/me/photos")
    assert torch.equal(shared.embeddings(torch.arange(16)), local.embeddings(torch.arange(16)))
    for ask in (
        lambda: shared.embeddings(torch.tensor([20])),
        lambda: shared.search(Query(torch.randn(1, 48)), 3),
        lambda: open_database(shared.address).fetch(progress=False),
    ):
        with pytest.raises(ValueError, match=r"vectors-000001.*SHA-256 differs.*not used") as one:
            ask()
        one_line(one)
        assert not list((tmp_path / "cache").rglob("vectors-000001*"))
    assert len(shared.verify()) == 1
    file.write_bytes(good)
    assert torch.equal(shared.embeddings(torch.arange(50)), local.embeddings(torch.arange(50)))
    assert shared.verify() == []


def test_a_file_is_checked_once_and_again_when_it_changes(remote, local, tmp_path, monkeypatch):
    local.push_to_hub("me/photos")
    open_database("hf://datasets/me/photos").fetch(progress=False)
    digests = []

    def counted(path: Path) -> str:
        digests.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(hub, "file_digest", counted)
    open_database("hf://datasets/me/photos").fetch(progress=False)
    assert not digests
    [cached] = (tmp_path / "cache").rglob("vectors-000002*")
    good = cached.read_bytes()
    cached.resolve().write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="SHA-256 differs"):
        open_database("hf://datasets/me/photos").embeddings(torch.tensor([40]))
    again = open_database("hf://datasets/me/photos").embeddings(torch.tensor([40]))
    assert torch.equal(again, local.embeddings(torch.tensor([40])))


def test_what_is_not_there_is_named(remote, local):
    local.push_to_hub("me/photos")
    remote.create_repo("me/empty", repo_type="dataset", private=True, exist_ok=True)
    for address, message in (
        ("hf://datasets/me/nothing", "hf://datasets/me/nothing: the Hub has no such dataset"),
        ("hf://datasets/me/photos@v7", "photos@v7: the dataset has no such revision"),
        ("hf://datasets/me/empty", r"manifest\.json of hf://datasets/me/empty is not there"),
    ):
        with pytest.raises(FileNotFoundError, match=message) as caught:
            open_database(address)
        one_line(caught)


@pytest.mark.parametrize(
    "address",
    ["hf://me/photos", "hf://datasets/photos", "hf://datasets/a/b/c", "hf://datasets/a/b@", "hf:x"],
)
def test_bad_addresses(remote, address):
    with pytest.raises(ValueError, match="write hf://datasets/OWNER/NAME"):
        open_database(address)
    assert remote.fetched == []


SHA = "a" * 64


def give_file(about: dict[str, Any], manifest: Any) -> None:
    manifest["shared"]["indexes"]["annoy"] = {"x": about}


def edit_manifest(remote: Hub, change: Any) -> None:
    file = remote.commit("me/photos") / "manifest.json"
    value = json.loads(file.read_text())
    value.pop("sha256", None)
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format=99), "upgrade retrodiff"),
        (lambda v: v.pop("shards"), "damaged database manifest"),
        (lambda v: v["shards"][0]["files"].update({"../x": {"bytes": 1, "sha256": SHA}}), "'../x'"),
        (lambda v: v["shards"][0]["files"].update({"x": {"bytes": 1}}), "'sha256'"),
        (
            lambda v: v["shared"]["indexes"].update({"..": {"x": {"bytes": 1, "sha256": SHA}}}),
            "beside the rows",
        ),
        *(
            (functools.partial(give_file, about), "no file of a database: 'x'")
            for about in (
                {"bytes": 1, "sha256": "../../x"},
                {"bytes": 1, "sha256": "/etc/passwd"},
                {"bytes": 1, "sha256": SHA[:-1]},
                {"bytes": 1, "sha256": SHA.upper()},
                {"bytes": 1, "sha256": SHA + "\n"},
                {"bytes": 1, "sha256": [SHA]},
                {"bytes": -1, "sha256": SHA},
                {"bytes": True, "sha256": SHA},
                {"bytes": "1", "sha256": SHA},
            )
        ),
    ],
)
def test_bad_manifests(remote, local, change, message):
    local.push_to_hub("me/photos")
    edit_manifest(remote, change)
    with pytest.raises(ValueError, match=message) as caught:
        open_database("hf://datasets/me/photos")
    one_line(caught)


def test_a_manifest_that_counts_other_rows_is_refused(remote, local):
    local.push_to_hub("me/photos")
    edit_manifest(remote, lambda v: (v["shards"][1].update(rows=15), v.update(rows=v["rows"] - 1)))
    shared = open_database("hf://datasets/me/photos")
    message = r"vectors-000001.*holds embeddings \(16, 48\).* says embeddings \(15, 48\)"
    with pytest.raises(ValueError, match=message):
        shared.embeddings(torch.tensor([20]))


def test_a_database_uploaded_by_hand_opens_too(remote, local):
    local.push_to_hub("me/photos")
    edit_manifest(remote, lambda v: v.pop("shared"))
    shared = open_database("hf://datasets/me/photos")
    assert shared.columns == local.columns
    assert shared.saved_indexes() == {}
