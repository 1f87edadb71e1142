"""Lets one process at a time write a file or a folder; readers are not disturbed.

The lock is the system's own (``flock``), on the file or folder itself: nothing is left behind when
a process is killed, and none is needed beside a folder whose parent is read-only. Where the system
has none (network and FUSE file systems, Windows), a marker file of the ``filelock`` package is made
beside it instead. That package's other locks leave a file behind in every folder, so they are not
used.
"""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

BUSY = (errno.EWOULDBLOCK, errno.EAGAIN)
PAUSE = 0.02
"""Seconds between two tries."""


@contextmanager
def write_lock(
    path: Path, wait: float = 0.0, make: Callable[[Path], object] | None = None
) -> Iterator[None]:
    """Holds the lock of a file or folder until the end of the block.

    Args:
        path: what will be written.
        wait: seconds to wait for another writer.
        make: called before each try; makes the file or folder if it is missing.

    Raises:
        BlockingIOError: another process, or another thread, is writing there.
        FileNotFoundError: there is nothing at the path.
    """
    until = time.monotonic() + wait
    while (descriptor := _locked(path, make)) is None:
        if time.monotonic() >= until:
            if not os.path.lexists(path):
                raise FileNotFoundError(f"{path} is missing: there is nothing to write to")
            raise _busy(path)
        time.sleep(PAUSE)
    if descriptor < 0:
        with _marked(path, max(0.0, until - time.monotonic())):
            yield
        return
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(path: Path, make: Callable[[Path], object] | None) -> int | None:
    """A descriptor that holds the lock; None while another one does; -1 where there is no lock."""
    if make is not None:
        make(path)
    try:
        import fcntl
    except ImportError:
        return -1
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None  # another writer may be putting another one in its place
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another writer may have put another folder in its place since it was opened.
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in BUSY:
            os.close(descriptor)
            return -1
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextmanager
def _marked(path: Path, wait: float) -> Iterator[None]:
    """The same with a marker file; a marker whose process has ended on this machine is ignored."""
    from filelock import SoftFileLock, Timeout

    lock = SoftFileLock(path.with_name(f".{path.name}.lock"), timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        raise _busy(path, f", or {lock.lock_file} was left behind: delete it then") from None
    except OSError as error:
        warnings.warn(
            f"{path} cannot be locked here ({error.strerror or error}): let no other process write "
            "to it",
            stacklevel=4,
        )
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _busy(path: Path, more: str = "") -> BlockingIOError:
    return BlockingIOError(
        f"{path} is being written by another process: wait until it has finished{more}"
    )
