"""Says the library's errors in options: ``overwrite=True`` becomes ``--overwrite``."""

from __future__ import annotations

import re
from collections.abc import Iterable

_VALUE = r"""(?P<value>(?=[\s,;)]|$)|[\w.]+\([^()]*\)|'[^']*'|"[^"]*"|\.\.\.|[\w.+:/-]*\w)"""

_LISTS = {"images": "image", "prompts": "prompt"}
"""Arguments that take a list, and the options that are given several times."""


def in_options(text: str, names: Iterable[str]) -> str:
    """The text with arguments written as options.

    Args:
        text: an error of the library, such as ``k=9 ...: use mode='text'``.
        names: the command's options, such as ``k`` and ``batch_size``.

    Examples:
        >>> in_options("d exists: choose another path, or overwrite=True", ["overwrite"])
        'd exists: choose another path, or --overwrite'
        >>> in_options("k=9 is more than 8 rows: use mode='text'", ["k", "mode"])
        '--k 9 is more than 8 rows: use --mode text'
    """
    text = re.sub(r"load\(\.\.\., (\w+=\.\.\.)\)", r"\1", text)
    options = {name: f"--{name.replace('_', '-')}" for name in names}
    options |= {plural: options[one] for plural, one in _LISTS.items() if one in options}
    for name, option in sorted(options.items(), key=lambda pair: -len(pair[0])):

        def said(match: re.Match[str], option: str = option) -> str:
            value = match["value"]
            if value in ("True", ""):
                return option
            if value == "False":
                return f"no {option}"
            if "(" in value or value == "...":
                return f"{option} {option[2:].upper()}"
            return f"{option} {value.strip(chr(39) + chr(34))}"

        text = re.sub(rf"(?<![\w.-]){name}={_VALUE}", said, text)
        text = re.sub(rf"{option}(, {option}\b)+", option, text)
    return text
