"""``retrodiff info``: what a saved model is made of."""

from __future__ import annotations

import argparse
from typing import Any

from retrodiff.cli import options as types


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("info", help="show what a saved model is made of")
    parser.add_argument("model", type=types.path, help="folder of a saved model")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the components, without loading a weight."""
    from pathlib import Path

    from retrodiff.checkpoints.native import read_description

    described = read_description(Path(options.model))
    for slot, value in described["components"].items():
        print(f"{slot:16}{summary(value)}")
    return 0


def summary(value: Any) -> str:
    """A described component in one line, the way it would be written in code."""
    if isinstance(value, list):
        return f"[{', '.join(summary(x) for x in value)}]"
    if not isinstance(value, dict):
        return repr(value)
    if "class" in value:
        inner = ", ".join(f"{k}={summary(v)}" for k, v in value["config"].items())
        return f"{value['class'].rpartition('.')[2]}({inner})"
    if "custom" in value:
        return f"{value['custom']} (not saved: pass your own)"
    if "tensor" in value:
        return "<tensor>"
    if "path" in value:
        fingerprint = value["fingerprint"]
        return f"{value['path']} ({fingerprint['encoder']}, width {fingerprint['dim']})"
    return "{" + ", ".join(f"{k}: {summary(v)}" for k, v in value.items()) + "}"
