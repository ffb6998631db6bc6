"""``python -m edgeml``: see `edgeml.cli`."""

import sys

from edgeml.cli import main

if __name__ == "__main__":  # the processes that a command starts import this as well
    sys.exit(main())
