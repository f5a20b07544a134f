"""`python -m athanor`."""

import sys

from athanor.cli import main

if __name__ == "__main__":
    sys.exit(main())
