"""Foreign configuration files: limits that are checked first, and keys that nobody knows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from retrodiff.checkpoints.foreign.parsed import BYTES, read_json, read_yaml
from retrodiff.checkpoints.foreign.settings import Settings, shown


def bomb(levels: int = 30) -> str:
    """A billion laughs: each line stands for nine of the one before it."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
    return "\n".join(lines)


HOSTILE_YAML = {
    "aliases": bomb(),
    "merged aliases": "a0: &a0 {k: 1}\n"
    + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)),
    "an alias to itself": "a: &a [*a]",
    "nested": "[" * 5000,
    "nested mappings": "\n".join(" " * i + f"k{i}:" for i in range(300)),
    "large": "a: " + "x" * BYTES,
    "code": "!!python/object/apply:os.system ['exit 3']",
    "twice": "model: 1\nmodel: 2",
    "a number of many digits": "a: " + "9" * 10_000,
    "a number in base 60": "a: 1" + ":59" * 20_000,
    "no mapping": "[1, 2]",
    "not text": "\x00\x01",
    "a date that is none": "a: 2026-99-99",
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_yaml_is_one_line_and_quick(name: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(HOSTILE_YAML[name])
    start = time.process_time()
    with pytest.raises(ValueError, match=r"(config\.yaml|its number)") as caught:
        Settings(read_yaml(file), "its number").whole("a")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert time.process_time() - start < 10


def test_aliases_that_stand_for_little_are_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("a: &a {k: 1}\nb: *a\nc: {<<: *a, l: 2}")
    assert read_yaml(file) == {"a": {"k": 1}, "b": {"k": 1}, "c": {"k": 1, "l": 2}}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_of_other_editors_are_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("# é\r\na: 1\r\n".encode(encoding))
    assert read_yaml(tmp_path / "a.yaml") == {"a": 1}
    if encoding != "utf-16":
        (tmp_path / "a.json").write_bytes('{"a": "é"}'.encode(encoding))
        assert read_json(tmp_path / "a.json") == {"a": "é"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 20_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ("[]", "no configuration"),
        ("{", "no json"),
        ('{"a": ' + "9" * 10_000 + "}", "no json"),
        ('{"a": "' + "x" * BYTES + '"}', "larger than"),
        ("\xff", "no json"),
    ],
)
def test_hostile_json_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as caught:
        read_json(file)
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_key_is_taken_or_named() -> None:
    settings = Settings({"a": 1, "b": 2, "c": 3, "d": 4}, "it")
    assert settings.whole("a") == 1
    settings.only({"b": 2})
    settings.harmless(["c", "e"])
    with pytest.raises(ValueError, match=r"it has d, which is not known .*copy of the file"):
        settings.done()
    settings.take("d")
    settings.done()


@pytest.mark.parametrize(
    "value",
    [2**40, 10**5000, -1, 0, 1.5, True, "8", None, [], [8], {"a": 1}, float("nan")],
    ids=lambda value: shown(value)[:20],
)
def test_numbers_out_of_range_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"it has n=.* a whole number from 1 to 65,536") as caught:
        Settings({"n": value}, "it").whole("n")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 10**400, True, None, "x", 1, 0, []],
    ids=lambda value: shown(value)[:20],
)
def test_a_number_is_finite_and_within(value: Any) -> None:
    with pytest.raises(ValueError, match="a number between 0 and 1"):
        Settings({"n": value}, "it").number("n", above=0, below=1)


def test_numbers_as_people_write_them() -> None:
    assert Settings({"n": "15e-4"}, "it").number("n", above=0, below=1) == 0.0015
    assert Settings({"n": [2, 2, 2]}, "it").same("n") == 2
    with pytest.raises(ValueError, match=r"n=\[1, 2\], expected the same number for all levels"):
        Settings({"n": [1, 2]}, "it").same("n")
    with pytest.raises(ValueError, match="a list of 1 to 3 whole numbers"):
        Settings({"n": [1] * 4}, "it").wholes("n", longest=3)


def test_true_is_not_one() -> None:
    with pytest.raises(ValueError, match="flag=1, expected True"):
        Settings({"flag": 1}, "it").only({"flag": True})
    Settings({"flag": 1.0}, "it").only({"flag": 1})


def test_values_are_shown_shortly() -> None:
    assert shown(10**5000) == "a int too large to print"
    assert shown(list(range(1000))) == "a list of 1000"
    assert len(shown("x" * 1000)) == 60
    assert json.loads(shown([1, 2])) == [1, 2]
