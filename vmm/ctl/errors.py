"""What `stratoctl` tells when it can't do something."""

from __future__ import annotations

from shared.errors import SharedError


class CtlError(SharedError):
    """Something that its user can do something about: one line, exit status 1."""


class QmpRefused(CtlError):
    """The VM answered a command with an error.

    error_class: QMP's class, as `DeviceNotActive`.
    """

    def __init__(self, error_class: str, what: str) -> None:
        super().__init__(what)
        self.error_class = error_class


class NoAnswerError(CtlError, TimeoutError):
    """The VM didn't answer in time."""


class GoneError(CtlError):
    """The VM closed the connection, as it does when it ends."""
