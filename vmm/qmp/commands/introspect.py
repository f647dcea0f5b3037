"""What clients can ask about QMP itself, and what libvirt asks of every VMM it meets.

The lists that are always empty stand for features that this VMM doesn't have; libvirt takes
"none" for an answer, but not CommandNotFound.
"""

from __future__ import annotations

from vmm.qmp.registry import Argument, Command, Registry

TYPE_CHECKING = False  # importing typing would cost 10 ms of the start
if TYPE_CHECKING:
    from vmm.qmp.connection import Request

_BUILTINS = {"str": "string", "int": "int", "bool": "boolean", "number": "number", "any": "value"}


def _registry(request: Request) -> Registry:
    registry = request.server.registry
    assert registry is not None  # it came with the first client
    return registry


def _query_commands(request: Request) -> object:
    return [{"name": name} for name in _registry(request).commands]


def _query_events(request: Request) -> object:
    return [{"name": name} for name in _registry(request).events]


def _query_qmp_schema(request: Request) -> object:
    return schema(_registry(request))


def schema(registry: Registry) -> list[dict[str, object]]:
    """Return the whole interface as QAPI's SchemaInfo list (QEMU: docs/devel/qapi-code-gen)."""
    entries: list[dict[str, object]] = []
    types = dict(registry.types)
    for command in registry.commands.values():
        arguments = {a.name + ("?" if a.optional else ""): a.type
                     for a in command.arguments.values()}
        types[f"{command.name}-arg"] = arguments
        entries.append({"name": command.name, "meta-type": "command",
                        "arg-type": f"{command.name}-arg" if arguments else "empty",
                        "ret-type": command.returns or "empty"})
        if not arguments:
            del types[f"{command.name}-arg"]
    for name, members in registry.events.items():
        if members:
            types[f"{name}-arg"] = members
        entries.append({"name": name, "meta-type": "event",
                        "arg-type": f"{name}-arg" if members else "empty"})
    entries.append({"name": "empty", "meta-type": "object", "members": []})
    arrays: set[str] = {command.returns for command in registry.commands.values()}
    for name, described in types.items():
        if isinstance(described, tuple):
            entries.append({"name": name, "meta-type": "enum", "values": list(described),
                            "members": [{"name": value} for value in described]})
            continue
        arrays.update(described.values())
        entries.append({"name": name, "meta-type": "object",
                        "members": [_member(key, kind) for key, kind in described.items()]})
    for name in sorted(arrays):
        if name.startswith("["):
            entries.append({"name": name, "meta-type": "array", "element-type": name[1:-1]})
    for name, json_type in _BUILTINS.items():
        entries.append({"name": name, "meta-type": "builtin", "json-type": json_type})
    return entries


def _member(key: str, kind: str) -> dict[str, object]:
    if key.endswith("?"):
        return {"name": key[:-1], "type": kind, "default": None}
    return {"name": key, "type": kind}


def _empty(request: Request) -> object:
    return []


_SCHEMA_MEMBERS = {
    "name": "str", "meta-type": "SchemaMetaType", "arg-type?": "str", "ret-type?": "str",
    "members?": "[any]", "values?": "[str]", "element-type?": "str", "json-type?": "str",
}

TYPES: dict[str, dict[str, str] | tuple[str, ...]] = {
    "CommandInfo": {"name": "str"},
    "EventInfo": {"name": "str"},
    "SchemaInfo": _SCHEMA_MEMBERS,
    "SchemaMetaType": ("builtin", "enum", "array", "object", "command", "event"),
    "ObjectTypeInfo": {"name": "str"},
    "ObjectPropertyInfo": {"name": "str", "type": "str"},
    "CommandLineOptionInfo": {"option": "str"},
    "MigrationCapabilityStatus": {"capability": "str", "state": "bool"},
    "CpuDefinitionInfo": {"name": "str"},
    "GICCapability": {"version": "int"},
    "JobInfo": {"id": "str"},
}

COMMANDS = (
    Command("query-commands", _query_commands, returns="[CommandInfo]"),
    Command("query-events", _query_events, returns="[EventInfo]"),
    Command("query-qmp-schema", _query_qmp_schema, returns="[SchemaInfo]"),
    Command("qom-list-types", _empty, Argument("implements", "str", optional=True),
            Argument("abstract", "bool", optional=True), returns="[ObjectTypeInfo]"),
    Command("qom-list", _empty, Argument("path", "str"), returns="[ObjectPropertyInfo]"),
    Command("qom-list-properties", _empty, Argument("typename", "str"),
            returns="[ObjectPropertyInfo]"),
    Command("device-list-properties", _empty, Argument("typename", "str"),
            returns="[ObjectPropertyInfo]"),
    Command("query-command-line-options", _empty, Argument("option", "str", optional=True),
            returns="[CommandLineOptionInfo]"),
    Command("query-migrate-capabilities", _empty, returns="[MigrationCapabilityStatus]"),
    Command("query-cpu-definitions", _empty, returns="[CpuDefinitionInfo]"),
    Command("query-tpm-models", _empty, returns="[str]"),
    Command("query-tpm-types", _empty, returns="[str]"),
    Command("query-gic-capabilities", _empty, returns="[GICCapability]"),
    Command("query-jobs", _empty, returns="[JobInfo]"),
)
