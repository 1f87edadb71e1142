"""What the README and the site show is run: Python blocks, and `retrodiff` command lines.

The Python blocks of a page share one namespace and run in an empty folder that holds three small
folders of pictures: ``training``, ``library`` and ``art``. A block below ``<!-- not executed:
reason -->`` is only compiled, and what it imports from retrodiff must exist. Command lines are run
where the page stands in RUN_COMMANDS; elsewhere the parser must accept them.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from retrodiff.cli import main, parser
from retrodiff.model.generated import to_picture

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN_COMMANDS = {"docs/getting_started.md", "docs/tutorials/train_on_a_folder.md"}
# Python blocks that are run, and those below a "not executed" mark, over all pages. Every block
# that needs no download, account or cluster is run.
RUN, NOT_RUN = 85, 25
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*).*\n(?P<body>[\s\S]*?)^(?P=indent)```", re.M
)
NOT_EXECUTED = re.compile(r"<!-- not executed: .+ -->\s*\Z")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    executed: bool

    def commands(self) -> Iterator[list[str]]:
        """The arguments of each ``retrodiff`` line of a shell block."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "retrodiff":
                yield words[1:]

    def compiled(self) -> Any:
        """Python with the page's own line numbers."""
        return compile("\n" * self.line + self.text, self.page, "exec")


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        indent = len(match["indent"])
        body = "".join(line[indent:] or "\n" for line in match["body"].splitlines(keepends=True))
        name = page.relative_to(ROOT).as_posix()
        executed = NOT_EXECUTED.search(before) is None
        found.append(Block(name, before.count("\n") + 1, match["language"], body, executed))
    return found


BLOCKS = {page.relative_to(ROOT).as_posix(): blocks(page) for page in PAGES}


def holds(language: str, executed: bool) -> list[str]:
    return [
        name
        for name, found in BLOCKS.items()
        if any(b.language == language and b.executed == executed for b in found)
    ]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with three small folders of pictures, named as people name them."""
    names = ["IMG_{:04d} (1)", "Zoë's photo {}", "scan.{}.v2"]
    for seed, (name, n) in enumerate({"training": 24, "library": 24, "art": 12}.items()):
        (tmp_path / name / "2019 à la mer").mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        for i in range(n):
            color = torch.rand(3, 1, 1, generator=generator) * 2 - 1
            noise = 0.2 * torch.randn(3, 48, 64, generator=generator)
            folder = tmp_path / name / ("2019 à la mer" if i % 3 == 0 else "")
            to_picture(color + noise).save(folder / f"{names[i % 3].format(i)}.png")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.parametrize("page", holds("python", executed=True))
def test_page_runs(page: str, desk: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCKS[page]:
        if block.language == "python" and block.executed:
            # The code comes from this repository's own pages.
            exec(block.compiled(), namespace)
        elif block.language == "bash" and block.executed and page in RUN_COMMANDS:
            for arguments in block.commands():
                assert main(arguments) == 0, " ".join(arguments)


def test_how_many_blocks_are_run() -> None:
    python = [b for found in BLOCKS.values() for b in found if b.language == "python"]
    assert sum(b.executed for b in python) >= RUN, "a block that was run is run no longer"
    assert sum(not b.executed for b in python) <= NOT_RUN, "a block more that is not run"


def test_every_page_is_reached_from_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]]
    assert [page for page in pages if f": {page}\n" not in listed] == []


def test_commands_are_accepted() -> None:
    for found in BLOCKS.values():
        for block in found:
            if block.language == "bash":
                for arguments in block.commands():
                    parser().parse_args(arguments)


@pytest.mark.parametrize("page", holds("python", executed=False))
def test_block_that_is_not_run_imports_what_exists(page: str) -> None:
    for block in BLOCKS[page]:
        if block.language != "python" or block.executed:
            continue
        block.compiled()
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("retrodiff"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page}: {node.module}.{alias.name}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "presets":
                    assert hasattr(importlib.import_module("retrodiff.presets"), node.attr)


def test_readme_example_is_short() -> None:
    first = next(b for b in BLOCKS["README.md"] if b.language == "python")
    assert len(first.text.strip().splitlines()) <= 15


def test_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "site")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "api" / "interfaces" / "index.html").is_file()
