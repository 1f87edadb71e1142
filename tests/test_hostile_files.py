"""Files of strangers: nothing in them is run, fetched, or leads out of their folder.

`hostile.py` puts 40 payloads into every place of every file that retrodiff reads, in a process that
is watched by an audit hook. Here stands what must come of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("hostile")
    done = subprocess.run(
        [sys.executable, str(TESTS / "hostile.py"), str(folder / "files")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_watch_sees_what_it_is_for(seen: dict[str, Any]) -> None:
    found = {r["payload"]: r["seen"] for r in seen["results"] if r["place"] == "control"}
    assert set(found) == {"read", "list", "run", "fetch", "import"}
    assert all(found.values()), found


def test_nothing_is_run_fetched_or_read_outside(seen: dict[str, Any]) -> None:
    assert not seen["ran"]
    cases = [r for r in seen["results"] if r["place"] != "control"]
    assert [r for r in cases if r["seen"]] == []
    payloads = Counter(r["place"] for r in cases)
    assert len(payloads) > 250
    assert sum(n >= 40 for n in payloads.values()) > 150


def test_a_hostile_file_is_refused_in_one_line_or_harmless(seen: dict[str, Any]) -> None:
    cases = [r for r in seen["results"] if r["place"] != "control"]
    assert [r for r in cases if r["end"] not in ("refused", "loaded")] == []
    for case in cases:
        assert "\n" not in case["line"], case
        assert "\x1b" not in case["line"], case
        assert len(case["line"]) < 1500, case


def test_pickles_that_call_or_change_are_refused(seen: dict[str, Any]) -> None:
    cases = [r for r in seen["results"] if r["place"] in ("checkpoint", "plain pickle")]
    harmless = {  # names that stand for empty objects in a checkpoint, or claims that nothing backs
        "call argparse.FileType", "call pathlib.Path.unlink", "new of a function", "memo bomb",
        "long frame", "over and over", "deep list", "object array",
    }  # fmt: skip
    loaded = {r["payload"] for r in cases if r["end"] == "loaded"}
    assert loaded <= harmless
    assert len(cases) > 100


def test_memory_stays_small(seen: dict[str, Any]) -> None:
    assert seen["peak"] < 1.5, f"{seen['peak']:.2f} GB"
