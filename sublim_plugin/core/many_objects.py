"""Python's collector of cycles, left out while tens of thousands of records are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def many_objects() -> Iterator[None]:
    """Pause the collector for the length of the block, or of the function that this decorates.

    20,000 manifests are a million objects and no cycle, and it would visit them again and again: a
    third of the time of `sublim status`.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
