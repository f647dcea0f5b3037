"""The bundle of start-up modules: same modules, no stale code, no harm when it is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.capabilities import require
from tests.support.tree import ROOT

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif("SV_NATIVE" in os.environ, reason="nothing of it is sanitized"),
]

TAG = f"vmm/__pycache__/startup.{sys.implementation.cache_tag}"
# Stands for vmm.__main__.run: says where modules came from.
SAY = """
import sys
def run(nursery):
    import gc, native._core, vmm.errors, vmm.machine.microvm
    for name in ("vmm", "vmm.errors", "vmm.machine.microvm", "shared.errors"):
        module = sys.modules[name]
        print(name, module.__spec__.loader.__name__ if hasattr(module.__spec__.loader, "__name__")
              and "Finder" in str(module.__spec__.loader) else "file", module.__file__,
              module.__package__)
    print("core", sys.modules["native._core"].__file__, *sys.path_importer_cache)
    print("gc", gc.isenabled(), "doc", vmm.errors.__doc__ is None)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with a bundle of their own."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("vmm", "workers", "shared", "native"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(
            "__pycache__", "*.c", "*.h"))
    main = root / "vmm/__main__.py"
    main.write_text(main.read_text().partition("def run(")[0] + SAY)
    subprocess.run([sys.executable, root / "native/bundle.py", root], check=True, cwd=root,
                   stdout=subprocess.DEVNULL)
    return root


@pytest.fixture(scope="module")
def command(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("gcc")
    target = tmp_path_factory.mktemp("bin") / "stratovirt"
    site = next(path for path in sys.path if path.endswith("site-packages"))
    subprocess.run(["gcc", f'-DSV_PYTHON="{os.path.realpath(sys.executable)}"',
                    f'-DSV_PATHS="{tree}:{site}"', "-o", target,
                    ROOT / "native/launcher/stratovirt.c"], check=True)
    return target


def start(command: Path) -> dict[str, list[str]]:
    done = subprocess.run([command], capture_output=True, text=True, timeout=60, check=True)
    return {words[0]: words[1:] for words in map(str.split, done.stdout.splitlines())}


def test_modules_come_from_the_bundle(command: Path, tree: Path) -> None:
    said = start(command)
    assert said["vmm"] == ["Finder", str(tree / "vmm/__init__.py"), "vmm"]
    assert said["vmm.errors"] == ["Finder", str(tree / "vmm/errors.py"), "vmm"]
    assert said["vmm.machine.microvm"][::2] == ["Finder", "vmm.machine"]
    assert said["shared.errors"][0] == "Finder"
    assert said["gc"] == ["False", "doc", "True"]
    # Nobody looked through folders for native modules.
    assert said["core"][0] == str(tree / "native/_core.so")
    assert not {str(tree), str(tree / "native")} & set(said["core"][1:])


def test_a_group_with_changed_sources_is_left_alone(command: Path, tree: Path) -> None:
    """Only that group: the other one's sources are as they were."""
    source = tree / "vmm/machine/microvm.py"
    before = source.stat()
    try:
        source.write_text(source.read_text() + "\n# changed\n")
        said = start(command)
        assert said["vmm.machine.microvm"][0] == "file"
        assert said["vmm.errors"][0] == "Finder"
    finally:
        source.write_text(source.read_text().removesuffix("\n# changed\n"))
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert start(command)["vmm.machine.microvm"][0] == "Finder"


def test_a_module_that_is_gone(command: Path, tree: Path) -> None:
    """One that nothing needs any more (here: nothing that SAY needs)."""
    source = tree / "vmm/qmp/events.py"
    try:
        source.rename(source.with_suffix(".away"))
        assert start(command)["vmm.machine.microvm"][0] == "file"
    finally:
        source.with_suffix(".away").rename(source)


@pytest.mark.parametrize("content", [None, b"", b"N", b"\x00" * 64, 100, 4000, -1])
def test_a_bundle_that_is_missing_or_foreign(command: Path, tree: Path,
                                             content: bytes | int | None) -> None:
    bundle = tree / TAG
    whole = bundle.read_bytes()
    try:
        bundle.unlink()
        if content is not None:
            # A number: cut there, in the loader, the index, the last group.
            bundle.write_bytes(whole[:content] if isinstance(content, int) else content)
        assert start(command)["vmm.errors"][0] == "file"
    finally:
        bundle.write_bytes(whole)


def test_an_error_names_the_source(command: Path, tree: Path) -> None:
    """Tracebacks show files and lines as they are."""
    main = tree / "vmm/__main__.py"
    whole, before = main.read_text(), main.stat()
    try:
        main.write_text(whole + "\n\ndef run(nursery):\n    raise RuntimeError('here')\n")
        subprocess.run([sys.executable, tree / "native/bundle.py", tree], check=True, cwd=tree,
                       stdout=subprocess.DEVNULL)
        done = subprocess.run([command], capture_output=True, text=True, timeout=60, check=False)
        assert f'File "{main}", line ' in done.stderr and "raise RuntimeError" in done.stderr
    finally:
        main.write_text(whole)
        os.utime(main, ns=(before.st_atime_ns, before.st_mtime_ns))
        subprocess.run([sys.executable, tree / "native/bundle.py", tree], check=True, cwd=tree,
                       stdout=subprocess.DEVNULL)


def run_with_bundle(tree: Path, package: str, code: str, *more: Path) -> list[str]:
    """The words that `code` says with the modules of a package's bundle."""
    begin = """if True:
        import sys
        root = sys.path[0] = sys.argv[1]
        from marshal import loads
        path = f"{root}/{sys.argv[2]}/__pycache__/startup.{sys.implementation.cache_tag}"
        with open(path, "rb") as f:
            data = memoryview(f.read())
            exec(loads(data[12:]), {"data": data, "root": root})
    """
    site = next(path for path in sys.path if path.endswith("site-packages"))
    done = subprocess.run([sys.executable, "-c", begin + code, tree, package, *more], text=True,
                          env={"PYTHONPATH": site}, timeout=60, check=True, capture_output=True)
    return done.stdout.split()


def test_the_nursery_has_a_bundle_of_its_own(tree: Path) -> None:
    """What clones workers: no module of the core is in it, none that is slow to load."""
    assert run_with_bundle(tree, "workers", """
        for name in ("os", "stat", "struct", "resource"):
            sys.modules.pop(name, None)  # site's
        import workers.nursery
        for kind in workers.nursery.KINDS:
            workers.nursery.entry(kind)
        print(workers.blk.worker.__spec__.origin, "vmm" in sys.modules,
              "Finder" in str(workers.nursery.__spec__.loader),
              *({"os", "stat", "struct", "resource"} & set(sys.modules)))
    """) == [str(tree / "workers/blk/worker.py"), "False", "True"]


FILTERS = {
    "workers": """
        from shared.sandbox.compiled import FILTERS
        from workers import nursery, startup
        assert startup.filters([]) is FILTERS or not FILTERS
        ready = dict(FILTERS)
        FILTERS.clear()
        made = startup.filters(nursery.KINDS)
        print(len(ready), ready == made, "" in made, "blk" in made)
    """,
    "vmm": """
        import vmm.vm
        from shared.sandbox.compiled import FILTERS
        from vmm.confinement import main_filter
        ready = dict(FILTERS)
        FILTERS.clear()
        made = {"main": main_filter()}
        print(len(ready), ready == made, len(made["main"]) > 0, True)
    """,
}


KEEP = """
        import workers.nursery
        kept = workers.nursery.__spec__.loader.keep()
        loaded = [kind for kind in workers.nursery.KINDS if f"workers.{kind}.worker" in sys.modules]
        assert "native._core" not in sys.modules
        print(kept, *loaded)
        if kept:
            import posix
            posix.chroot(sys.argv[3])  # an empty folder
            for kind in workers.nursery.KINDS:
                workers.nursery.entry(kind)
            print(len(workers.nursery.KINDS))
"""


def test_what_is_not_loaded_yet_needs_no_files_any_more(tree: Path, tmp_path: Path) -> None:
    """Unless a source has changed; then it can't wait."""
    require("root")
    kept, *loaded, count = run_with_bundle(tree, "workers", KEEP, tmp_path)
    assert kept == "True" and loaded == ["blk"] and int(count) > 4
    source = tree / "workers/null/device.py"
    before, text = source.stat(), source.read_text()
    try:
        source.write_text(text + "\n# changed\n")
        assert run_with_bundle(tree, "workers", KEEP, tmp_path) == ["False", "blk"]
    finally:
        source.write_text(text)
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(("package", "policy"), [("workers", "workers/runtime.policy"),
                                                 ("vmm", "vmm/main.policy")])
def test_filters_are_compiled_already(tree: Path, package: str, policy: str) -> None:
    """As long as no policy has changed."""
    count, *same = run_with_bundle(tree, package, FILTERS[package])
    assert int(count) > 0 and same == ["True", "True", "True"]
    source = tree / policy
    before, text = source.stat(), source.read_text()
    try:
        source.write_text(text + "\n# changed\n")
        assert run_with_bundle(tree, package, FILTERS[package])[0] == "0"
    finally:
        source.write_text(text)
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run_with_bundle(tree, package, FILTERS[package])[0] == count


def test_nothing_holds_the_file(tree: Path) -> None:
    """Half a megabyte, and for as long as the process lives."""
    assert run_with_bundle(tree, "vmm", """
        whole = data.obj
        del data
        print(sys.getrefcount(whole) > 2)
        import vmm.vm, vmm.machine.parts, vmm.machine.placing
        print(sys.getrefcount(whole))
    """) == ["True", "2"]  # this function's, and the call's
