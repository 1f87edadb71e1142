"""Reads other people's configuration files, JSON and yaml, with limits that are checked first.

A file of some kilobytes can describe gigabytes (aliases in yaml) or nest until Python's stack ends.
Both readers refuse that before anything is built, and keys that a file gives twice, of which a
parser would silently keep the last.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import yaml

BYTES = 256 * 1024
"""Largest configuration file; the published ones have 4 KB."""
DEPTH = 40
"""Deepest nesting of a configuration; the published ones have 9 levels."""
VALUES = 50_000
"""Most values of a configuration once its aliases are written out; the published ones have 150."""


def read_json(file: Path, most: int = BYTES) -> dict[str, Any]:
    """The object in a JSON file, which may hold -Infinity: diffusers writes that.

    Args:
        file: to be read.
        most: bytes that it may have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object, too large, nested too deeply, or gives a key twice.
    """
    text = _content(file, most)
    try:
        content = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply to be a configuration") from None
    except ValueError as error:
        raise ValueError(f"{file} is no json file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no configuration")
    return cast("dict[str, Any]", content)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a yaml file: plain values only, whatever tags it has.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no yaml mapping, too large, nested too deeply, or gives a key twice.
    """
    import yaml

    text = _content(file)
    try:
        _check_depth(file, text)
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is not None:
            _check_nodes(file, root, {}, set())
            content = loader.construct_document(root)
        else:
            content = None
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no yaml file: {' '.join(str(error).split())[:300]}") from error
    except (ValueError, OverflowError, RecursionError) as error:
        line = str(error)
        raise ValueError(
            line if str(file) in line else f"{file} is no yaml file: {line}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no configuration")
    return cast("dict[str, Any]", content)


def _content(file: Path, most: int = BYTES) -> bytes:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file: check the path of the configuration")
    with file.open("rb") as opened:
        text = opened.read(most + 1)
    if len(text) > most:
        raise ValueError(f"{file} is larger than {most:,} bytes, as no file of its kind is")
    return text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _check_depth(file: Path, text: bytes) -> None:
    """Before nodes are built, which takes a stack frame a level."""
    import yaml

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise ValueError(f"{file} is nested deeper than {DEPTH} levels: no configuration is")


def _check_nodes(file: Path, node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """How many values a node stands for with its aliases written out."""
    import yaml

    if id(node) in above:
        raise ValueError(f"{file} has an alias to what it is part of: write it out")
    if id(node) in sizes:
        return sizes[id(node)]
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = list(node.value)
    elif isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = Counter(keys).most_common(1)[0][0]
            raise ValueError(f"{file} gives the key {twice[:60]!r} twice: keep one of the two")
    size = 1 + sum(_check_nodes(file, part, sizes, above | {id(node)}) for part in parts)
    if size > VALUES:
        raise ValueError(f"{file} stands for more than {VALUES:,} values: no configuration does")
    sizes[id(node)] = size
    return size
