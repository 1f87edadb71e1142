"""What retrodiff says where no extra is installed. Run as a program; prints one JSON object.

    python tests/without_extras.py FOLDER

Every package of the extras is hidden from the import system, then every module of retrodiff that
is not one extra's own is imported, and one thing of each extra is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = {
    "demo": ("sklearn",),
    "pictograms": ("retrodiff_pictograms",),
    "indexes": ("faiss", "usearch"),
    "scann": ("scann",),
    "eval": ("torch_fidelity",),
    "train": ("tensorboard", "lpips"),
    "cuvs": ("cuvs",),
    "ray": ("ray",),
    "lance": ("lancedb",),
    "serve": ("fastapi", "uvicorn"),
    "diffusers": ("diffusers", "transformers"),
    "ui": ("gradio",),
}
"""Extra -> what it installs, by the names that are imported."""

NEEDS = {"retrodiff.serving.routes", "retrodiff.bridges.retrieve_references"}
"""Modules of retrodiff that import an extra's packages when they are imported."""


class Without:
    """A finder of modules that finds none of the extras' packages."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in {p for packages in PACKAGES.values() for p in packages}:
            return None
        find = getattr(self.finder, "find_spec", None)
        return None if find is None else find(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def main() -> None:
    folder = Path(sys.argv[1])
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]  # type: ignore[misc]
    found: dict[str, Any] = {"imported": imported()}
    found["messages"] = {name: message(ask) for name, ask in asked(folder).items()}
    print(json.dumps(found))


def imported() -> dict[str, str | None]:
    """Each module of retrodiff, and why it could not be imported."""
    import retrodiff

    reasons: dict[str, str | None] = {}
    for module in pkgutil.walk_packages(retrodiff.__path__, "retrodiff."):
        if module.name in NEEDS or module.name.startswith(
            ("retrodiff.bridges.hub", "retrodiff.ui")
        ):
            continue
        try:
            importlib.import_module(module.name)
            reasons[module.name] = None
        except ImportError as error:
            reasons[module.name] = str(error)
    return reasons


def asked(folder: Path) -> dict[str, Callable[[], Any]]:
    """Package -> something that needs it."""
    import torch

    from retrodiff import Model, bridges, build_database, demo, open_database
    from retrodiff.databases import Images
    from retrodiff.encoders import TimmEncoder
    from retrodiff.evaluation import FidelityExtractor
    from retrodiff.indexes import CuVS, Faiss, ScaNN, USearch, Vectors
    from retrodiff.serving import SearchService, running
    from retrodiff.testing import small_database
    from retrodiff.training import Log
    from retrodiff.training.stages import lpips_distance

    rows = small_database(rows=40, dim=8, seed=0)
    vectors = Vectors([rows.embeddings(torch.arange(40))])

    def serve() -> None:
        with running(SearchService(rows)):
            pass

    def ray() -> None:
        images = Images(list(torch.rand(4, 3, 32, 32) * 2 - 1))
        encoder = TimmEncoder("test_resnet", image_size=32)
        build_database(folder / "d.rdb", images, encoder, engine="ray")

    def digits() -> None:
        demo.shipped = lambda name: None  # as if its pictograms were there
        demo.run(folder / "demo")

    return {
        "sklearn": digits,
        "retrodiff_pictograms": lambda: Model.load("pictograms"),
        "faiss": lambda: Faiss().build(vectors),
        "usearch": lambda: USearch().build(vectors),
        "scann": lambda: ScaNN().build(vectors),
        "torch_fidelity": lambda: FidelityExtractor("inception-v3-compat"),
        "tensorboard": lambda: Log(folder / "run", tensorboard=True),
        "lpips": lpips_distance,
        "cuvs": lambda: CuVS().build(vectors),
        "ray": ray,
        "lancedb": lambda: open_database(f"lance://{folder}/table"),
        "fastapi": serve,
        "diffusers": lambda: bridges.RetrieveReferences,
        "gradio": lambda: command("ui"),
    }


def command(*arguments: str) -> None:
    """A command that must end with one line on standard error."""
    from retrodiff.cli import main as run

    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.suppress(SystemExit):
        run(list(arguments))
    raise ImportError(told.getvalue().strip())


def message(ask: Callable[[], Any]) -> str:
    try:
        ask()
    except (ImportError, ValueError, FileNotFoundError) as error:
        return str(error)
    return "nothing was raised"


if __name__ == "__main__":
    main()
