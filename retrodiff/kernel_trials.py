"""Hand-written kernels are tried on the caller's own first tensors before they are believed.

A kernel is compiled anew for each device, type and shape, and a fault of that code shows in no test
that ran elsewhere. So the first call of each class is computed both ways: if the kernel does not
run, or its result is further from the formula than plain PyTorch explains, one warning says so with
the numbers, and that class goes the plain way from then on. What was found holds for the process.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TypeVar

import torch

VARIABLE = "RETRODIFF_KERNEL_CHECK"
"""Environment variable: ``0`` turns the check off for the process."""

TRIES = 16
"""Calls of a class that are compared while their tensors could not show a fault."""

T = TypeVar("T")
_on = os.environ.get(VARIABLE, "1") != "0"


class KernelWarning(UserWarning):
    """A kernel was found wrong, or could not be checked, and plain PyTorch takes its place.

    Examples:
        >>> import warnings
        >>> from retrodiff.attention import KernelWarning
        >>> warnings.simplefilter("error", KernelWarning)  # stop instead
        >>> warnings.simplefilter("default", KernelWarning)
    """


@dataclass(frozen=True, kw_only=True)
class Finding:
    """How far one result of a kernel is from the formula.

    Args:
        part: which result, in words.
        error: norm of the difference, as a share of the norm of the exact result.
        allowed: the most that ``error`` may be.
        conclusive: whether a kernel that does nothing would have been found out.
    """

    part: str
    error: float
    allowed: float
    conclusive: bool = True

    @property
    def holds(self) -> bool:
        """Whether the kernel is right as far as this goes; NaN is wrong."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.part} is off by {self.error:.1e} of its size, {self.allowed:.1e} is allowed"


def check_kernels(on: bool = True) -> AbstractContextManager[None]:
    """Turns the check of hand-written kernels on or off, for the whole process.

    ``check_kernels(False)`` holds from now on; ``with check_kernels(False):`` until the end of the
    block. Without the check a kernel runs whatever was found before, and its errors are raised.
    """
    global _on
    before, _on = _on, on
    stack = ExitStack()
    stack.callback(_set, before)
    return stack  # pyright: ignore[reportReturnType] - what it is entered as is no one's concern


def _set(on: bool) -> None:
    global _on
    _on = on


def capturing(device: torch.device) -> bool:
    """Whether the device's work is being recorded, so that no number can be looked at."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _named(error: Exception) -> str:
    told = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {told[0][:200]}"


class Trials:
    """What is known about the classes of one kernel.

    Args:
        kernel: its name in warnings.
        instead: what is taken in its place, in words.
        way_out: what a reader of the warning can do.
    """

    def __init__(self, kernel: str, instead: str, way_out: str) -> None:
        self.kernel, self.instead, self.way_out = kernel, instead, way_out
        self._verdicts: dict[Hashable, str | None] = {}  # None: proven; else why not
        self._tries: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def run(
        self,
        key: Hashable,
        device: torch.device,
        kernel: Callable[[], T],
        plain: Callable[[], T],
        judge: Callable[[T], Sequence[Finding]],
    ) -> T:
        """The kernel's result, or that of the plain way where the kernel is not to be trusted.

        Args:
            key: the class; ``str(key)`` names it in a warning.
            device: of the tensors.
            kernel: runs it.
            plain: the same without it.
            judge: compares the kernel's result.
        """
        if not _on:
            return kernel()
        tried = key in self._verdicts
        if tried and self._verdicts[key] is not None:
            return plain()
        if not tried and capturing(device):
            self._say_once(key)
            return plain()
        try:
            out = kernel()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._refuse(key, f"it raised {_named(error)}")
            return plain()
        if tried:
            return out
        try:
            findings = judge(out)
        except torch.OutOfMemoryError:  # there is room for the kernel alone: another time
            return out
        except Exception as error:  # a fault of the kernel shows when its result is looked at
            self._refuse(key, f"comparing its result raised {_named(error)}")
            return plain()
        wrong = [finding for finding in findings if not finding.holds]
        if wrong:
            self._refuse(key, str(max(wrong, key=lambda f: f.error / max(f.allowed, 1e-30))))
            return plain()
        self._tries[key] = self._tries.get(key, 0) + 1
        if all(finding.conclusive for finding in findings) or self._tries[key] >= TRIES:
            self._verdicts[key] = None
        return out

    def refusal(self, matches: Callable[[Hashable], bool]) -> str | None:
        """Why a kernel of a class that matches is not taken; None: nothing is known against it."""
        if not _on:
            return None
        found = (why for key, why in self._verdicts.items() if why is not None and matches(key))
        return next(found, None)

    def verdicts(self) -> dict[str, str]:
        """What was found so far, by class in words."""
        return {str(key): why or "proven" for key, why in self._verdicts.items()}

    def forget(self) -> None:
        """Tries every class anew."""
        self._verdicts.clear()
        self._tries.clear()

    def _refuse(self, key: Hashable, why: str) -> None:
        with self._lock:
            if self._verdicts.get(key) is not None:
                return
            self._verdicts[key] = why
        warnings.warn(
            f"{self.kernel} is not used for {key}: {why}. {self.instead} is taken in its place "
            f"from now on. {self.way_out}; {VARIABLE}=0 turns this check off",
            KernelWarning,
            stacklevel=3,
        )

    def _say_once(self, key: Hashable) -> None:
        with self._lock:
            first = ("said", key) not in self._tries
            self._tries["said", key] = 1
        if first:
            warnings.warn(
                f"{self.kernel} was not checked for {key} before a CUDA graph recorded it: "
                f"{self.instead[0].lower()}{self.instead[1:]} is recorded. Run the same call once "
                f"before recording, or set {VARIABLE}=0",
                KernelWarning,
                stacklevel=3,
            )
