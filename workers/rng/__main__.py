"""`python -m workers.rng`: see program.py."""

from __future__ import annotations

import sys

from workers.rng.program import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
