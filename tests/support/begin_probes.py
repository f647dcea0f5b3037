"""In place of workers/begin.py: a nursery whose blk workers are probes (sandbox_probe.py)."""

import sys

sys.path[:0] = [path for path in sys.argv[1:] if path not in sys.path]
from tests.support.sandbox_probe import main  # noqa: E402

main()
