"""Shell completion: scripts that ask this program for candidates, so that they never lag behind.

`stratoctl __complete WORD…` prints what the last word can become, one candidate a line: commands,
options, choices, names of VMs, ids of a VM's devices. A file is left to the shell.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vmm.ctl import vms
from vmm.ctl.errors import CtlError

if TYPE_CHECKING:
    from collections.abc import Iterable

HIDDEN = "__complete"

SCRIPTS = {
    "bash": """\
_stratoctl() {
    local IFS=$'\\n'
    COMPREPLY=($(stratoctl __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _stratoctl stratoctl
""",
    "zsh": """\
#compdef stratoctl
_stratoctl() {
    local -a found
    found=("${(@f)$(stratoctl __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -a found; else _files; fi
}
compdef _stratoctl stratoctl
""",
    "fish": """\
complete -c stratoctl -a '(stratoctl __complete (commandline -opc)[2..-1] (commandline -ct))'
""",
}


def candidates(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """What the last of `words` can become; nothing where a file is meant, or nobody knows."""
    *before, last = words or [""]
    folder, path = _where(before)
    place, command, given = _walk(parser, before)
    found: Iterable[str]
    if place is not None:
        found = place.choices or ()
    elif last.startswith("-"):
        found = _options(command)
    else:
        found = _operands(command, given, folder, path)
    return sorted(word for word in found if word.startswith(last) and word.isprintable())


def _where(words: list[str]) -> tuple[str, str | None]:
    """The run directory and the QMP socket that the line names so far."""
    values: dict[str, str] = {}
    for option in ("--run-dir", "--qmp"):
        for i, word in enumerate(words):
            if word == option and i + 1 < len(words):
                values[option] = words[i + 1]
            elif word.startswith(option + "="):
                values[option] = word.partition("=")[2]
    return values.get("--run-dir") or vms.default_folder(), values.get("--qmp")


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


def _operands(parser: argparse.ArgumentParser, given: list[str], folder: str,
              path: str | None) -> Iterable[str]:
    commands = _commands(parser)
    if commands is not None:
        return list(commands)
    operands = [action for action in parser._actions if not action.option_strings]
    if path is not None:  # then no VM is named
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
        return _names(folder)
    if action.dest == "id":
        return _devices(folder, given[0] if given else "", path)
    return ()


def _names(folder: str) -> list[str]:
    try:
        return [vm.name for vm in vms.list_vms(folder)]
    except CtlError:
        return []


def _devices(folder: str, name: str, path: str | None) -> list[str]:
    from vmm.ctl.show import dicts, optional

    try:
        vm = vms.Vm(name, path) if path is not None else vms.find_vm(folder, name)
        with vm.connect(vms.QUICK) as client:
            workers = dicts(optional(client, "query-workers"))
    except CtlError:
        return []
    return [str(worker.get("device", "")) for worker in workers]
