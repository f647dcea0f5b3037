"""Builds the bundles that a start loads its modules from: see bundle_loader.py.

    python native/bundle.py [--unchecked] [ROOT]

Writes ROOT/vmm/__pycache__/startup.TAG and the same in workers/ (for the nursery), for the
interpreter that runs this; needs the native modules.  `--unchecked`: the
modules' times don't matter (in a wheel, whose files get the times that an installer likes).
"""

from __future__ import annotations

import ast
import dis
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import marshal
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from types import CodeType, ModuleType

HERE = Path(__file__).resolve().parent
PACKAGES = ("vmm", "workers", "shared", "native")
COMPILED = "shared.sandbox.compiled"  # the module that a bundle has another content of
BACKEND = "_cffi_backend"  # what our native modules are made with
# By the package that the file lies in: what is imported, group by group.  Their own imports come
# with them.  The core's groups: up to what goes on beside Python, up to the first instruction,
# up to the first worker, up to what the guest may wait for, after it.
BUNDLES = {
    "vmm": (
        ("vmm.__main__", "vmm.config.checks", "vmm.machine.groundwork"),
        ("vmm.qmp.events", "vmm.vm", "vmm.machine.microvm", "vmm.chardev.local"),
        ("vmm.worker.nursery", "vmm.machine.parts", "vmm.block.part"),
        ("vmm.machine.placing", "vmm.devices.virtio_blk", "vmm.devices.virtio_net",
         "vmm.qmp.server"),
        ("shared.sandbox.compiled",),
    ),
    "workers": (
        # The others wait until a worker of their kind is asked for (workers/nursery.py).
        ("workers.begin", "workers.nursery", "workers.blk.worker"),
        *((f"workers.{kind}.worker",) for kind in ("net", "null", "rng", "console", "balloon")),
    ),
}


class Recorder(importlib.machinery.SourceFileLoader):
    """Notes the order in which modules are through."""

    done: list[tuple[str, bool, Path]] = []

    def exec_module(self, module: ModuleType) -> None:
        """Execute it, then note it."""
        super().exec_module(module)
        self.done.append((module.__name__, hasattr(module, "__path__"), Path(self.path)))


class Finder(importlib.abc.MetaPathFinder):
    """Gives our packages' modules to the recorder."""

    def find_spec(self, name: str, path: Any = None, target: Any = None
                  ) -> importlib.machinery.ModuleSpec | None:
        """As the usual finder does."""
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if name.split(".")[0] in PACKAGES and spec is not None and spec.origin and \
                spec.origin.endswith(".py"):
            spec.loader = Recorder(name, spec.origin)
        return spec


Body = TypeVar("Body", ast.Module, ast.ClassDef, ast.FunctionDef)


class Strip(ast.NodeTransformer):
    """Drops what doesn't run: docstrings, annotations, what is for type checkers."""

    def _without_docstring(self, node: Body) -> Body:
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
            if not node.body and not isinstance(node, ast.Module):
                node.body = [ast.Pass()]
        return node

    def visit_Module(self, node: ast.Module) -> ast.AST:
        """Without docstring."""
        return self._without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Without docstring."""
        return self._without_docstring(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Also without the types of its arguments."""
        node.returns = None
        arguments = node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs,
                         arguments.vararg, arguments.kwarg]:
            if argument is not None:
                argument.annotation = None
        return self._without_docstring(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        """`if TYPE_CHECKING:` never runs."""
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        """A value without its type; a type without a value is nothing."""
        if node.value is None:
            return None
        return ast.copy_location(ast.Assign([node.target], node.value), node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        """Annotations need no postponing when there are none."""
        return None if node.module == "__future__" else node


def compiled(path: Path, name: str) -> CodeType:
    """The code of a source file, stripped; tracebacks say that it is `name`."""
    tree = ast.fix_missing_locations(Strip().visit(ast.parse(path.read_text())))
    code: CodeType = compile(tree, name, "exec", dont_inherit=True)
    return code


def imports(code: CodeType) -> set[str]:
    """The modules of others that a module imports when it is executed."""
    return {instruction.argval for instruction in dis.get_instructions(code)
            if instruction.opname == "IMPORT_NAME"
            and instruction.argval.split(".")[0] not in PACKAGES}


def filters(package: str) -> dict[str, bytes]:
    """What shared/sandbox/compiled.py holds in a bundle."""
    if package == "vmm":
        return {"main": importlib.import_module("vmm.confinement").main_filter()}
    made: dict[str, bytes] = importlib.import_module("workers.startup").filters(
        importlib.import_module("workers.nursery").KINDS)
    return made


def build(root: Path, package: str, checked: bool) -> None:
    """Write the bundle of a package below `root`."""
    names: dict[str, int] = {}
    foreign: set[str] = set()
    blobs, sources = [], []
    for number, group in enumerate(BUNDLES[package]):
        Recorder.done = []
        for module in group:
            importlib.import_module(module)
        files, modules = [], []
        for name, is_package, path in list(Recorder.done):  # `filters` imports more
            relative = str(path.relative_to(root))
            files.append(path)
            if name == COMPILED:
                files += sorted((root / package).rglob("*.policy"))
                code = compile(f"FILTERS = {filters(package)!r}", relative, "exec")
            else:
                code = compiled(path, str(path) if checked else relative)
            modules.append((name, is_package, relative, code))
            names[name] = number
        # What the modules were made of; nothing: it can't change.
        sources.append(tuple((str(path.relative_to(root)), path.stat().st_mtime_ns,
                              path.stat().st_size) for path in files if checked))
        blobs.append(marshal.dumps(tuple(modules)))
        foreign |= {name for _, _, _, code in modules for name in imports(code)}
    # Found in the folders of their packages, or among the paths; by file name, as the wheel's
    # modules are not yet where they will be.
    extensions = {name: Path(str(module.__file__)).name for name, module in sys.modules.items()
                  if name.startswith("native._") or name == BACKEND if hasattr(module, "__file__")}
    target = root / package / "__pycache__" / f"startup.{sys.implementation.cache_tag}"
    target.parent.mkdir(exist_ok=True)
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    # The interpreter's number, two sizes, what they are of: the loader, and for it the index of
    # the groups. These follow, each to be unmarshalled when it is needed.
    loader = marshal.dumps(compiled(HERE / "bundle_loader.py", "bundle_loader.py"))
    index = marshal.dumps((names, [len(blob) for blob in blobs], sources, extensions,
                           sorted(foreign)))
    fresh.write_bytes(b"".join((
        importlib.util.MAGIC_NUMBER, len(loader).to_bytes(4, "little"),
        len(index).to_bytes(4, "little"), loader, index, *blobs)))
    fresh.rename(target)


def main(arguments: list[str]) -> int:
    """Build them all."""
    words = [word for word in arguments if word != "--unchecked"]
    root = Path(words[0] if words else HERE.parent).resolve()
    sys.path[:0] = [str(root)]
    sys.meta_path.insert(0, Finder())
    for package in BUNDLES:
        print(root / package, flush=True)
        pid = os.fork()  # what one of them imports is none of the other's
        if pid == 0:
            build(root, package, "--unchecked" not in arguments)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            return 1
    return 0


if __name__ == "__main__":
    if "no_debug_ranges" not in sys._xoptions:
        # Code that knows lines, not columns, is a fifth smaller, and sooner loaded.
        os.execv(sys.executable, [sys.executable, "-X", "no_debug_ranges", *sys.argv])
    sys.exit(main(sys.argv[1:]))
