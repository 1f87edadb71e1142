"""Who may import whom, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "retrodiff"
# A module may import, at its top level, from its own layer's siblings listed here and from below.
LAYERS = [
    {"devices", "interrupts", "kernel_trials", "numbers", "precision", "randomness", "text"},
    {"components", "disk", "progress"},
    {"interfaces", "pictures"},
    {"attention", "autoregressive", "indexes", "encoders", "retrieval", "diffusion"},
    {"networks", "databases"},
    {"checkpoints"},
    {"model"},
    {"builder"},
    {"training", "presets", "evaluation", "bridges"},
    {"demo", "serving"},
    {"ui"},
    {"cli"},
    {"__init__", "__main__", "testing"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The command line trains through presets; training reads folders as databases do.
HEAVY = (
    "open_clip",
    "timm",
    "annoy",
    "pyarrow",
    "sklearn",
    "skimage",
    "PIL",
    "torch_ema",
    "ray",
    "diffusers",
    "gradio",
    "fastapi",
)
# Files that are imported only when they are asked for: a class of diffusers, routes of fastapi.
LATE = {("retrieve_references.py", "diffusers"), ("routes.py", "fastapi")}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def top_level_imports(path: Path):
    """Modules imported when the file is, leaving out what only type checkers see."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    mine = room(path)
    assert mine in LEVEL, f"{mine} has no place in the layers: give it one"
    for module in top_level_imports(path):
        parts = module.split(".")
        if parts[0] != "retrodiff" or len(parts) == 1:
            continue
        theirs = parts[1]
        assert theirs == mine or LEVEL[theirs] < LEVEL[mine], (
            f"{path.relative_to(PACKAGE)} imports {module}: {mine} may not import {theirs}"
        )


def module_of(path):
    parts = ("retrodiff", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(path, modules):
    """Modules of ours that a file imports anywhere, in functions too, but not for types only."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in for_types and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if (found := inner if inner in modules else node.module) in modules:
                    yield found


def test_no_module_imports_itself_through_others():
    modules = {module_of(path): path for path in FILES}
    graph = {name: set(imported_by(path, modules)) - {name} for name, path in modules.items()}
    while leaves := [name for name, theirs in graph.items() if not theirs]:
        graph = {name: theirs - set(leaves) for name, theirs in graph.items() if name not in leaves}
    assert not graph, f"a circle among {sorted(graph)}"


def test_no_two_files_share_a_name():
    names = [path.name for path in FILES if path.name != "__init__.py"]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_where_they_are_used(path):
    heavy = [name for name in HEAVY if (path.name, name) not in LATE]
    found = [m for m in top_level_imports(path) if m.split(".")[0] in heavy]
    assert not found, f"{path}: import {found} inside the function that needs it"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_everything_loads_no_heavy_package():
    code = (
        "import sys, retrodiff, retrodiff.presets, retrodiff.bridges, retrodiff.cli\n"
        "import retrodiff.testing\n"
        "retrodiff.cli.parser()\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert run(code).strip() == "[]"


def test_readers_of_other_projects_files_are_imported_when_they_are_called():
    code = (
        "import sys, retrodiff, retrodiff.presets, retrodiff.checkpoints as c\n"
        "there = {'compvis', 'diffusers', 'load'}\n"
        "names = {f'retrodiff.checkpoints.foreign.{n}' for n in there}\n"
        "before = names & sys.modules.keys()\n"
        "assert all(callable(getattr(c, n)) for n in c.__all__ if n.startswith('load'))\n"
        "print(len(before), len(names & sys.modules.keys()), hasattr(c, 'load_nothing'))"
    )
    assert run(code).split() == ["0", "3", "False"]


def test_import_costs_little_more_than_torch():
    """The bound is 0.3 s; the median of three, since a busy machine is slow at everything."""
    code = (
        "import time; import torch; start = time.process_time()\n"
        "import retrodiff, retrodiff.presets\n"
        "print(time.process_time() - start)"
    )
    assert sorted(float(run(code)) for _ in range(3))[1] <= 0.3
