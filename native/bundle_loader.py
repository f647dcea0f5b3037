"""Loads the modules of a start from one file: run by the launcher, never imported.

A bundle (native/bundle.py) holds the modules that every start needs, in the order in which they
were executed when it was built.  Importing them one by one costs 0.3 ms each, most of it for
finding files; this way it is half of that.  A group whose sources have changed since is left
alone, and the usual import does its work.  It knows the file names of native modules, too, so
that no folder is listed.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec as Spec
    from types import CodeType, ModuleType

    # Of a source: path below the root, time, size. Of a module: name, whether it is a package,
    # path below the root, code.
    Source = tuple[str, int, int]
    Entry = tuple[str, bool, str, CodeType]
    data: memoryview  # given by the launcher: the whole file
    root: str


def install(data: memoryview, root: str) -> None:
    """Import from the bundle `data` what it holds; `root` is where the packages lie."""
    import marshal
    import sys
    from _frozen_importlib import ModuleSpec
    from _frozen_importlib_external import ExtensionFileLoader
    from posix import stat

    module_type = type(sys)
    groups: dict[str, int]
    sources: list[tuple[Source, ...]]  # of each group
    extensions: dict[str, str]  # file names
    foreign: list[str]  # modules of others that ours import
    blobs: list[memoryview | bytes | None] = []
    index = 12 + int.from_bytes(data[4:8], "little")
    at = index + int.from_bytes(data[8:12], "little")
    groups, sizes, sources, extensions, foreign = marshal.loads(data[index:at])
    for size in sizes:
        # Large ones are needed soon, and not copied; a small one must not hold the others.
        blobs.append(data[at:at + size] if size > 65536 else bytes(data[at:at + size]))
        at += size
    if at != len(data):
        raise EOFError  # it was cut short
    entries: dict[str, Entry] = {}

    class Finder:
        """A finder and loader; the first import of a group's module executes the whole group.

        All groups are through before there is a second thread.
        """

        @staticmethod
        def find_spec(name: str, path: Sequence[str] | None = None,
                      target: object = None) -> Spec | None:
            number = groups.get(name)
            if number is None:
                return find_extension(name, path or sys.path) if name in extensions else None
            blob, blobs[number] = blobs[number], None
            if blob is not None and unchanged(sources[number]):
                sources[number] = ()
                load_group(marshal.loads(blob))
            entry = entries.pop(name, None)  # one that is asked for before its turn
            if entry is not None:
                execute(entry)
            module = sys.modules.get(name)
            return None if module is None else module.__spec__

        @staticmethod
        def keep() -> bool:
            """Load now what is in files of its own: the rest needs no file system from now on.

            False: some of the rest is found the usual way.
            """
            for name in (*foreign, *extensions):
                __import__(name)
            for number, blob in enumerate(blobs):
                if blob is not None and not unchanged(sources[number]):
                    return False
            sources[:] = [()] * len(sources)
            return True

        @staticmethod
        def create_module(spec: Spec) -> ModuleType:
            return sys.modules[spec.name]

        @staticmethod
        def exec_module(module: ModuleType) -> None:
            pass

    def find_extension(name: str, folders: Sequence[str]) -> Spec | None:
        for folder in folders:
            origin = f"{folder}/{extensions[name]}"
            try:
                stat(origin)
            except OSError:
                continue
            spec = ModuleSpec(name, ExtensionFileLoader(name, origin), origin=origin)
            spec.has_location = True
            return spec
        return None

    def unchanged(files: tuple[Source, ...]) -> bool:
        try:
            for path, time, size in files:
                found = stat(f"{root}/{path}")
                if (found.st_mtime_ns, found.st_size) != (time, size):
                    return False
        except OSError:
            return False  # it is gone: so may its module be
        return True

    def load_group(modules: tuple[Entry, ...]) -> None:
        for entry in modules:
            entries[entry[0]] = entry
        for entry in modules:
            if entries.pop(entry[0], None) is not None:
                execute(entry)

    def execute(entry: Entry) -> None:
        name, is_package, path, code = entry
        if name in sys.modules:
            return
        module = module_type(name)
        origin = f"{root}/{path}"
        spec = ModuleSpec(name, Finder, origin=origin,  # type: ignore[arg-type]
                          is_package=is_package)
        parent, _, child = name.rpartition(".")
        module.__spec__ = spec
        module.__loader__ = Finder  # type: ignore[assignment]
        module.__file__ = origin
        module.__package__ = name if is_package else parent
        if is_package:
            module.__path__ = [origin.rpartition("/")[0]]
            spec.submodule_search_locations = module.__path__
        sys.modules[name] = module
        try:
            exec(code, module.__dict__)
        except BaseException:
            sys.modules.pop(name, None)
            raise
        if parent in sys.modules:
            setattr(sys.modules[parent], child, module)

    sys.meta_path.insert(0, Finder)


install(data, root)  # noqa: F821
del data  # noqa: F821 - the functions above keep these variables
