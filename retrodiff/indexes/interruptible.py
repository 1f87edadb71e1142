"""Runs other libraries' native code so that Ctrl-C is heard while it works."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

PAUSE = 0.2
"""Seconds between two looks; a call that ends is noticed at once."""


def heard(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """``call(*args, **kwargs)`` in a thread of its own; an interrupt ends the wait for it.

    Python answers signals in its main thread only, between two of its own instructions: one that
    comes during a native call of minutes waits for its end, or becomes an error of that library.
    After an interrupt the call goes on unseen until it ends or the process does.
    """
    if threading.current_thread() is not threading.main_thread():
        return call(*args, **kwargs)
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call(*args, **kwargs))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="retrodiff-native", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(PAUSE)
    if errors:
        raise errors[0]
    return results[0]
