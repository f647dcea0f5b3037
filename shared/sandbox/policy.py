"""Seccomp policies: text files that say which system calls a process may make, and why.

One rule a line, its reason after `#`:

    read                                  # event descriptors
    mmap: arg2 & PROT_EXEC == 0           # memory, never code
    ioctl: arg1 == FIONBIO                # the only request
    tgkill: arg2 == SIGABRT and arg0 == 1 # all conditions hold
    clone3: ENOSYS                        # answered with this error
    kill: arg1 == 9: EPERM                # the same, if all conditions hold
    include ../runtime.policy             # the rules of another file, relative to this one

Several lines for one call allow each of them.  Values are numbers or constants of the kernel's
headers, joined by `|`.  Equality is that of the lower 32 bits, which is all that the kernel
takes of a command, flags or a number.  A reason that starts with `rare:` marks a line that
ordinary load doesn't need (a test finds the others that nothing needs).
"""

from __future__ import annotations

import errno
import posix as os

from native import _sandbox
from shared import paths
from shared.errors import SharedError, check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

ffi, lib = _sandbox.ffi, _sandbox.lib

LOW_HALF = 0xFFFFFFFF
MAX_BYTES = (4096 + 1) * 8  # the longest program that the kernel takes, and one more

TRAP = lib.SV_REFUSE_TRAP    # SIGSYS, for workers, which report it
ERROR = lib.SV_REFUSE_ERROR  # EPERM
LOG = lib.SV_REFUSE_LOG      # allowed and logged, to find out what is missing
NOTHING = lib.SV_REFUSE_NOTHING  # allowed: only the rules with an error forbid something


class PolicyError(SharedError):
    """A policy file that can't be read, or a line of it that makes no sense."""


class Rule:
    """One line: the call, the errno that answers it (0: allowed), its conditions.

    conditions: (argument's index, mask, value) each; all must hold.
    """

    __slots__ = ("call", "conditions", "error", "place", "reason")

    def __init__(self, call: str, error: int, conditions: list[tuple[int, int, int]],
                 reason: str, place: str) -> None:
        self.call = call
        self.error = error
        self.conditions = conditions
        self.reason = reason
        self.place = place  # file:line

    @property
    def rare(self) -> bool:
        """Whether ordinary load can do without it."""
        return self.reason.startswith("rare:")


def load(path: str, known: dict[str, list[Rule]] | None = None) -> list[Rule]:
    """The rules of a file and of what it includes.

    :param known: rules of files by path, for who loads several that include the same one.
    :raises PolicyError: names file and line.
    """
    return _load(paths.absolute(path), {} if known is None else known, 3)


def _load(path: str, known: dict[str, list[Rule]], depth: int) -> list[Rule]:
    if path in known:
        return known[path]
    rules: list[Rule] = []
    try:
        # By hand: what open() makes of a text takes as long as to parse it.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            lines = os.read(fd, os.fstat(fd).st_size).decode("ascii").splitlines()
        finally:
            os.close(fd)
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"Can't read the policy {paths.name(path)}: {error}",
                          "install it again") from error
    for number, line in enumerate(lines, 1):
        place = f"{paths.name(path)}:{number}"
        text, _, reason = (part.strip() for part in line.partition("#"))
        if not text:
            continue
        if not reason:
            raise PolicyError(f"{place}: '{text}' has no reason", "add it after #")
        if text.startswith("include "):
            if depth == 0:
                raise PolicyError(f"{place}: too many files include each other")
            other = f"{paths.folder(path)}/{text.removeprefix('include ').strip()}"
            rules += _load(paths.absolute(other), known, depth - 1)
        else:
            rules.append(_parse(text, reason, place))
    known[path] = rules
    return rules


def _parse(text: str, reason: str, place: str) -> Rule:
    call, *parts = (part.strip() for part in text.split(":"))
    number, conditions = 0, []
    if parts and "==" not in parts[-1]:
        number = getattr(errno, parts.pop(), 0)
        if not number:
            raise PolicyError(f"{place}: '{text}' ends with neither condition nor error")
    if len(parts) > 1:
        raise PolicyError(f"{place}: '{text}' has too many parts",
                          "write CALL: CONDITION and CONDITION: ERROR")
    if parts:
        conditions = [_condition(part, place) for part in parts[0].split(" and ")]
    if not call.replace("_", "").isalnum():
        raise PolicyError(f"{place}: '{call}' is not a system call's name")
    return Rule(call, number, conditions, reason, place)


def _condition(text: str, place: str) -> tuple[int, int, int]:
    """`argN == VALUE` or `argN & MASK == VALUE`."""
    left, equals, right = (part.strip() for part in text.partition("=="))
    name, ampersand, mask = (part.strip() for part in left.partition("&"))
    digit = name.removeprefix("arg")
    if not equals or not name.startswith("arg") or digit not in ("0", "1", "2", "3", "4", "5"):
        raise PolicyError(f"{place}: '{text.strip()}' is not a condition",
                          "write argN == VALUE or argN & MASK == VALUE")
    bits = _value(mask, place) if ampersand else LOW_HALF
    return int(digit), bits, _value(right, place) & bits


def _value(text: str, place: str) -> int:
    result = 0
    for word in text.split("|"):
        word = word.strip()
        if word[:1].isdigit():
            try:
                result |= int(word, 0)
            except ValueError:
                raise PolicyError(f"{place}: '{word}' is not a number") from None
        else:
            number = getattr(lib, word, None) if word.isidentifier() and word.isupper() else None
            if not isinstance(number, int):
                raise PolicyError(f"{place}: '{word}' is not a constant that policies know",
                                  "add it to native/decl/sandbox.h, or write the number")
            result |= number
    return result


def compile_rules(rules: Iterable[Rule], refusal: int = TRAP) -> bytes:
    """The filter that the kernel takes.

    :raises PolicyError: a rule names no system call or contradicts another.
    """
    policy = lib.sv_policy_create(refusal)
    if policy == ffi.NULL:
        raise PolicyError("Can't make a filter: no memory")
    try:
        for rule in rules:
            conditions = ffi.new("struct sv_condition[]", [
                {"argument": argument, "mask": mask, "value": value}
                for argument, mask, value in rule.conditions])
            error = lib.sv_policy_rule(policy, rule.call.encode(), rule.error, conditions,
                                       len(rule.conditions))
            if error < 0:
                raise PolicyError(f"{rule.place}: can't add '{rule.call}': "
                                  f"{os.strerror(-error)}")
        program = ffi.new("uint8_t[]", MAX_BYTES)
        length = check(lib.sv_policy_export(policy, program, MAX_BYTES), "Can't make a filter")
        return bytes(ffi.buffer(program, length))
    finally:
        lib.sv_policy_destroy(policy)


def call_name(number: int) -> str:
    """The name of a system call, or its number."""
    buffer = ffi.new("char[]", 64)
    if not 0 <= number < 1 << 31 or lib.sv_system_call_name(number, buffer, 64) < 0:
        return str(number)
    return str(ffi.string(buffer).decode())
