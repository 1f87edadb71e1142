"""Every public name tells what `docstring_rules` asks for; every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from docstring_rules import RULES, Name, examples, public_names

NAMES = public_names()
# Names that still lack what a rule asks for: a list that may only become shorter.
LACKING: dict[str, set[str]] = {rule: set() for rule in RULES}
# Extras that an example needs.
NEEDS = {
    "retrodiff.bridges.RetrieveReferences": "diffusers",
    "retrodiff.databases.LanceDatabase": "lancedb",
    "retrodiff.evaluation.FidelityExtractor": "torch_fidelity",
    "retrodiff.evaluation.register_extractor": "torch_fidelity",
    "retrodiff.networks.Adapted": "diffusers",
    "retrodiff.networks.DiffusersNetwork": "diffusers",
    "retrodiff.networks.RetrievalAdapter": "diffusers",
    "retrodiff.serving.SearchService": "fastapi",
    "retrodiff.serving.running": "fastapi",
}


@pytest.mark.parametrize("rule", list(RULES))
def test_every_public_name_tells_it(rule: str) -> None:
    assert {str(name) for name in NAMES if RULES[rule](name)} == LACKING[rule]


def test_the_rules_can_fail() -> None:
    def bare(images: torch.Tensor, size: int) -> torch.Tensor:
        if size < 1:
            raise ValueError("size")
        return images

    class Empty:
        """Holds nothing"""

        def __init__(self, number: int) -> None:
            raise ValueError(number)

    bare.__module__ = Empty.__module__ = "retrodiff.made_up"
    Empty.__init__.__module__ = "retrodiff.made_up"
    assert [rule for rule, broken in RULES.items() if broken(Name("m", "bare", bare))] == [
        *("docstring", "arguments", "shapes", "errors")
    ]
    assert [rule for rule, broken in RULES.items() if broken(Name("m", "DDIM", Empty))] == [
        *("docstring", "arguments", "errors", "source", "example")
    ]


@pytest.mark.parametrize("name", [name for name in NAMES if examples(name)], ids=str)
def test_its_example_runs(name: Name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = NEEDS.get(str(name))
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    known: dict[str, Any] = dict(vars(sys.modules[name.value.__module__]), __name__="__main__")
    test = doctest.DocTestParser().get_doctest(name.doc, known, str(name), None, None)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, out=report.append).failed == 0, "".join(report)
