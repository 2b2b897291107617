"""How the C library handles memory that a forward pass gives back."""

from __future__ import annotations

import ctypes

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # names of mallopt(3)
LARGEST = 32 << 20  # bytes; glibc takes no larger threshold of mappings
KEPT = 512 << 20


def keep_freed_memory() -> None:
    """Let this process keep up to `KEPT` freed bytes for the next pass instead of handing the kernel the pages back after each.

    By default glibc returns what lies above a few megabytes, and every batch pays again for the faults of its pages, up to half of its
    time, depending on what else happens to be allocated. Does nothing where the C library has no such setting.
    """
    setting = getattr(ctypes.CDLL(None), "mallopt", None)
    if setting is not None:
        setting(MMAP_THRESHOLD, LARGEST)
        setting(TRIM_THRESHOLD, KEPT)
