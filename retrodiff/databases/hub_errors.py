"""Turns errors of the Hugging Face Hub into one line with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Whatever the Hub's client raises, as one line that says what to do."""
    from huggingface_hub import errors

    # The transport's own errors have no name that all versions of the client share.
    transport = cast("tuple[type[BaseException], ...]", errors.HfHubHTTPError.__bases__)
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{what}: its owner wants to be asked: do so on its page, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{what}: the Hub has no such dataset, or hides it: check the name, or `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{what}: the dataset has no such revision: name a branch, a tag or a commit"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{what} is not in the cache, and the Hub cannot be reached: connect once, and fetch "
            "all with database.fetch()"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{what} is not there: share databases with push_to_hub, which uploads all files"
        ) from error
    except (errors.HFValidationError, OSError, *transport) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{what}: {type(error).__name__}: {reason}") from error
