"""Seconds of processor time that importing costs, in fresh processes, beside torch alone.

``python benchmarks/import_cost.py --times 7``
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

IMPORTS = {
    "torch": "import torch",
    "retrodiff after torch": "import retrodiff",
    "retrodiff.presets after torch": "import retrodiff, retrodiff.presets",
    "retrodiff.cli after torch": "import retrodiff.cli; retrodiff.cli.parser()",
    "retrodiff.training after torch": "import retrodiff.training",
}


def seconds(name: str, code: str) -> float:
    """Processor time of one import in a process of its own."""
    before = "" if name == "torch" else "import torch; "
    program = (
        f"{before}import time; start = time.process_time(); {code}; "
        "print(time.process_time() - start)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Prints medians and the least."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=7)
    times = parser.parse_args().times
    for name, code in IMPORTS.items():
        found = [seconds(name, code) for _ in range(times)]
        print(f"{name:32} median {statistics.median(found):.3f} s  least {min(found):.3f} s")


if __name__ == "__main__":
    main()
