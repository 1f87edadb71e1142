"""Where what can be made again is kept for a user."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "RETRODIFF_CACHE"
"""Environment variable: the folder, in place of the usual one."""


def cache_folder() -> Path:
    """``$RETRODIFF_CACHE``, or the usual place of the system; it may not exist yet."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser()
    if sys.platform == "win32":
        usual = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
        return Path(usual).expanduser() / "retrodiff" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "retrodiff"
