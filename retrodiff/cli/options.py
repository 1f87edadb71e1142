"""Types of command-line options: numbers, devices and paths, checked before any work."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

MAX_SEED = 2**63 - 1


class UsageError(ValueError):
    """A command line that cannot be run; the message is one line."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose help shows defaults and whose errors are one line.

    Raises:
        UsageError: instead of printing the usage and leaving the program.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Help)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Refuses a misspelt option first: what is missing is often what it was meant to be."""
        if self._subparsers is None:
            self._check_names(args or [])
        return super().parse_known_args(args, namespace)

    def _check_names(self, words: Sequence[str]) -> None:
        known = [name for action in self._actions for name in action.option_strings]
        for word in words:
            if word == "--":
                return
            name = word.split("=")[0]
            if not name.startswith("--") or " " in name or name in known:
                continue
            near = difflib.get_close_matches(name, known, 1)
            self.error(f"no option {name}" + (f": did you mean {near[0]}?" if near else ""))

    def error(self, message: str) -> NoReturn:
        """Raises the message, with the command that explains the options."""
        raise UsageError(f"{' '.join(message.split())} (see {self.prog} --help)")


class _Help(argparse.HelpFormatter):
    """Appends the default to every option's help that has one worth showing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.help or ""
        unsaid = (None, False, argparse.SUPPRESS)
        worth = action.default != [] and not any(action.default is value for value in unsaid)
        if worth and action.option_strings and "%(default)" not in shown:
            shown += " (default: %(default)s)"
        return shown


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number of at least ``least`` and, where given, at most ``most``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below the least allowed, {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{value} is above the most allowed, {most}")
        return value

    return read


def real(
    least: float = -math.inf, most: float = math.inf, *, above: float | None = None
) -> Callable[[str], float]:
    """A finite number in [least, most]; with ``above``, greater than that."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is no finite number")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} is not above {above:g}")
        if not least <= value <= most:
            limits = (("at least", least), ("at most", most))
            bounds = [f"{word} {limit:g}" for word, limit in limits if math.isfinite(limit)]
            raise argparse.ArgumentTypeError(f"{text} must be {', '.join(bounds)}")
        return value

    return read


count = integer(1)
"""A number of things, at least one."""

seed = integer(0, MAX_SEED)
"""A seed of randomness, 0 to 2^63 - 1."""


def device(text: str) -> str:
    """The name of a device that this machine has."""
    from retrodiff.devices import get_device

    try:
        return str(get_device(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path(text: str) -> str:
    """A path to read, its ``~`` resolved; addresses such as ``hf://...`` are left as they are."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path was given: name a file or a folder")
    if "\0" in text:
        raise argparse.ArgumentTypeError("a path cannot hold a zero byte")
    return text if "://" in text else str(Path(text).expanduser())


def prompt(text: str) -> str:
    """A text that asks for something."""
    if not text.strip():
        raise argparse.ArgumentTypeError(
            "an empty prompt was given: say what to draw, or ask for nothing with --unconditional"
        )
    return text


def new_folder(text: str) -> str:
    """A folder to write: it has a name of its own, so that it can appear in one piece."""
    found = path(text)
    if not Path(found).name or Path(found).name == "..":
        raise argparse.ArgumentTypeError(
            f"{text!r} has no name of its own: name a folder to be made, such as ./out"
        )
    return found


def picture_file(text: str) -> str:
    """A picture file to write: its ending is one that Pillow writes, its folder exists."""
    found = Path(path(text))
    if picture_format(found) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} has no ending of a picture format: use one such as .png"
        )
    if not found.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: the folder {found.parent} does not exist")
    if found.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: name a file")
    return str(found)


def picture_format(file: Path) -> str | None:
    """The format that Pillow writes for a file name's ending; None: it writes none."""
    from PIL import Image

    name = Image.registered_extensions().get(file.suffix.lower())
    return name if name in Image.SAVE else None
