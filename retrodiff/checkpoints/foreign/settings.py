"""One section of a foreign configuration, read by an allow-list.

Every key is used, known to change nothing here, or refused by name: a key that is passed over
silently may be the one that changes the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

REQUIRED: Any = object()
WIDEST = 1 << 16
"""Largest whole number that is taken for a width; the published models have 2,240 channels."""
SHOWN = 60


class Settings:
    """The keys of one section, each to be taken exactly once before `done`.

    Args:
        values: the section.
        where: the file and the section, which begin every error.
        hint: what a section without a required key is not, and the way out.
    """

    def __init__(self, values: Any, where: str, hint: str = "") -> None:
        self.where, self.hint = where, hint
        if not isinstance(values, Mapping):
            raise ValueError(f"{where} is no section of keys and values{hint and f': {hint}'}")
        self.values = cast("Mapping[str, Any]", values)
        self._taken: set[str] = set()

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of a key as it is; ``default`` where it is absent."""
        self._taken.add(name)
        value = self.values.get(name, default)
        if value is REQUIRED:
            raise ValueError(f"{self.where} lacks {name}{self.hint and f': {self.hint}'}")
        return value

    def section(self, name: str) -> Settings:
        """The section below a key."""
        return Settings(self.take(name), f"{self.where}, {name}", self.hint)

    def whole(
        self, name: str, default: Any = REQUIRED, *, least: int = 1, most: int = WIDEST
    ) -> int:
        """A whole number within limits."""
        return self._whole(name, self.take(name, default), least, most)

    def wholes(
        self, name: str, *, longest: int, shortest: int = 1, most: int = WIDEST
    ) -> list[int]:
        """A list of whole numbers from 1 within limits."""
        value = self.take(name)
        if not isinstance(value, list) or not shortest <= len(value) <= longest:
            self.wrong(name, value, f"a list of {shortest} to {longest} whole numbers")
        return [self._whole(name, item, 1, most) for item in cast("Sequence[Any]", value)]

    def same(self, name: str, default: Any = REQUIRED, *, least: int = 1, most: int = 64) -> int:
        """A whole number, or a list that repeats one: what some files give for each level."""
        value = self.take(name, default)
        if isinstance(value, Sequence) and not isinstance(value, str):
            items = cast("Sequence[Any]", value)
            if not items or any(item != items[0] for item in items):
                self.wrong(name, value, "the same number for all levels")
            value = items[0]
        return self._whole(name, value, least, most)

    def number(self, name: str, default: Any = REQUIRED, *, above: float, below: float) -> float:
        """A finite number strictly within limits; text that spells one is taken, as yaml has it."""
        value = self.take(name, default)
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if not above < found < below:
            self.wrong(name, value, f"a number between {above:g} and {below:g}")
        return found

    def only(self, expected: Mapping[str, Any]) -> None:
        """Keys that may be absent, and may have nothing but these values.

        Args:
            expected: the one value by key, which is also what its absence means; a tuple gives
                several, the first of which is what absence means.
        """
        for name, accepted in expected.items():
            choices = accepted if isinstance(accepted, tuple) else (accepted,)
            value = self.take(name, choices[0])
            if not any(_equal(value, choice) for choice in choices):
                self.refuse(name, value, " or ".join(repr(choice) for choice in choices))

    def harmless(self, names: Iterable[str]) -> None:
        """Takes keys that change nothing here, with any value."""
        self._taken.update(names)

    def wrong(self, name: str, value: Any, expected: str) -> None:
        """Raises the error for a value that no model has."""
        raise ValueError(f"{self.where} has {name}={shown(value)}, expected {expected}")

    def refuse(self, name: str, value: Any, expected: str) -> None:
        """Raises the error for a value that this family of models does not have."""
        raise ValueError(
            f"{self.where} is of another model family: {name}={shown(value)}, expected {expected}"
        )

    def done(self) -> None:
        """Refuses the keys that nobody took.

        Raises:
            ValueError: there are any.
        """
        rest = [str(name)[:SHOWN] for name in self.values if name not in self._taken]
        if rest:
            raise ValueError(
                f"{self.where} has {', '.join(rest[:10])}, which {'are' if rest[1:] else 'is'} not "
                "known to this version and may change the numbers: if you know that "
                f"{'they do' if rest[1:] else 'it does'} not, take the line out of a copy of the "
                "file"
            )

    def _whole(self, name: str, value: Any, least: int, most: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.wrong(name, value, f"a whole number from {least} to {most:,}")
        return value


def shown(value: Any) -> str:
    """A value in an error: short, whatever it is."""
    if isinstance(value, (list, tuple, dict)) and len(cast("Sequence[Any]", value)) > 12:
        return f"a {type(value).__name__} of {len(cast('Sequence[Any]', value))}"
    try:
        text = repr(value)
    except Exception:  # of integers with thousands of digits, and of what nests too deeply
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _equal(value: Any, choice: Any) -> bool:
    """Equality that tells true from 1, and takes a list for a tuple."""
    if isinstance(value, bool) != isinstance(choice, bool):
        return False
    return bool(value == choice)
