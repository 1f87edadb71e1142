"""Runs the notebooks and writes what their cells print and draw below them.

    python examples/notebooks/run.py             # or: make notebooks
    python examples/notebooks/run.py --small --out FOLDER

The notebooks are Markdown as jupytext reads it: open one in Jupyter, or convert it with `jupytext
--to ipynb`. A number behind `# small:` takes the place of the one in its line with `--small`, which
is for tests.
"""

import argparse
import ast
import contextlib
import io
import re
import shutil
from pathlib import Path

HERE = Path(__file__).parent
CELL = re.compile(r"```python\n(.*?)```\n(?:\n<!-- output -->\n.*?<!-- /output -->\n)?", re.S)
SMALL = re.compile(r"= \d+(.*# small: )(\d+)$", re.M)


def shown(value: object, name: str, images: Path) -> str:
    """The last value of a cell: a picture as a file, others as text."""
    if not hasattr(value, "save"):
        return repr(value) + "\n"
    images.mkdir(exist_ok=True)
    value.quantize(255).save(images / f"{name}.png", optimize=True)
    return f"![{name}](images/{name}.png)\n"


def run(notebook: Path, small: bool) -> None:
    """Every cell in one namespace; the file is written when all have run."""
    names, number = {"__name__": "__main__"}, 0

    def cell(match: re.Match[str]) -> str:
        nonlocal number
        number += 1
        code = SMALL.sub(r"= \2\1\2", match[1]) if small else match[1]
        tree, told, drawn = ast.parse(code), io.StringIO(), ""
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(told):
            exec(compile(tree, f"{notebook.name}, cell {number}", "exec"), names)
            value = last and eval(compile(ast.Expression(last.value), "last", "eval"), names)
        if value is not None:
            drawn = shown(value, f"{notebook.stem}-{number}", notebook.parent / "images")
        text = f"```text\n{told.getvalue()}```\n" if told.getvalue() else ""
        if not drawn.startswith("!") and drawn:
            text, drawn = f"```text\n{told.getvalue()}{drawn}```\n", ""
        output = f"\n<!-- output -->\n{text}{drawn}<!-- /output -->\n" if text or drawn else ""
        return f"```python\n{match[1]}```\n{output}"

    notebook.write_text(CELL.sub(cell, notebook.read_text()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--small", action="store_true", help="few steps, for tests")
    parser.add_argument("--out", type=Path, default=HERE, help="folder that copies are run in")
    options = parser.parse_args()
    for source in options.notebooks or sorted(HERE.glob("*.md")):
        options.out.mkdir(parents=True, exist_ok=True)
        notebook = (options.out / source.name).resolve()
        if notebook != source.resolve():
            shutil.copy(source, notebook)
        with contextlib.chdir(options.out):
            run(notebook, options.small)
        print(f"written: {notebook}")
