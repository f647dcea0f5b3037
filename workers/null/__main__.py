"""`python -m workers.null`: says why that is of no use."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    print("workers.null: serves the empty slots of one VM; the core starts it", file=sys.stderr)
    sys.exit(1)
