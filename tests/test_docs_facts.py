"""What pages say of the source is still so: quoted messages, files, names and tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from docstring_rules import public_names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# `retrodiff/file.py::Name`, `tests/test_x.py::test_name`
PLACE = re.compile(r"`((?:retrodiff|tests|benchmarks|examples)/[\w/]+\.py)(?:::(\w+))?`")
MESSAGE = re.compile(r"^```text\n(.+)\n```$", re.M)


@cache
def texts() -> tuple[str, ...]:
    """Every text in the source of the library, with … for what is filled in."""
    return tuple(_texts())


def _texts() -> Iterator[str]:
    for file in sorted((ROOT / "retrodiff").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                yield "".join(str(part) for part in parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def messages() -> list[str]:
    page = (DOCS / "troubleshooting.md").read_text()
    return MESSAGE.findall(page[page.index("<!-- messages") : page.index("<!-- /messages")])


def test_there_are_messages() -> None:
    assert len(messages()) >= 20


@pytest.mark.parametrize("message", messages())
def test_a_quoted_message_is_in_the_source(message: str) -> None:
    assert any(message in text for text in texts())


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md")))
def test_places_in_the_source_exist(page: str) -> None:
    for file, name in PLACE.findall((DOCS / page).read_text()):
        assert (ROOT / file).is_file(), file
        if name:
            tree = ast.parse((ROOT / file).read_text())
            kinds = (ast.ClassDef, ast.FunctionDef)
            assert name in {n.name for n in tree.body if isinstance(n, kinds)}, f"{file}::{name}"


def test_the_paper_is_followed_to_its_tests() -> None:
    rows = [r for r in (DOCS / "paper.md").read_text().splitlines() if "`retrodiff/" in r]
    assert len(rows) >= 20
    assert [row for row in rows if "`tests/" not in row] == []


def test_every_preset_is_on_its_page() -> None:
    from retrodiff import presets

    page = (DOCS / "api" / "presets.md").read_text()
    assert [n for n in presets.__all__ if f"retrodiff.presets.{n}\n" not in page] == []


def test_every_public_name_is_on_a_page_of_the_api() -> None:
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(r"^::: [\w.]*\.(\w+)$|^        - (\w+)$", pages, re.M))
    names = {name for pair in shown for name in pair}
    assert [str(name) for name in public_names() if name.name not in names] == []


def test_a_function_and_not_the_module_of_its_name_is_shown() -> None:
    for page in (DOCS / "api").glob("*.md"):
        for path in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M):
            file = ROOT / (path.replace(".", "/") + ".py")
            assert not file.is_file() or "members:" in page.read_text(), path
