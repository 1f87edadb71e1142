"""Saves models to folders and to the Hugging Face Hub, and opens them again."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch

from retrodiff.checkpoints.card import model_card
from retrodiff.checkpoints.database_place import shared_address
from retrodiff.checkpoints.hub import SAVED, fetch, publish
from retrodiff.checkpoints.native import load_components, save_components
from retrodiff.disk.shipped import shipped
from retrodiff.model.checks import check_components


class Saved:
    """Methods of `retrodiff.Model` for files and the Hugging Face Hub."""

    def parts(self) -> dict[str, Any]:
        """The components and numbers by slot."""
        raise NotImplementedError

    def save(
        self,
        folder: str | Path,
        overwrite: bool = False,
        *,
        include_database: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """Saves the model as a folder of safetensors and JSON.

        Of the database, the place and the fingerprint are kept. One that has no folder and is not
        on the Hub has to be handed in again: ``Model.load(folder, database=...)``.

        Args:
            folder: to be made.
            overwrite: replace an earlier model there.
            include_database: copy the database into the folder, which can then be moved anywhere.
            dtype: of the weights in the file, such as ``torch.float16``, for half the bytes; they
                are loaded as float32. None: their own. The encoder keeps its weights, since other
                ones would not fit its databases.
        """
        save_components(
            self.parts(),
            Path(folder),
            overwrite=overwrite,
            include_database=include_database,
            dtype=dtype,
        )
        return Path(folder).expanduser()

    @classmethod
    def load(cls, folder: str | Path, *, trust_database: bool = False, **components: Any) -> Self:
        """Opens the folder written by `save`.

        The folder may be a stranger's: nothing in it can run code, fetch an address or lead to a
        file outside of it (see `retrodiff.checkpoints.native`).

        Args:
            folder: of a saved model; or the name of one with a package of its own: ``pictograms``.
            trust_database: open the database wherever the folder says that it is. Without that,
                only inside of the folder, or where you saved the model on this machine yourself.
            components: replace the saved ones, ``database=...`` for example.
        """
        parts = load_components(
            shipped(folder) or Path(folder).expanduser(),
            components,
            cls,
            trust_database=trust_database,
        )
        return cls._of(parts)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path,
        *,
        revision: str | None = None,
        cache: str | Path | None = None,
        token: str | None = None,
        trust_database: bool = False,
        **components: Any,
    ) -> Self:
        """Opens a model from the Hub or from a folder: safetensors and JSON, nothing else is read.

        Args:
            repo_or_folder: ``owner/name`` on the Hugging Face Hub, or a folder.
            revision: branch, tag or commit.
            cache: folder of the cache; None: the usual one.
            token: for private repositories, the database's too; None: the one of ``hf auth login``.
            trust_database: fetch the database from wherever the model says that it is, with your
                token. Without that it is refused, unless you uploaded the model from this machine.
            components: replace the saved ones; a database is among those only if it is
                on the Hub itself.
        """
        folder = fetch(
            str(repo_or_folder), revision=revision, cache=cache, token=token, patterns=SAVED
        )
        parts = load_components(folder, components, cls, token=token, trust_database=trust_database)
        return cls._of(parts)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = True,
        token: str | None = None,
        message: str = "Upload a retrodiff model",
    ) -> str:
        """Uploads the model with a card that says what it is; returns the commit's address.

        A database that is on the Hub itself comes with the model by its address. Any other stays
        here: the card names its fingerprint, not its path. Weights of an earlier upload are
        replaced; a card that is there already stays.

        Args:
            repo: ``owner/name``; made where it does not exist.
            private: hide a new repository from others, and refuse one that everyone can see.
            token: None: the one of ``hf auth login``.
            message: of the commit.
        """
        parts = self.parts()
        with TemporaryDirectory() as place:
            folder = Path(place) / "model"
            database = parts["database"]
            kept = database if shared_address(database) else None
            save_components({**parts, "database": kept}, folder)
            (folder / "README.md").write_text(model_card(parts, repo), "utf-8")
            return publish(folder, repo, private=private, token=token, message=message)

    @classmethod
    def _of(cls, parts: dict[str, Any]) -> Self:
        check_components(parts)
        return cls(**parts)
