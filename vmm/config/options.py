"""Sub-options (`a,b=c,d=e`) and the values in them: one reader for every option.

Every error is one line that names the option, the value and the remedy.
"""

from __future__ import annotations

from vmm.errors import ConfigError

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from collections.abc import Sequence

ID_LIMIT = 255
PATH_LIMIT = 4095
SHOWN = 300  # characters of an option's value that errors repeat
MIB = 1 << 20

_TRUE = ("on", "true", "yes")
_FALSE = ("off", "false", "no")
_UNITS = {"k": 1 << 10, "K": 1 << 10, "m": MIB, "M": MIB, "g": 1 << 30, "G": 1 << 30}


class SubOptions:
    """One option's value, taken apart; each `take_*` removes what it read.

    :param option: as the user wrote it, e.g. "-drive"; names the option in errors.
    :param bare: keys for the first words that have no `=`, in order.
    """

    __slots__ = ("option", "text", "values")

    def __init__(self, option: str, text: str, bare: Sequence[str] = ()) -> None:
        self.option = option
        self.text = text
        self.values: dict[str, str] = {}
        if text.startswith("{"):
            self._read_json()
            return
        keys = list(bare)
        for number, part in enumerate(_split(text)):
            key, equals, value = part.partition("=")
            if not equals:
                if number < len(keys):
                    key, value = keys[number], part
                else:
                    value = "on"  # a word alone switches something on, as `server`
            if not key or (not part and text):
                raise self.error(f"'{part}' is not NAME=VALUE", "write NAME=VALUE,…")
            if key in self.values:
                raise self.error(f"'{key}' is given twice", "give it once")
            self.values[key] = value

    def _read_json(self) -> None:
        import json  # libvirt writes some options so

        try:
            values = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise self.error(f"not valid JSON: {error}", "correct it") from None
        for key, value in values.items():
            if isinstance(value, bool):
                value = "on" if value else "off"
            if not isinstance(value, (str, int)):
                raise self.error(f"'{key}' is neither a string, a number nor a boolean",
                                 "write it in the plain form")
            if not _is_text(key) or not _is_text(str(value)):
                raise self.error("half a surrogate pair is no text", "correct it")
            self.values[key] = str(value)

    def error(self, what: str, hint: str) -> ConfigError:
        """An error that names the option."""
        text = self.text if len(self.text) <= SHOWN else f"{self.text[:SHOWN]}..."
        return ConfigError(f"{self.option} {text}: {what}", hint)

    def take(self, key: str, default: str | None = None) -> str:
        """A string; without a default it must be there."""
        value = self.values.pop(key, default)
        if value is None:
            raise self.error(f"'{key}' is missing", f"add {key}=…")
        return value

    def take_id(self, default: str | None = None) -> str:
        """`id`, at most 255 characters."""
        value = self.take("id", default)
        check_id(self, value)
        return value

    def take_path(self, key: str, default: str | None = None) -> str:
        """A path; not empty unless the default is."""
        value = self.take(key, default)
        if (not value and default != "") or len(value) > PATH_LIMIT or "\0" in value:
            raise self.error(f"'{key}' is not a path (1 to {PATH_LIMIT} bytes)", "name a file")
        return value

    def take_bool(self, key: str, default: bool) -> bool:
        """on, true, yes; off, false, no."""
        value = self.values.pop(key, None)
        if value is None:
            return default
        if value in _TRUE:
            return True
        if value in _FALSE:
            return False
        raise self.error(f"'{key}={value}' is neither on nor off", f"write {key}=on or {key}=off")

    def take_choice(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of a few words."""
        value = self.take(key, default)
        if value not in choices:
            raise self.error(f"'{key}={value}' is not possible", f"use {', '.join(choices)}")
        return value

    def take_int(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A decimal or 0x number between low and high."""
        value = self.values.pop(key, None)
        if value is None:
            if default is None:
                raise self.error(f"'{key}' is missing", f"add {key}=…")
            return default
        number = parse_int(value)
        if number is None or not low <= number <= high:
            raise self.error(f"'{key}={value}' is not a number from {low} to {high}",
                             "correct it")
        return number

    def ignore(self, *keys: str) -> None:
        """Accept what means nothing here."""
        for key in keys:
            self.values.pop(key, None)

    def finish(self) -> None:
        """:raises ConfigError: something is left that this option doesn't have."""
        if self.values:
            key = next(iter(self.values))
            raise self.error(f"there is no sub-option '{key}'", "remove it")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_id(options: SubOptions, value: str) -> None:
    """:raises ConfigError: empty, too long, unprintable or like one of ours."""
    if not value or len(value) > ID_LIMIT or not value.isprintable():
        raise options.error(f"the id '{value[:40]}' must have 1 to {ID_LIMIT} printable "
                            "characters", "choose another id")
    if value.startswith("#"):
        raise options.error(f"the id '{value[:40]}' begins with '#', as those that we make up",
                            "choose another id")


def parse_int(text: str) -> int | None:
    """Decimal or 0x; None if it is neither."""
    digits, base = (text[2:], 16) if text[:2] in ("0x", "0X") else (text, 10)
    if not digits or len(digits) > 20 or not digits.isascii() or not digits.isalnum():
        return None
    try:
        return int(digits, base)
    except ValueError:
        return None


def parse_size(text: str) -> int | None:
    """Bytes: an integer with K, M or G; MiB without a unit. None if it is neither."""
    unit = _UNITS.get(text[-1:])
    number = text[:-1] if unit else text
    if not number.isascii() or not number.isdigit() or len(number) > 15:
        return None
    return int(number) * (unit or MIB)


def _split(text: str) -> list[str]:
    """At commas; two in a row stand for one in a value, as QEMU has it."""
    if ",," not in text:
        return text.split(",")
    parts = text.replace(",,", "\0").split(",")
    return [part.replace("\0", ",") for part in parts]
