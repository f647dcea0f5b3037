"""Adds to pyproject.toml what it can't say: the native modules and the launcher."""

from __future__ import annotations

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

LAUNCHER = Path("build/wheel/stratovirt")


class BuildWithLauncher(build_py):
    """Compiles the launcher before the files are collected."""

    def run(self) -> None:
        """Compile it, then do what setuptools does."""
        LAUNCHER.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", str(LAUNCHER),
                        "native/launcher/stratovirt.c"], check=True)
        super().run()


setup(
    cffi_modules=["native/build.py:ffi_core", "native/build.py:ffi_dataplane",
                  "native/build.py:ffi_net", "native/build.py:ffi_sandbox"],
    cmdclass={"build_py": BuildWithLauncher},
    data_files=[("bin", [str(LAUNCHER)])],
)
