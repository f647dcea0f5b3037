"""The table of commands: names, arguments and results, each written down once.

Checking of arguments, `query-commands`, `query-events` and `query-qmp-schema` all come from it.
`vmm/qmp/commands/` fills it, one file for a family of commands.

Types are written as strings: "str", "int", "bool", "number", "any"; "[T]" is an array of T;
any other name is an object or an enumeration that the family's `TYPES` defines: an object as
{member: type}, where "?" behind the member's name makes it optional, an enumeration as a tuple
of its values.  The type "" is the empty object.
"""

from __future__ import annotations

from vmm.qmp.errors import CommandNotFound, QmpError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from vmm.qmp.connection import Request

    Handler = Callable[[Request], object]
    TypeTable = Mapping[str, "Mapping[str, str] | tuple[str, ...]"]

MAX_STRING = 4096  # characters of one argument, as long as a path may be
INT_RANGE = (-(1 << 63), (1 << 64) - 1)  # QEMU takes signed and unsigned 64 bits

DEFERRED = object()
"""What a handler returns when it will call `Request.done`, `reply` or `fail` later."""

_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "bool": (bool,), "number": (int, float), "object": (dict,),
    "array": (list,),
}
_WORDS = {"str": "a string", "int": "an integer", "bool": "true or false", "number": "a number",
          "object": "an object", "array": "an array"}


class Argument:
    """One argument of a command.

    :param type: "str", "int", "bool", "number", "any", "[T]", or a type of the family's TYPES.
    :param low, high: bounds of an integer, or of the length of a string.
    """

    __slots__ = ("high", "low", "name", "optional", "type")

    def __init__(self, name: str, type: str, *, optional: bool = False, low: int | None = None,
                 high: int | None = None) -> None:
        self.name = name
        self.type = type
        self.optional = optional
        self.low = low if low is not None else (1 if type == "str" else INT_RANGE[0])
        self.high = high if high is not None else (MAX_STRING if type == "str" else INT_RANGE[1])

    def check(self, value: object) -> None:
        """:raises QmpError: `value` has the wrong type or is out of bounds; names the argument."""
        if not _is_text(value):
            raise self._wrong("must not contain half of a surrogate pair")
        if self.type == "any":
            return
        kind = "array" if self.type.startswith("[") else self.type
        if kind not in _JSON_TYPES:
            kind = "object"
        # To Python True is an integer, to JSON it isn't.
        if not isinstance(value, _JSON_TYPES[kind]) or isinstance(value, bool) != (kind == "bool"):
            raise self._wrong(f"must be {_WORDS[kind]}")
        if isinstance(value, str):
            self._check_string(value)
        elif kind == "int" and isinstance(value, int) and not self.low <= value <= self.high:
            raise self._wrong(f"must be from {self.low} to {self.high}")

    def _check_string(self, value: str) -> None:
        if len(value) < self.low:
            raise self._wrong("must not be empty")
        if len(value) > self.high:
            raise self._wrong(f"must have at most {self.high} characters")
        if "\0" in value:
            raise self._wrong("must not contain the character NUL")

    def _wrong(self, what: str) -> QmpError:
        return QmpError(f"The argument '{self.name}' {what}")


def _is_text(value: object) -> bool:
    """Whether every string in it can be a path, a name, a line of the log."""
    if isinstance(value, str):
        # JSON can spell half of a surrogate pair, by an escape; no encoding of text can.
        return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
    if isinstance(value, dict):
        return all(_is_text(key) and _is_text(member) for key, member in value.items())
    return not isinstance(value, list) or all(map(_is_text, value))


class Command:
    """One command: its name, what it takes, what it returns, and who carries it out."""

    __slots__ = ("arguments", "handler", "name", "returns")

    def __init__(self, name: str, handler: Handler, *arguments: Argument,
                 returns: str = "") -> None:
        self.name = name
        self.handler = handler
        self.arguments = {argument.name: argument for argument in arguments}
        self.returns = returns

    def check(self, arguments: dict[str, Any]) -> None:
        """:raises QmpError: an argument is missing, unknown, or wrong; names it."""
        for name, value in arguments.items():
            argument = self.arguments.get(name)
            if argument is None:
                known = ", ".join(self.arguments) or "none"
                raise QmpError(f"The command {self.name} has no argument '{name[:100]}'",
                               f"it has: {known}")
            argument.check(value)
        for argument in self.arguments.values():
            if not argument.optional and argument.name not in arguments:
                raise QmpError(f"The command {self.name} needs the argument '{argument.name}'",
                               f"which is {_WORDS.get(argument.type, 'an object')}")


class Registry:
    """Every command, event and type that this VM answers for."""

    def __init__(self) -> None:
        self.commands: dict[str, Command] = {}
        self.events: dict[str, Mapping[str, str]] = {}
        self.types: dict[str, Mapping[str, str] | tuple[str, ...]] = {}

    def add(self, commands: tuple[Command, ...], types: TypeTable) -> None:
        """Add a family."""
        for command in commands:
            assert command.name not in self.commands, command.name
            self.commands[command.name] = command
        for name, members in types.items():
            assert name not in self.types, name
            self.types[name] = members

    def find(self, name: str) -> Command:
        """:raises CommandNotFound: there is none."""
        try:
            return self.commands[name]
        except KeyError:
            raise CommandNotFound(f"The command {name[:100]} has not been found",
                                  "query-commands lists them all") from None


def load() -> Registry:
    """The whole table. Imports every family: call it when the first client is there."""
    from vmm.qmp.commands import (
        balloon,
        block,
        chardev,
        events,
        fds,
        hotplug,
        introspect,
        machine,
        net,
        query,
        workers,
    )

    registry = Registry()
    for family in (machine, query, block, hotplug, net, balloon, chardev, fds, workers,
                   introspect):
        registry.add(family.COMMANDS, family.TYPES)
    registry.add((), events.TYPES)
    registry.events.update(events.EVENTS)
    return registry
