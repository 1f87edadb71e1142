"""Reads what coming steps need in other processes, in the order in which it will be asked for.

Built on ``torch.utils.data.DataLoader``: one item is what one step needs. What a step gets does not
depend on the number of processes, nor on whether there are any.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from retrodiff.databases.sources.limits import one_line
from retrodiff.pictures.decoding import UnreadableImage

KNOWN = (UnreadableImage, FileNotFoundError, OSError, ValueError)
"""Errors of a process that reads which are raised again as what they were, most special first."""


class Read(Protocol):
    """What reads for a step; it is sent to other processes."""

    def __call__(self, step: int, begun: Callable[[int], None]) -> Tensor:
        """What a step needs.

        Args:
            step: its number.
            begun: told the number of each picture before it is read.
        """
        ...

    def name(self, number: int) -> str:
        """What a picture is called in an error."""
        ...


def read_ahead(read: Read, steps: range, workers: int) -> Iterator[Tensor]:
    """What each of the steps needs, in their order.

    Args:
        read: reads for one step.
        steps: their numbers.
        workers: processes that read ahead; 0: this one reads, when it is asked.

    Raises:
        ChildProcessError: a process was killed; the message says what it was reading.
    """
    if not workers:
        for step in steps:
            yield read(step, _nothing)
        return
    # Which process reads which picture: written by them, looked at when one of them is gone.
    board = torch.full((workers, 2), -1, dtype=torch.int64).share_memory_()
    running: Any = _started(_Steps(read, board), steps, workers)
    try:
        while True:
            try:
                found = next(running, None)
            except (RuntimeError, OSError, EOFError) as error:
                dead = {p.pid for p in getattr(running, "_workers", ()) if not p.is_alive()}
                if not dead and "DataLoader worker" not in str(error):
                    raise
                raise _killed(read, board, dead) from None
            if found is None:
                return
            if isinstance(found, Failure):
                raise found.error()
            yield found
    finally:
        # Its processes end when it is deleted, which the traceback of an error would delay.
        end = getattr(running, "_shutdown_workers", None)
        if end is not None:
            end()
        running = None


@dataclass(frozen=True)
class Failure:
    """What went wrong in a process that reads, as text: not every error can be sent."""

    kind: str
    text: str

    def error(self) -> Exception:
        """The error to raise here."""
        kinds = {kind.__name__: kind for kind in KNOWN}
        if self.kind in kinds:
            return kinds[self.kind](self.text)
        return RuntimeError(f"{self.kind}: {self.text}")


class _Steps(Dataset[Any]):
    def __init__(self, read: Read, board: Tensor) -> None:
        self.read, self.board = read, board

    def __getitem__(self, step: int) -> Tensor | Failure:
        info = get_worker_info()
        mine = self.board[0 if info is None else info.id]
        mine[0] = os.getpid()

        def begun(number: int) -> None:
            mine[1] = number

        try:
            return self.read(step, begun)
        except Exception as error:
            kind = next((kind for kind in KNOWN if isinstance(error, kind)), type(error))
            return Failure(kind.__name__, one_line(error) if kind not in KNOWN else str(error))


def _started(reading: _Steps, steps: range, workers: int) -> Any:
    """An iterator whose processes run, without what torch says and does beside that."""
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if here else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = DataLoader(
            reading,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=2,
            worker_init_fn=_begin,
            generator=torch.Generator(),  # else a number would be drawn from torch's global state
        )
        running = iter(loader)
    if here:  # else the death of a process would be raised anywhere, not where pictures are asked
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return running


def _begin(_: int) -> None:
    """Leaves Ctrl-C to the process that asks, which then ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _killed(read: Read, board: Tensor, dead: set[int]) -> Exception:
    found = [number for process, number in board.tolist() if process in dead and number >= 0]
    what = f" at {read.name(found[0])}" if found else ""
    return ChildProcessError(
        f"a process that reads training images ended{what}, killed by hand or for lack of memory: "
        "continue with fewer workers, or with workers=0"
    )


def _nothing(_: int) -> None:
    pass
