"""Shell completion: scripts that ask this program for candidates, so that they never lag behind.

`stratoctl __complete WORD…` prints what the last word can become, one candidate a line: commands,
options, choices, names of VMs, devices, taps, limits. A file is left to the shell.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from shared.throttling import OPTIONS as DISK_LIMITS
from vmm.ctl import vms
from vmm.ctl.errors import CtlError

if TYPE_CHECKING:
    from collections.abc import Iterable

HIDDEN = "__complete"
NIC_LIMITS = ("rx-packets", "rx-bytes", "tx-packets", "tx-bytes")
NET = "/sys/class/net"

SCRIPTS = {
    "bash": """\
_stratoctl() {
    local words=("${COMP_WORDS[@]:1:COMP_CWORD}") found
    mapfile -t found < <(stratoctl __complete "${words[@]//\\\\/}" 2>/dev/null)
    COMPREPLY=()
    ((${#found[@]})) && mapfile -t COMPREPLY < <(printf '%q\\n' "${found[@]}")
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
    return 0
}
complete -o default -F _stratoctl stratoctl
""",
    "zsh": """\
#compdef stratoctl
_stratoctl() {
    local -a found
    found=("${(@f)$(stratoctl __complete "${(@Q)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -a found; else _files; fi
}
if [[ $funcstack[1] == _stratoctl ]]; then _stratoctl "$@"; else compdef _stratoctl stratoctl; fi
""",
    "fish": """\
function __stratoctl_candidates
    set -l found (stratoctl __complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)
    if set -q found[1]
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c stratoctl -f -a '(__stratoctl_candidates)'
""",
}


def candidates(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """What the last of `words` can become; nothing where a file is meant, or nobody knows."""
    *before, last = _joined(words or [""])
    place, command, given = _walk(parser, before)
    where = _Where(before, given)
    found: Iterable[str]
    if place is not None:
        found = _values(place, command, where)
    elif last.startswith("-"):
        found = _options(command)
    else:
        found = _operands(command, given, where)
    return sorted({word for word in found if word.startswith(last) and word.isprintable()
                   and not (word == last and last.endswith("="))})


def _joined(words: list[str]) -> list[str]:
    """Bash makes three words of `--run-dir=DIR`."""
    joined: list[str] = []
    glue = False
    for word in words:
        if joined and (glue or word == "="):
            joined[-1] += word
        else:
            joined.append(word)
        glue = word == "="
    return joined


class _Where:
    """The VM that the line names so far."""

    def __init__(self, words: list[str], given: list[str]) -> None:
        values: dict[str, str] = {}
        for option in ("--run-dir", "--qmp"):
            for i, word in enumerate(words):
                if word == option and i + 1 < len(words):
                    values[option] = words[i + 1]
                elif word.startswith(option + "="):
                    values[option] = word.partition("=")[2]
        self.folder = values.get("--run-dir") or vms.default_folder()
        self.path = values.get("--qmp")
        self._name = given[0] if given else ""

    def names(self) -> list[str]:
        """All VMs."""
        try:
            return [vm.name for vm in vms.list_vms(self.folder)]
        except CtlError:
            return []

    def members(self, query: str, member: str) -> list[str]:
        """A member of each entry that a query of the VM returns."""
        from vmm.ctl.answers import dicts, optional, text

        try:
            vm = (vms.Vm(self.path, self.path) if self.path is not None
                  else vms.find_vm(self.folder, self._name))
            with vm.connect(vms.QUICK) as client:
                found = dicts(optional(client, query))
        except CtlError:
            return []
        return [name for entry in found if (name := text(entry, member))]


def _walk(parser: argparse.ArgumentParser, words: list[str]) -> tuple[
        argparse.Action | None, argparse.ArgumentParser, list[str]]:
    """The option that waits for its value, the (sub-)command's parser, the operands so far."""
    waiting: argparse.Action | None = None
    given: list[str] = []
    for word in words:
        if waiting is not None:
            waiting = None
        elif word.startswith("-"):
            action = parser._option_string_actions.get(word)
            waiting = action if action is not None and action.nargs != 0 else None
        else:
            commands = _commands(parser)
            if commands is not None and word in commands:
                parser = commands[word]
            else:
                given.append(word)
    return waiting, parser, given


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser] | None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return None


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [name for name in parser._option_string_actions if name.startswith("--")]


def _values(place: argparse.Action, command: argparse.ArgumentParser,
            where: _Where) -> Iterable[str]:
    """What an option's value can be."""
    if place.dest == "limit":
        names = NIC_LIMITS if command.prog.endswith("attach-nic") else DISK_LIMITS
        return [f"{name}=" for name in names]
    if place.dest == "chardev":
        return where.members("query-chardev", "label")
    if place.dest == "bridge":
        return _interfaces("bridge")
    return place.choices or ()


def _operands(parser: argparse.ArgumentParser, given: list[str], where: _Where) -> Iterable[str]:
    commands = _commands(parser)
    if commands is not None:
        return list(commands)
    operands = [action for action in parser._actions if not action.option_strings]
    if where.path is not None:  # then no VM is named
        operands = [action for action in operands if action.dest not in ("vm", "vms")]
    if not operands:
        return ()
    # `top` takes any number of names: its only operand.
    action = operands[min(len(given), len(operands) - 1)]
    if len(given) >= len(operands) and action.nargs != "*":
        return ()
    if action.choices:
        return list(action.choices)
    if action.dest in ("vm", "vms"):
        return where.names()
    if action.dest == "id":
        return [*where.members("query-block", "qdev"), *where.members("query-nics", "device")]
    if action.dest == "nic":
        return where.members("query-nics", "device")
    if action.dest == "ifname":
        return _interfaces("tun_flags")
    return ()


def _interfaces(feature: str) -> list[str]:
    """The interfaces of this host that have a file of this name."""
    try:
        return [name for name in os.listdir(NET) if os.path.exists(f"{NET}/{name}/{feature}")]
    except OSError:
        return []
