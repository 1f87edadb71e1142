"""Fetches and uploads models on the Hugging Face Hub, as safetensors and JSON.

Thin on purpose: `fetch` gives a local folder that is then opened like any other, `publish` uploads
a saved folder.
"""

from __future__ import annotations

from pathlib import Path

from retrodiff.checkpoints.foreign.pipeline_files import DESCRIPTIONS, PARTS, has_weights, stages
from retrodiff.disk.untrusted import inside
from retrodiff.text import printable

SAFE = ("*.json", "*.safetensors", "*.md", "*.yaml")
"""Files that hold no code."""

SAVED = (
    "model.json", "weights.safetensors", "weights-*.safetensors", "weights.safetensors.index.json",
    "encoder/encoder.json", "encoder/encoder.safetensors", "README.md", "model_index.json",
)  # fmt: skip
"""What `Model.save` writes; the last one tells a diffusers pipeline, whose weights are not ours."""

STALE = ("weights*.safetensors", "weights.safetensors.index.json", "encoder/*")
"""What an earlier upload may have left: loading would prefer its index, or mix in its encoder."""


def fetch(
    repo: str,
    *,
    revision: str | None = None,
    cache: str | Path | None = None,
    token: str | None = None,
    patterns: tuple[str, ...] = SAFE,
) -> Path:
    """A repository's files as a local folder; from the cache where they are there already.

    Args:
        repo: ``owner/name``, or a folder on this machine, which is returned as it is.
        revision: branch, tag or commit.
        cache: folder of the cache; None: the usual one.
        token: for private repositories; None: the one of ``hf auth login``.
        patterns: files to fetch.

    Raises:
        FileNotFoundError: the repository does not exist, or there is no network.
    """
    if Path(repo).expanduser().is_dir():
        return Path(repo).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache,
                token=token,
                allow_patterns=list(patterns),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{printable(repo)} is neither a folder here nor to be had from the Hub "
            f"({type(error).__name__}): check name and network, or hand in a local folder"
        ) from error


def fetch_pipeline(repo: str, variant: str | None = None) -> Path:
    """What `load_diffusers` reads of a pipeline such as ``fusing/rdm``; see `fetch`.

    Pickled weights are fetched only for the parts that have no safetensors, and variants (``fp16``)
    only for those that have no full weights, unless ``variant`` asks for one.
    """
    patterns = DESCRIPTIONS
    first, *later = stages(variant)
    patterns = (*patterns, *(f"{part}/{name}" for part in PARTS for name in first))
    folder = fetch(repo, patterns=patterns)
    for stage in later:
        parts = [part for part in PARTS if (folder / part).is_dir()]
        wanting = [part for part in parts if not has_weights(folder / part, variant)]
        if not wanting:
            break
        patterns = (*patterns, *(f"{part}/{name}" for part in wanting for name in stage))
        folder = fetch(repo, patterns=patterns)
    return folder


def publish(
    folder: str | Path,
    repo: str,
    *,
    private: bool = True,
    token: str | None = None,
    message: str = "Upload a retrodiff model",
) -> str:
    """Uploads a saved model in one commit; other files in the folder stay at home.

    Weights of an earlier upload that are not part of this one are deleted. A card that is there
    already stays as its owner wrote it.

    Args:
        folder: of a saved model.
        repo: ``owner/name``; made where it does not exist.
        private: hide a new repository from others, and refuse one that everyone can see.
        token: None: the one of ``hf auth login``.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: the folder holds no saved model.
        ValueError: a link in it leads out of it.
        PermissionError: ``private``, but everyone can see the repository.
        OSError: the Hub refuses, or cannot be reached.
    """
    folder = Path(folder)
    if not (folder.is_dir() and any(folder.rglob("*.safetensors")) and any(folder.glob("*.json"))):
        raise FileNotFoundError(f"{folder} holds no saved model: save one there first")
    for file in folder.rglob("*"):  # a link may lead to what is nobody else's business
        if any(file.match(pattern) for pattern in SAFE):
            inside(folder, file.relative_to(folder).as_posix())
    from huggingface_hub import HfApi

    from retrodiff.databases.hub_errors import hub_errors

    api, what = HfApi(token=token), f"cannot upload a model as {repo}"
    with hub_errors(what):
        api.create_repo(repo, private=private, exist_ok=True)
        public = not api.repo_info(repo).private
    if private and public:
        raise PermissionError(
            f"{repo} exists and everyone can see it: say private=False, or choose another name"
        )
    with hub_errors(what):
        card = "README.md"
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message,
            allow_patterns=list(SAFE),
            ignore_patterns=[card] if api.file_exists(repo, card) else None,
            delete_patterns=list(STALE),
        )
    return str(commit.commit_url)
