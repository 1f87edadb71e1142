"""Uploads a database to the Hugging Face Hub with a dataset card."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrodiff.databases.hub_errors import hub_errors
from retrodiff.databases.manifest import MANIFEST, Manifest
from retrodiff.disk.hashed import about_file
from retrodiff.text import markdown, printable

if TYPE_CHECKING:
    from retrodiff.databases.store import EmbeddingDatabase

INDEX_FILES = {".json", ".safetensors", ".ann", ".faiss", ".usearch", ".cagra"}
"""What a saved index may consist of to be shared: nothing whose loader would unpickle."""

_OURS = re.compile(r"(vectors|records|thumbnails|deleted)-\w+\.(safetensors|parquet)|indexes/.+")
_LICENSES = ("license", "licence")
_MOST = 50  # licenses that the card names


def push(
    database: EmbeddingDatabase, repo: str, *, private: bool, token: str | None, message: str
) -> str:
    """Uploads a database in one commit; see `EmbeddingDatabase.push_to_hub`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    database.fetch()
    if wrong := database.verify():
        raise ValueError(f"{database.address} is damaged ({wrong[0]}): restore it, then share it")
    indexes = _indexes(database)
    manifest = shared_manifest(database, indexes)
    files = {name: database._here(name) for name in manifest.files}
    for name, folder in indexes.items():
        files |= {f"indexes/{name}/{file.name}": file for file in folder.iterdir()}
    with tempfile.TemporaryDirectory() as folder:
        files |= {name: Path(folder) / name for name in (MANIFEST, "README.md")}
        manifest.write(files[MANIFEST])
        files["README.md"].write_text(card(database, repo, indexes), "utf-8")
        api = HfApi(token=token, library_name="retrodiff")
        with hub_errors(f"cannot share {database.address} as {repo}"):
            api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
            public = not api.repo_info(repo, repo_type="dataset").private
        if private and public:
            raise PermissionError(
                f"{repo} exists and everyone can see it: say private=False, or choose another name"
            )
        with hub_errors(f"cannot share {database.address} as {repo}"):
            there = api.list_repo_files(repo, repo_type="dataset")
            if "README.md" in there:  # whoever owns it may have written into it
                del files["README.md"]
            commit = api.create_commit(
                repo,
                [
                    *(CommitOperationAdd(name, str(file)) for name, file in files.items()),
                    *(
                        CommitOperationDelete(name)
                        for name in there
                        if _OURS.fullmatch(name) and name not in files
                    ),
                ],
                commit_message=message,
                repo_type="dataset",
            )
    return f"hf://datasets/{repo}@{commit.oid}"


def shared_manifest(database: EmbeddingDatabase, indexes: dict[str, Path]) -> Manifest:
    """The manifest that others see: without this machine's folders, with what they need."""
    about = {
        name: {file.name: about_file(file) for file in sorted(folder.iterdir())}
        for name, folder in indexes.items()
    }
    sources = ({k: v for k, v in s.items() if k != "root"} for s in database.manifest.sources)
    shared = {"columns": list(database.columns), "indexes": about}
    return replace(database.manifest, sources=tuple(sources), shared=shared)


def _indexes(database: EmbeddingDatabase) -> dict[str, Path]:
    """Folders of the saved indexes of these very rows that consist of known files."""
    return {
        name: folder
        for name, folder in database.index_folders().items()
        if name in database.saved_indexes()
        and all(file.is_file() and file.suffix in INDEX_FILES for file in folder.iterdir())
    }


def card(database: EmbeddingDatabase, repo: str, shared: Collection[str]) -> str:
    """The dataset card: encoder, counts, columns, licenses, and how to open it.

    Texts that come from elsewhere (encoder, columns, licenses) are shown as text, whatever marks of
    Markdown or HTML they hold.
    """
    mark, shards = database.fingerprint, database.manifest.shards
    hidden = 0 if database.hidden is None else len(database.hidden)
    size = sum(about["bytes"] for about in database.manifest.files.values())
    pictures = "thumbnails" if shards and shards[0].file("thumbnails") else "not included"
    saved = database.saved_indexes().items()
    indexes = [f"{name} ({recall})" for name, (_, recall) in saved if name in shared]
    lines = [
        ("rows", f"{len(database):,}" + (f" ({hidden:,} more are deleted)" if hidden else "")),
        ("encoder", _code(mark.encoder)),
        ("weights", _code(mark.weights)),
        ("preprocessing", _code(mark.preprocessing)),
        ("embeddings", f"{mark.dim} wide, {mark.scale} scale, stored in float16"),
        ("columns", ", ".join(map(_code, database.columns))),
        ("pictures", pictures),
        ("indexes", ", ".join(indexes) or "none; search is exact"),
        ("size", f"{size / 1e6:,.1f} MB"),
        ("rows hash", f"`{mark.rows}`"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in lines)
    return _CARD.format(title=repo.split("/")[-1], table=table, repo=repo, ours=_rights(database))


def licenses(database: EmbeddingDatabase) -> Counter[str | None] | None:
    """Number of rows by the license that they state, None for no license; None: no such column."""
    name = next((name for name in _LICENSES if name in database.columns), None)
    if name is None:
        return None
    counts: Counter[str | None] = Counter()
    for table in database.tables([name]):
        for entry in table[name].value_counts():
            value: Any = entry["values"].as_py()
            counts[None if value is None else str(value)] += entry["counts"].as_py()
    return counts


def _rights(database: EmbeddingDatabase) -> str:
    counts = licenses(database)
    if counts is None:
        return "No row states a license: ask whoever shared this before you use it."
    common = counts.most_common(_MOST)
    lines = [f"| {_cell(name)} | {rows:,} |" for name, rows in common]
    if rest := len(counts) - len(common):
        others = counts.total() - sum(rows for _, rows in common)
        lines.append(f"| {rest:,} others | {others:,} |")
    text = "\n".join(["| license | rows |", "|---|---:|", *lines])
    if "credit" in database.columns:
        text += "\n\nWhom to credit stands in every row's column `credit`."
    return text


def _cell(text: str | None) -> str:
    return "(none stated)" if text is None else markdown(" ".join(text.split())[:200])


def _code(text: str) -> str:
    """A text as code, or escaped where it would end the code or the cell of the table."""
    plain = printable(text[:200])
    return markdown(plain) if set(plain) & set("`|\\") else f"`{plain}`"


_CARD = """\
---
tags:
- retrodiff
- embeddings
- image-retrieval
configs:
- config_name: records
  data_files: records-*.parquet
---

# {title}

Embeddings of images and where each comes from: a retrieval database for
[retrodiff](https://pypi.org/project/retrodiff/).

| | |
|---|---|
{table}

## Licenses

{ours}

## Open it

```python
from retrodiff import open_database

database = open_database("hf://datasets/{repo}")
```

Files are fetched when they are first needed and compared with the hashes in `manifest.json`.
Add `@` and a commit to the address to open these very rows in a year as well. Queries must come
from the same encoder.
"""
