"""Checks once whether the Hub can be reached, before another package tries many times.

Without a network, open_clip and timm repeat their requests for the better part of a minute.
"""

from __future__ import annotations

from contextlib import suppress


def ask_once(repo: str, file: str) -> None:
    """Requests what is known about a file, unless something of its repository is cached.

    Args:
        repo: ``OWNER/NAME``; empty: nothing is asked.
        file: in it. The Hub may answer that there is none: it can be reached, then.

    Raises:
        Exception: whatever the request does, where the Hub cannot be reached.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not repo:
        return
    try:
        snapshot_download(repo, local_files_only=True)
    except LocalEntryNotFoundError:
        with suppress(HfHubHTTPError):
            get_hf_file_metadata(hf_hub_url(repo, file), timeout=10)
