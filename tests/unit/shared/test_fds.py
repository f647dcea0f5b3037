"""Descriptors over a socket and their ownership."""

from __future__ import annotations

import os

import pytest

from shared.fds import OwnedFd, close_all


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_closes_once() -> None:
    owned = OwnedFd(os.eventfd(0))
    fd = owned.fd
    owned.close()
    assert not is_open(fd)
    assert owned.fd == -1
    owned.close()


def test_take_hands_over() -> None:
    with OwnedFd(os.eventfd(0)) as owned:
        fd = owned.take()
    assert is_open(fd)
    assert owned.take() == -1
    os.close(fd)


def test_replace_closes_the_old_one() -> None:
    owned = OwnedFd(os.eventfd(0))
    old = owned.fd
    new = os.eventfd(0)
    owned.replace(new)
    assert owned.fileno() == new
    assert not is_open(old)
    owned.close()


def test_close_all_goes_on_after_an_error() -> None:
    fd = os.eventfd(0)
    gone = os.eventfd(0)
    os.close(gone)
    close_all((-1, gone, fd))
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
