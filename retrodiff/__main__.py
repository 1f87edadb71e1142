"""``python -m retrodiff``."""

import sys

from retrodiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
