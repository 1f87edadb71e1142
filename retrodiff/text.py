"""Text from elsewhere (names of files, members, columns) made safe to print and to store.

A name may hold escape sequences that move a terminal's cursor, letters that turn the direction of
reading around, Markdown, HTML, or bytes that are no text at all.
"""

from __future__ import annotations

import html
import re
import unicodedata

_HARMLESS = {"Zs"}  # spaces of other widths
_JOINERS = "\u200c\u200d"  # part of Persian and Indian words and of emoji
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~-])")
_BYTE = re.compile(r"\\x([89a-f][0-9a-f])")


def printable(text: object) -> str:
    r"""One line for a terminal: control and invisible characters as escapes such as ``\x1b``.

    Letters of every language stay. Bytes of a file name that are no UTF-8 become ``\xe9``.

    Examples:
        >>> printable("a\x1b[2Jb\n")
        'a\\x1b[2Jb\\n'
    """
    return "".join(_shown(c) for c in escaped(str(text)))


def markdown(text: object) -> str:
    r"""One line for a Markdown page or an HTML text: `printable`, with their marks as text.

    Examples:
        >>> markdown("<b>|x|</b>")
        '&lt;b&gt;\\|x\\|&lt;/b&gt;'
    """
    return html.escape(_MARKDOWN.sub(r"\\\1", printable(text)))


def escaped(text: str) -> str:
    r"""The same text, as UTF-8 can hold it: undecodable bytes of a name as ``\xe9``.

    Lone surrogates that stand for no byte become ``\ud800``. Anything else stays as it is.
    """
    if text.isascii():
        return text
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # surrogates that no file name holds
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return data.decode("utf-8", "backslashreplace")


def unescaped(text: str) -> str:
    r"""A file name for the operating system again, where `escaped` has replaced its bytes.

    A name that holds the four characters ``\xe9`` cannot be told apart from one that holds the
    byte: try the name as it is first.
    """
    parts = _BYTE.split(text)
    bytes_ = (p.encode("utf-8") if i % 2 == 0 else bytes([int(p, 16)]) for i, p in enumerate(parts))
    return b"".join(bytes_).decode("utf-8", "surrogateescape")


def _shown(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    if unicodedata.category(character) in _HARMLESS:
        return character
    return character.encode("unicode_escape").decode("ascii")
