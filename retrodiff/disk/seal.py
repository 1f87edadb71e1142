"""Signs JSON values with a key of this user, to recognize files that they wrote.

A seal is an HMAC-SHA256 with a key that is made once for each user and stays on the machine. What
bears a valid seal was written by this user's own retrodiff; nobody else can make one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

VARIABLE = "RETRODIFF_STATE"
"""Environment variable: folder of the key, in place of the usual one."""

_BYTES = 32


def seal(value: Any) -> str | None:
    """The seal of a JSON value; None where this user can keep no key."""
    key = _key(make=True)
    return None if key is None else _seal(value, key)


def is_sealed(value: Any, found: Any) -> bool:
    """Whether a seal is this user's own, of this value."""
    key = _key(make=False)
    if key is None or not isinstance(found, str) or not found.isascii():
        return False
    return hmac.compare_digest(_seal(value, key), found)


def state_folder() -> Path:
    """Where the key is kept: ``$RETRODIFF_STATE``, or the usual place of the system."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local").expanduser() / "retrodiff"
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "retrodiff"


def _seal(value: Any, key: bytes) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _key(make: bool) -> bytes | None:
    try:
        file = state_folder() / "key"
        with suppress(FileNotFoundError):
            return _read(file)
        if not make:
            return None
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = file.with_name(f"key.{secrets.token_hex(8)}.partial")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(secrets.token_bytes(_BYTES))
            with suppress(FileExistsError):
                _put(fresh, file)
        finally:
            fresh.unlink(missing_ok=True)
        return _read(file)
    except (OSError, RuntimeError):  # no home, or none that can be written
        return None


def _put(fresh: Path, file: Path) -> None:
    """Gives a key its name, unless another process was faster: then that one's stays."""
    try:
        os.link(fresh, file)
    except FileExistsError:
        raise
    except OSError:  # no hard links here
        if not file.exists():
            os.replace(fresh, file)


def _read(file: Path) -> bytes | None:
    key = file.read_bytes()
    return key if len(key) == _BYTES else None
