"""VMs by name below a run directory, whatever is in it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmm.ctl import vms
from vmm.ctl.errors import CtlError
from vmm.ctl.vms import default_folder, find_vm, list_vms

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[[str], None]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make a socket of this name below the run directory."""
    def bind(name: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket(socket.AF_UNIX) as sock:
            here = os.open(path.parent, os.O_PATH)
            sock.bind(f"/proc/self/fd/{here}/{path.name}")
            os.close(here)
    return bind


def names(folder: Path) -> list[str]:
    return [vm.name for vm in list_vms(str(folder))]


def test_two_ways_to_be_found(tmp_path: Path, make: Make) -> None:
    make("web/qmp.sock")
    make("db.sock")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.sock").write_text("")
    (tmp_path / "folder.sock").mkdir()
    make("other/console.sock")
    make(".sock")
    assert names(tmp_path) == ["db", "web"]
    assert find_vm(str(tmp_path), "db").path == f"{tmp_path}/db.sock"


def test_two_of_one_name_are_one_and_the_same_for_all(tmp_path: Path, make: Make) -> None:
    make("web.sock")
    make("web/qmp.sock")
    make("web.sock.sock")
    make("db.sock/qmp.sock")  # a folder whose name looks like a socket's
    listed = {vm.name: vm.path for vm in list_vms(str(tmp_path))}
    assert listed == {"web": f"{tmp_path}/web/qmp.sock", "web.sock": f"{tmp_path}/web.sock.sock",
                      "db.sock": f"{tmp_path}/db.sock/qmp.sock"}
    for name, path in listed.items():
        assert find_vm(str(tmp_path), name).path == path


@pytest.mark.parametrize("name", [
    "a b", "-x", "--json", "a\nb", "é", "\udcff", "%s", "{}", "a'b\"c", "*", "x" * 200, "..."])
def test_odd_names(tmp_path: Path, make: Make, name: str) -> None:
    make(f"{name}/qmp.sock")
    assert names(tmp_path) == [name]
    assert find_vm(str(tmp_path), name).name == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../web", "/", "a\0b", "web/"])
def test_names_that_no_vm_can_have(tmp_path: Path, make: Make, name: str) -> None:
    make("web/qmp.sock")
    make("qmp.sock")
    with pytest.raises(CtlError, match="can't be the name of a VM") as caught:
        find_vm(f"{tmp_path}/web", name)
    assert str(caught.value).isprintable()


def test_who_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CtlError, match=r"There is no VM 'a\?\[2Jb' in .*; stratoctl ps lists"):
        find_vm(str(tmp_path), "a\x1b[2Jb")
    with pytest.raises(CtlError, match="There is no VM 'web'"):
        find_vm(f"{tmp_path}/missing", "web")
    assert list_vms(f"{tmp_path}/missing") == []


@pytest.mark.parametrize(("folder", "text"), [
    ("file", "Not a directory"), ("x" * 300, "File name too long"), ("a\0b", "null byte")])
def test_a_run_directory_that_is_none(tmp_path: Path, folder: str, text: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CtlError, match=f"Can't read the run directory .*{text}") as caught:
        list_vms(f"{tmp_path}/{folder}")
    assert str(caught.value).isprintable()
    if folder != "file":
        with pytest.raises(CtlError, match="Can't read the run directory"):
            find_vm(f"{tmp_path}/{folder}", "web")


def test_a_run_directory_that_we_may_not_read(tmp_path: Path, make: Make,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    make("web/qmp.sock")

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "stat", refuse)
    for action in (lambda: list_vms(str(tmp_path)), lambda: find_vm(str(tmp_path), "web")):
        with pytest.raises(CtlError, match="Permission denied; be the VMs' user, or root"):
            action()


def test_where_vms_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STRATOVIRT_RUN_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    assert default_folder() == "/run/user/7/stratovirt"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_folder() == vms.SYSTEM_FOLDER
    monkeypatch.setenv("STRATOVIRT_RUN_DIR", "/x")
    assert default_folder() == "/x"
