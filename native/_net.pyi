"""Typed face of a native module; the calls are described in native/net/*.h."""

from typing import Any

ffi: Any
lib: Any
