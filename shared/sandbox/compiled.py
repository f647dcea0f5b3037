"""Filters that need no compiling: the bundle (native/bundle.py) has this module with the filters
of its program in it, as long as no policy has changed since.  Empty: they are compiled when needed.
"""

from __future__ import annotations

FILTERS: dict[str, bytes] = {}
