"""Handles Ctrl-C and SIGTERM from the first moment of a program to its last."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


class Postponed:
    """Signals that have come while they are held back; see `postponed`."""

    def __init__(self) -> None:
        self.shielded = False
        """Hold back the second signal, too."""
        self.number: int | None = None
        """The first signal; None: none has come."""

    def check(self) -> None:
        """Raises `Interruption` if a signal has come."""
        if self.number is not None:
            raise Interruption(self.number)

    def _receive(self, number: int, _: FrameType | None) -> None:
        second = self.number is not None
        self.number = number
        if second and not self.shielded:
            raise Interruption(number)


@contextmanager
def postponed() -> Iterator[Postponed]:
    """Holds Ctrl-C and SIGTERM back until `Postponed.check` is called; a second one raises at once.

    For work that has to end a step before its state can be kept. Handlers are put back at the end.
    Handlers of the user's own, ignored signals, and threads other than the main one stay as they
    are: there, nothing is held back.
    """
    held = Postponed()
    before: dict[int, signal._HANDLER] = {}
    ours = (signal.SIG_DFL, signal.default_int_handler, _raise, _leave)
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if (handler := signal.getsignal(number)) in ours:
                before[number] = handler
                signal.signal(number, held._receive)
    try:
        yield held
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(handler: "signal._HANDLER") -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _leave(number: int, _: FrameType | None) -> None:
    os.write(2, b"retrodiff: interrupted\n")
    os._exit(128 + number)


def _raise(number: int, _: FrameType | None) -> None:
    _received.append(number)
    raise Interruption(number)
