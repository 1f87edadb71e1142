"""A missing extra is named in one line, and the core needs none.

One program runs without any extra's packages (`without_extras.py`); the tests read what it found.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from without_extras import PACKAGES

ROOT = Path(__file__).parents[1]
TOOLS = {"dev", "docs"}
"""Extras of those who work on retrodiff; nothing in it imports their packages."""

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
CASES = [(extra, name) for extra, names in PACKAGES.items() if extra in EXTRAS for name in names]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = [sys.executable, str(ROOT / "tests" / "without_extras.py")]
    folder = tmp_path_factory.mktemp("without")
    done = subprocess.run([*program, str(folder)], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_extra_has_a_case() -> None:
    assert sorted(set(EXTRAS) - TOOLS - set(PACKAGES)) == []


def test_every_module_of_the_core_is_imported_without_them(found: dict[str, Any]) -> None:
    assert len(found["imported"]) > 200
    assert {name: why for name, why in found["imported"].items() if why is not None} == {}


@pytest.mark.parametrize(("extra", "package"), CASES)
def test_a_missing_extra_is_named_in_one_line(
    found: dict[str, Any], extra: str, package: str
) -> None:
    # Where an extra brings two packages that are used together, one of them is asked for.
    message = found["messages"].get(package)
    if message is None:
        assert package in {"uvicorn", "transformers"}
        return
    assert f"retrodiff[{extra}]" in message
    assert "\n" not in message
