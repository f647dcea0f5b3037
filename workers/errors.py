"""Exceptions of the workers.

    StratovirtError
    └── WorkerError
        ├── UsageError     a command line or a start request that can't be honoured
        ├── DiskError      the image is not what was promised, or can't be used
        └── StartError     a stage of the start failed; names the stage
"""

from __future__ import annotations

from shared.errors import StratovirtError


class WorkerError(StratovirtError):
    """Base of the exceptions of the workers."""


class UsageError(WorkerError):
    """A command line or a start request that can't be honoured."""


class DiskError(WorkerError):
    """The image is not what was promised, or can't be used."""


class StartError(WorkerError):
    """A stage of the start failed."""
