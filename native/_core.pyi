"""Typed face of the core's native module; the calls are described in native/core/*.h."""

from typing import Any

ffi: Any
lib: Any
