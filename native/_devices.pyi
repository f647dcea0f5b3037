"""Typed face of a native module; the calls are described in native/ring/*.h and its kinds."""

from typing import Any

ffi: Any
lib: Any
