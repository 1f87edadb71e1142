"""The wheel: what is in it, and that it works where the repository is not."""

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import retrodiff

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS_TESTED = ("demo", "indexes", "eval", "train", "lance", "ray", "serve", "diffusers")
pytest.importorskip("hatchling")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"retrodiff"}
    for path in (ROOT / "retrodiff").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_presets_import_from_the_installed_wheel_without_annoy(wheel, tmp_path):
    """An empty environment that sees this one's dependencies, but not this repository."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    zipfile.ZipFile(wheel).extractall(where)
    code = (
        "import sys; sys.modules['annoy'] = None\n"
        "import retrodiff; from retrodiff import presets\n"
        "from retrodiff.testing import check_retriever\n"
        "from retrodiff.retrieval import NearestNeighbors\n"
        "check_retriever(NearestNeighbors())\n"
        "print(retrodiff.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    done = subprocess.run(
        [python, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(tmp_path))


LARGEST = 900_000
"""Bytes of the wheel. The aim is 500,000; see docs/benchmarks.md, Packages."""


def test_the_wheel_is_typed_and_small(wheel):
    assert "retrodiff/py.typed" in zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size <= LARGEST
    sizes = {i.filename: i.compress_size for i in zipfile.ZipFile(wheel).infolist()}
    assert {name: n for name, n in sizes.items() if n > 20_000} == {}  # no data has slipped in


def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    about = email.message_from_bytes(archive.read(name))
    assert about["License-Expression"] == "Apache-2.0"
    assert set(about.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    pythons = {c.rpartition(" ")[2] for c in about.get_all("Classifier") if "Python :: 3." in c}
    assert pythons == {"3.11", "3.12", "3.13", "3.14"}
    matrix = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert all(f'"{python}"' in matrix for python in pythons)


def test_citation_and_package_have_one_version():
    import yaml

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == PROJECT["version"] == retrodiff.__version__


@pytest.mark.parametrize("which", ["core", "extras"])
def test_the_lower_bounds_are_those_that_were_tested(which):
    """`.github/lowest/run.sh` installs them, runs tests, and writes the set."""
    listed = (ROOT / ".github" / "lowest" / f"{which}.txt").read_text().splitlines()
    tested = {canonicalize_name(n): Version(v) for n, _, v in (x.partition("==") for x in listed)}
    extras = () if which == "core" else EXTRAS_TESTED
    asked = [*PROJECT["dependencies"] * (which == "core")]
    asked += [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    wrong = {}
    for requirement in map(Requirement, asked):
        (bound,) = requirement.specifier
        found = tested[canonicalize_name(requirement.name)]
        if found != Version(bound.version):
            wrong[requirement.name] = f"{bound} in pyproject.toml, tested with {found}"
    assert wrong == {}


@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed")
def test_a_users_program_passes_pyright_in_strict_mode(tmp_path):
    shutil.copy(ROOT / "tests" / "typed_program.py", tmp_path / "program.py")
    settings = {
        "include": ["program.py"],
        "typeCheckingMode": "strict",
        "reportMissingTypeStubs": False,
        "pythonVersion": "3.11",
        "extraPaths": [str(ROOT)],
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = ["pyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] >= 1
    assert [found["message"] for found in report["generalDiagnostics"]] == []
