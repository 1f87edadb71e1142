"""The command line: ``retrodiff demo | database | train | sample | serve | info | convert | ...``.

Thin over the public functions. User errors print one line to stderr and exit with 2, an interrupt
prints one line and exits with 130 (Ctrl-C) or 143 (SIGTERM).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence

from retrodiff import interrupts
from retrodiff.cli.options import Parser
from retrodiff.cli.words import in_options


def parser() -> Parser:
    """The whole command line."""
    from retrodiff import __version__
    from retrodiff.cli import (
        convert,
        credit,
        database,
        demo,
        evaluate,
        info,
        sample,
        serve,
        train,
        train_autoencoder,
        train_encoder,
        tune,
        ui,
    )

    top = Parser(
        prog="retrodiff", description="Retrieval-augmented diffusion models on your own images."
    )
    top.add_argument("--version", action="version", version=f"retrodiff {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        demo,
        database,
        train_encoder,
        train_autoencoder,
        train,
        sample,
        ui,
        serve,
        evaluate,
        credit,
        info,
        convert,
        tune,
    ):
        module.add_parser(commands)
    return top


def main(
    arguments: Sequence[str] | None = None, *, before_run: Callable[[], None] | None = None
) -> int:
    """Runs a command; returns the exit code.

    Args:
        arguments: the command line; None: that of the program.
        before_run: called when the command line is read, before any work.
    """
    resumable, names = False, list[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _shown
        try:
            options = parser().parse_args(arguments)
            names = list(vars(options))
            resumable = "resume" in names
            if before_run is not None:
                before_run()
            return options.run(options) or 0
        except KeyboardInterrupt as interrupt:
            return _interrupted(getattr(interrupt, "number", 2), resumable)
        except BrokenPipeError:
            return 0
        except Exception as error:
            if (number := interrupts.received()) is not None:
                return _interrupted(number, resumable)
            if not _of_the_user(error):
                raise
            _line(in_options(str(error) or type(error).__name__, names))
            return 2


def _interrupted(number: int, resumable: bool) -> int:
    advice = "; what is done is kept, continue with --resume" if resumable else ""
    _line(f"interrupted{advice}")
    return 128 + number


def _of_the_user(error: Exception) -> bool:
    """Whether a line says enough: bad input, files, packages, devices, and memory."""
    if isinstance(error, (ValueError, OSError, ArithmeticError, ImportError, MemoryError)):
        return True
    device = ("out of memory", "not enough memory", "CUDA error", "MPS backend")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in device)


def _line(text: str) -> None:
    print(f"retrodiff: {' '.join(text.split())}", file=sys.stderr)


def _shown(message: Warning | str, *_: object, **__: object) -> None:
    _line(str(message))
