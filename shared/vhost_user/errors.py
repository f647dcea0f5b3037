"""What can go wrong between a vhost-user front end and back end, and what to do about it.

    SharedError
    └── VhostUserError
        ├── PeerRefusedError     the peer answered "no": connection good, the device reports it
        ├── ConnectionLostError  the peer closed or died: start a new back end
        ├── ProtocolError        the peer broke the protocol: close, don't trust it again
        ├── TimedOutError        no answer within the limit: ask again later, or close
        └── AbortedError         we gave up the wait ourselves: close, we are ending

`usable` says whether the connection can always carry messages afterwards (after a timeout only
if no message was cut: `Connection.broken` tells), `restart` whether a supervisor may start the
same back end again in the hope of better.
"""

from __future__ import annotations

from shared.errors import SharedError


class VhostUserError(SharedError):
    """Base of all vhost-user errors."""

    usable = False
    restart = False


class PeerRefusedError(VhostUserError):
    """The peer understood the request and refused it.

    :param code: the value of the reply (our back end sends a positive errno).
    """

    usable = True

    def __init__(self, what: str, hint: str = "", code: int = 0) -> None:
        super().__init__(what, hint)
        self.code = code


class ConnectionLostError(VhostUserError):
    """The peer closed the socket, between two messages or in the middle of one."""

    restart = True


class ProtocolError(VhostUserError):
    """The peer sent what the specification does not allow; the stream can't be trusted."""


class TimedOutError(VhostUserError):
    """The peer did not answer, or did not read, within the limit."""

    restart = True


class AbortedError(VhostUserError):
    """The wait was cut short by our own abort descriptor."""
