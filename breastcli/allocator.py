"""How the C library treats freed memory."""

from __future__ import annotations

import ctypes
import sys

# Options of glibc's mallopt, from its malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for the next batch instead of giving it back to the system; elsewhere nothing.

    By default large tensors are mapped anew for every batch, and the system clears their pages on first touch: half of
    the time of augmentation on the CPU, a tenth of a training step's. A process does not come to hold more than it
    needs at its largest, up to a few per cent.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries do not have it
    if mallopt is None:
        return
    mallopt(TRIM_THRESHOLD, LARGEST)
    if not mallopt(MMAP_THRESHOLD, 2**30):
        mallopt(MMAP_MAX, 0)  # older versions refuse such a threshold
