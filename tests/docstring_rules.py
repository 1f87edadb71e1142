"""What the docstring of a public name must tell, as rules that a program can check.

``python tests/docstring_rules.py`` lists what each public name lacks.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

import retrodiff

# A shape such as (b, d), (n,), (3, h, w) or (b, k, …).
SHAPE = re.compile(r"\((?:[a-z0-9_]+[+*/' ]*)+(?:,|, [^()]*)\)|\(\.\.\.[^()]*\)")
SOURCE = re.compile(r"\b(?:19|20)\d\d\b|arXiv")
# Methods and ideas that a paper has introduced: the docstring names it, with its year.
FROM_PAPERS = {
    *("AutoregressiveGenerator", "ClassifierFree", "Composed", "DDIM", "DDPM", "DPMpp2M"),
    *("DiT", "DiffusionPrior", "Diverse", "EDMDenoiser", "EpsDenoiser", "Euler", "FlowDenoiser"),
    *("Heun", "Instances", "Interval", "KLAutoencoder", "Karras", "LinearFlow", "LogSpaced"),
    *("MaxSimilarity", "Mixture", "NearestNeighbors", "NeighborCounts", "NeighborEmbeddings"),
    *("PLMS", "PatchDiscriminator", "PixelUnshuffle", "QueryAndNeighbors", "RandomOfTop"),
    *("ReciprocalRankFusion", "ScaledLinear", "Start", "TopM", "UNet", "VDenoiser"),
    *("VQAutoencoder", "X0Denoiser", "authenticity", "clip_score", "cosine", "density_coverage"),
    *("fit_clip", "fit_views", "frechet_distance", "inception_score", "instance_conditioned"),
    *("kernel_distance", "knn_diffusion", "ldm", "mind", "precision_recall", "rarm_dogs"),
    *("rdm_imagenet", "region_retrieval", "ssim", "unclip", "vendi"),
}


@dataclass(frozen=True)
class Name:
    """A public name: where it is exported, and the object."""

    module: str
    name: str
    value: Any

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def is_class(self) -> bool:
        return inspect.isclass(self.value)

    @property
    def doc(self) -> str:
        return inspect.cleandoc(self.value.__doc__ or "")

    def methods(self) -> Iterator[tuple[str, Callable[..., Any]]]:
        """The public methods that the class itself defines."""
        if not self.is_class:
            return
        for name, value in vars(self.value).items():
            function = getattr(value, "__func__", getattr(value, "fget", None) or value)
            if not name.startswith("_") and inspect.isfunction(function):
                yield name, function


def public_names() -> list[Name]:
    """Classes and functions of the public packages, each once, at the place that exports it first.

    Aliases of types and constants have no docstring of their own and are not among them.
    """
    modules: list[types.ModuleType] = [retrodiff]
    for found in pkgutil.iter_modules(retrodiff.__path__, "retrodiff."):
        module = importlib.import_module(found.name) if found.name != "retrodiff.__main__" else None
        if module is not None and hasattr(module, "__all__"):
            modules.append(module)
    names: dict[int, Name] = {}
    for module in modules:
        for name in sorted(module.__all__):
            value = getattr(module, name)
            plain = inspect.isclass(value) or inspect.isroutine(value)
            own = str(getattr(value, "__module__", "")).startswith("retrodiff")
            if plain and own and not isinstance(value, types.GenericAlias):
                names.setdefault(id(value), Name(module.__name__, name, value))
    return list(names.values())


def lacks(name: Name) -> list[str]:
    """The rules that the name breaks."""
    return [rule for rule, broken in RULES.items() if broken(name)]


def no_docstring(name: Name) -> bool:
    """A docstring of its own whose first line is one sentence; so has every public method."""
    own = vars(name.value).get("__doc__") if name.is_class else name.value.__doc__
    if not own or name.doc.startswith(f"{name.name}("):
        return True
    first = name.doc.splitlines()[0].rstrip()
    return not first.endswith((".", ":", "?")) or any(not f.__doc__ for _, f in name.methods())


def arguments_unnamed(name: Name) -> bool:
    """Every argument is named in the docstring, of a class in that of the class or `__init__`."""
    value = name.value
    if name.is_class and (issubclass(value, BaseException) or getattr(value, "_is_protocol", 0)):
        return False
    if name.is_class and not (is_dataclass(value) or "__init__" in vars(value)):
        return False
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return False
    doc = name.doc + (inspect.getdoc(value.__init__) or "" if name.is_class else "")
    wanted = [p.name for p in parameters if not p.name.startswith("_")]
    if len(wanted) == 1 and not name.is_class:
        return False  # the sentence is about the one argument
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    various = {p.name for p in parameters if p.kind in kinds}
    return any(not re.search(rf"\b{n}\b", doc) for n in wanted if n not in various)


def shapes_missing(name: Name) -> bool:
    """Where tensors go in or out, a shape stands in the docstring of the class or the function."""
    if not name.is_class:
        return _tensors(name.value) and not SHAPE.search(name.doc)
    functions = dict(name.methods())
    docs = [name.doc, inspect.getdoc(name.value.__init__) or ""]
    for base in name.value.__mro__:  # a method's shapes may stand in the protocol that it fulfills
        docs += [inspect.getdoc(vars(base)[m]) or "" for m in functions if m in vars(base)]
    uses = any(map(_tensors, [*functions.values(), name.value.__init__])) or "Tensor" in str(
        vars(name.value).get("__annotations__", {})
    )
    return uses and not any(SHAPE.search(doc) for doc in docs)


def errors_missing(name: Name) -> bool:
    """A function that raises says so under ``Raises``, a method there or in its class.

    Not the checks of `retrodiff.testing`: that they raise AssertionError is what they are for.
    """
    if name.module == "retrodiff.testing":
        return False
    if not name.is_class:
        return _raises(name.value) and "Raises:" not in name.doc
    made = [vars(name.value)[m] for m in ("__init__", "__post_init__") if m in vars(name.value)]
    made_doc = name.doc + "".join(inspect.getdoc(f) or "" for f in made)
    if any(map(_raises, made)) and "Raises:" not in made_doc:
        return True
    return any(
        _raises(f) and "Raises:" not in (inspect.getdoc(f) or "") and "Raises:" not in name.doc
        for _, f in name.methods()
    )


def source_missing(name: Name) -> bool:
    """What a paper introduced names the paper and its year."""
    return name.name in FROM_PAPERS and not SOURCE.search(name.doc)


def example_missing(name: Name) -> bool:
    """A class has an example of which at least one statement is run."""
    return name.is_class and not any(
        not example.options.get(doctest.SKIP) for example in examples(name)
    )


def examples(name: Name) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(name.doc)


RULES: dict[str, Callable[[Name], bool]] = {
    "docstring": no_docstring,
    "arguments": arguments_unnamed,
    "shapes": shapes_missing,
    "errors": errors_missing,
    "source": source_missing,
    "example": example_missing,
}


def _tensors(function: Callable[..., Any]) -> bool:
    """Whether it takes or returns tensors; dictionaries of weights are not meant."""
    return bool(re.search(r"(?<!str, )Tensor\b", str(getattr(function, "__annotations__", {}))))


def _raises(function: Callable[..., Any]) -> bool:
    """Whether a raise statement stands in the body itself, not in a function within it."""
    function = inspect.unwrap(function)
    if not str(getattr(function, "__module__", "")).startswith("retrodiff"):
        return False  # of a protocol, a dataclass
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError, TypeError):
        return False

    def within(node: ast.AST) -> bool:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
                continue
            if isinstance(child, ast.Raise):
                inner = ("NotImplementedError", "AssertionError")
                if child.exc is not None and not any(e in ast.dump(child.exc) for e in inner):
                    return True
            elif within(child):
                return True
        return False

    return within(tree)


if __name__ == "__main__":
    for rule in RULES:
        lacking = [n for n in public_names() if RULES[rule](n)]
        print(f"{rule}: {len(lacking)}\n  " + "\n  ".join(map(str, lacking)))
