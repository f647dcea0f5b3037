"""`python -m workers.console`: says why that is of no use."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    print("workers.console: its ports' other ends are the core's; the core starts it",
          file=sys.stderr)
    sys.exit(1)
