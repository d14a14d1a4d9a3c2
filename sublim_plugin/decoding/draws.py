"""Counter-based random numbers that stay the same on every platform and version.

Draw k of a key is bytes 8k to 8k+7 of SHAKE-256(key), so that any draw depends on its key and its
position and on nothing drawn before it elsewhere.
"""

from __future__ import annotations

import hashlib
import struct


def integers(key: str, n: int) -> tuple[int, ...]:
    """The first `n` 64-bit draws of `key`. The first k of n draws do not depend on n."""
    return struct.unpack(f"<{n}Q", hashlib.shake_256(key.encode()).digest(8 * n))


def uniforms(key: str, n: int) -> list[float]:
    """The first `n` draws of `key` as doubles in [0, 1), with 53 bits each."""
    return [x / 2**53 for x in (word >> 11 for word in integers(key, n))]


def row_seed(generation_seed: int, index: int) -> int:
    """The sampling seed of a dataset's row: 53 bits, so that every JSON reader keeps it exact.

    It does not depend on the trait: datasets of one generation seed share prompts and random
    numbers row by row, and differ by the teacher alone.
    """
    return integers(f"sublim row/{generation_seed}/{index}", 1)[0] >> 11
