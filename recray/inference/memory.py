"""How the C library handles memory that a forward pass frees."""

from __future__ import annotations

import ctypes

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # names of mallopt(3)
MAX_MMAP_BYTES = 32 << 20  # the largest threshold of mappings that glibc takes
KEPT_BYTES = 512 << 20


def keep_freed_memory() -> None:
    """Let this process keep up to `KEPT_BYTES` of freed memory for the next pass instead of returning its
    pages to the kernel.

    By default glibc returns all above a few megabytes. Every batch then pays again for its page faults, up to
    half of its time. Does nothing where the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, MAX_MMAP_BYTES)
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)
