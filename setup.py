"""Adds to pyproject.toml what it can't say: native modules, the launcher, byte-compiled files."""

from __future__ import annotations

import compileall
import subprocess
import sys
from pathlib import Path
from py_compile import PycInvalidationMode

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

LAUNCHER = Path("build/wheel/stratovirt")


class BuildWithLauncher(build_py):
    """Compiles the launcher before the files are collected, and the modules after."""

    def run(self) -> None:
        """Do both, around what setuptools does."""
        LAUNCHER.parent.mkdir(parents=True, exist_ok=True)
        command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(LAUNCHER),
                   "native/launcher/stratovirt.c"]
        # Without libraries it starts sooner; not every system has the C library for that.
        if subprocess.run([*command, "-static-pie"], check=False, capture_output=True).returncode:
            subprocess.run(command, check=True)
        super().run()
        if not self.editable_mode:
            # No start of the product compiles anything, even where nobody may write the result.
            # Unchecked: an installer sets the times of files as it likes.
            compileall.compile_dir(self.build_lib, quiet=1, stripdir=self.build_lib,
                                   invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)


class BuildWithBundle(build_ext):
    """Bundles the modules of a start, which needs the native ones."""

    def run(self) -> None:
        """Do it after what setuptools does."""
        super().run()
        folder = Path("." if self.inplace else self.build_lib)
        subprocess.run([sys.executable, "native/build.py", "--out", str(folder), "keeper"],
                       check=True)
        if not self.inplace:
            subprocess.run([sys.executable, "native/bundle.py", "--unchecked", self.build_lib],
                           check=True)


setup(
    cffi_modules=["native/build.py:ffi_core", "native/build.py:ffi_dataplane",
                  "native/build.py:ffi_net", "native/build.py:ffi_devices",
                  "native/build.py:ffi_sandbox"],
    cmdclass={"build_py": BuildWithLauncher, "build_ext": BuildWithBundle},
    data_files=[("bin", [str(LAUNCHER)])],
)
