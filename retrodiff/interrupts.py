"""Answers Ctrl-C and requests to end (SIGTERM) from the first moment of a program to its last."""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []


class Interruption(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def leave_at_once() -> None:
    """From here on a signal ends the program with one line, as while packages load."""
    _handle(_leave)


def raise_interruptions() -> None:
    """From here on a signal raises `Interruption`, so that work can be kept."""
    _handle(_raise)


def ignore() -> None:
    """From here on signals are ignored: the work is done, and the interpreter is leaving."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def received() -> int | None:
    """The last signal that raised, even if a library turned it into an error of its own."""
    return _received[-1] if _received else None


def _handle(handler: "signal._HANDLER") -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _leave(number: int, _: FrameType | None) -> None:
    os.write(2, b"retrodiff: interrupted\n")
    os._exit(128 + number)


def _raise(number: int, _: FrameType | None) -> None:
    _received.append(number)
    raise Interruption(number)
