"""Keeps the host memory that a program frees, for its next arrays.

XLA on a CPU asks for the temporaries of every step anew. The C library takes blocks of that size
from the kernel and gives them back at once, so each step touches fresh pages: 57,042 page faults a
step for MovieLens-1M, a third of its time (docs/performance.md). Programs that run the same step
many times on a CPU keep the memory instead, until they end.
"""

import ctypes
import os

# Numbers of glibc's <malloc.h>. All are set, as mallopt(3) explains: blocks of any size come from
# the one heap, and the heap never shrinks.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_OPTIONS = (
    (_M_MMAP_MAX, 0),
    (_M_TRIM_THRESHOLD, -1),
    (_M_TOP_PAD, 64 * 2**20),
    # A second arena could not hold blocks of 64 MiB and would go to the kernel for them again.
    (_M_ARENA_MAX, 1),
)
_NAMES = ("MALLOC_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Tells the C library to keep what is freed, for this process and from now on.

    For programs that compute on a CPU, before they start threads: a thread stays with the heap that
    it began with. Does nothing where the library is not glibc, or where the environment already has
    settings of its own (`MALLOC_*`, `GLIBC_TUNABLES`), or another allocator (`LD_PRELOAD`).

    Returns:
        Whether the library was told.
    """
    if os.environ.get("LD_PRELOAD") or any(name.startswith(_NAMES) for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all([library.mallopt(option, value) == 1 for option, value in _OPTIONS])
