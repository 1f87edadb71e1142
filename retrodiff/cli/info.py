"""``retrodiff info``: what a saved model is made of."""

from __future__ import annotations

import argparse
from typing import Any

from retrodiff.cli import options as types
from retrodiff.text import printable


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("info", help="show what a saved model is made of")
    parser.add_argument("model", type=types.path, help="folder or name of a saved model")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the components, without loading a weight."""
    from pathlib import Path

    from retrodiff.checkpoints.native import read_description
    from retrodiff.disk.shipped import shipped

    described = read_description(shipped(options.model) or Path(options.model))
    for slot, value in described["components"].items():
        print(f"{printable(slot):16}{printable(summary(value))}")
    return 0


def summary(value: Any) -> str:
    """A described component in one line, the way it would be written in code."""
    if isinstance(value, list):
        return f"[{', '.join(summary(x) for x in value)}]"
    if not isinstance(value, dict):
        return repr(value)
    if "class" in value and isinstance(config := value.get("config"), dict):
        inner = ", ".join(f"{k}={summary(v)}" for k, v in config.items())
        return f"{str(value['class']).rpartition('.')[2]}({inner})"
    if "custom" in value:
        return f"{value['custom']} (not saved: pass your own)"
    if "tensor" in value:
        return "<tensor>"
    if "path" in value and isinstance(made := value.get("fingerprint"), dict):
        return f"{value['path']} ({made.get('encoder')}, width {made.get('dim')})"
    return "{" + ", ".join(f"{k}: {summary(v)}" for k, v in value.items()) + "}"
