"""The command line: ``retrodiff demo | database | train | sample | info | convert``.

Thin over the public functions. What the user can mend ends with one line on standard error and exit
code 2; an interrupted command with 130.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from retrodiff import __version__
    from retrodiff.cli import convert, database, demo, info, sample, train

    top = argparse.ArgumentParser(
        prog="retrodiff", description="Retrieval-augmented diffusion models on your own images."
    )
    top.add_argument("--version", action="version", version=f"retrodiff {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (demo, database, train, sample, info, convert):
        module.add_parser(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    options = parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _shown
        try:
            return options.run(options) or 0
        except (ValueError, OSError) as error:
            print(f"retrodiff: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("retrodiff: interrupted; continue with --resume", file=sys.stderr)
            return 130


def _shown(message: Warning | str, *_: object, **__: object) -> None:
    print(f"retrodiff: {message}", file=sys.stderr)
