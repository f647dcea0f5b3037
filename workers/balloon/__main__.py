"""`python -m workers.balloon`: says why that is of no use."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    print("workers.balloon: serves the balloon of one VM; the core starts it", file=sys.stderr)
    sys.exit(1)
