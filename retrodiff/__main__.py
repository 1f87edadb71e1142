"""The program: ``retrodiff`` and ``python -m retrodiff``."""

import sys

from retrodiff import interrupts


def run() -> int:
    """Runs the command line with signals handled; returns the exit code."""
    interrupts.leave_at_once()
    from retrodiff.cli import main

    code = main(before_run=interrupts.raise_interruptions)
    interrupts.ignore()
    return code


if __name__ == "__main__":
    sys.exit(run())
