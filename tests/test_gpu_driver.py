"""`make gpu`: every stage runs at toy size here, continues, and says what a machine lacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRIVER = ROOT / "benchmarks" / "gpu.py"
ALONE = """
import sys
OURS = {"torch", "triton", "numpy", "einops", "retrodiff", "torchgen", "functorch"}
# What torch itself needs, by its metadata.
THEIRS = {"typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec",
          "filelock", "setuptools", "pkg_resources", "_distutils_hack", "cuda", "nvidia"}
BENCHES = {"gpu", "gpu_report", "kernel_checks", "neighbor_attention", "gpu_search",
           "gpu_throughput", "unet_step", "rarm", "write_figures"}
ALLOWED = OURS | THEIRS | BENCHES | set(sys.stdlib_module_names) | {"__main__"}

class Blocked:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first not in ALLOWED and not first.startswith("_sysconfigdata"):
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Blocked(finder) for finder in sys.meta_path]
"""


def driver(*options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DRIVER), *map(str, options)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """Every stage at toy size; a page that gets the tables; with nothing but torch around."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "sitecustomize.py").write_text(ALONE)
    page = folder / "gpu.md"
    shutil.copy(ROOT / "docs" / "gpu.md", page)
    out = folder / "out"
    done = driver(
        "--small", "--device", "cpu", "--folder", out, "--docs", page,
        PYTHONPATH=str(folder),
    )  # fmt: skip
    return done, out, page


def test_every_stage_runs_with_nothing_but_torch(small) -> None:
    done, out, _ = small
    assert done.returncode == 0, done.stdout + done.stderr
    listed = [line.split()[0] for line in driver("--list").stdout.splitlines()]
    assert listed[-1] == "report"
    for stage in listed[:-1]:
        units = [json.loads(path.read_text()) for path in (out / stage).glob("*.json")]
        assert units, stage
        assert all("error" not in unit for unit in units), units
        assert all(unit["about"]["versions"]["torch"] for unit in units)
    left_out = json.loads(next((out / "tests").glob("*.json")).read_text())["result"]
    assert left_out["left_out"] == "pytest is not installed"


def test_bounds_tables_and_figures_are_written(small) -> None:
    done, out, page = small
    assert "attention forward ≥ 4 × eager default" in done.stdout
    assert "search: 20M rows of 512, 128 queries ≤ 8 ms" in done.stdout
    whole = json.loads((out / "gpu.json").read_text())
    told = {what: verdict for what, _, verdict in whole["bounds"]}
    assert told["search: recall 1.0"] == "toy sizes: says nothing"
    assert told["kernels against float64"] == "yes"
    names = {path.name for path in out.glob("*.csv")}
    assert {"attention.csv", "search.csv", "throughput.csv", "rarm.csv", "tune.csv"} <= names
    text = page.read_text()
    assert "### Neighbor attention" in text
    assert whole["about"]["date"] in text
    assert (ROOT / "docs" / "gpu.md").read_text() != text


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(small) -> None:
    _, out, _ = small
    options = ("--small", "--device", "cpu", "--folder", out, "--stage", "machine")
    file = out / "machine" / "machine.json"
    before = file.read_text()
    broken = json.loads(before)
    del broken["result"]
    file.write_text(json.dumps(broken | {"error": "did not end"}))
    done = driver(*options)  # known, and passed over
    assert done.returncode == 1
    assert "failed: machine, machine: did not end" in done.stdout
    assert driver(*options, "--again").returncode == 0
    assert "result" in json.loads(file.read_text())


def test_a_machine_without_a_gpu_is_told_in_one_line() -> None:
    done = driver(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "sees no CUDA device here" in done.stderr
    done = driver("--device", "cpu")  # without --small it would say something about speed
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
