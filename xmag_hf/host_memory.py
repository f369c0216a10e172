"""Memory that this process has freed and keeps for its next tensor.

glibc hands every freed block above 32 MiB back to the kernel, which fills its pages with zeros when
the next one is asked for. A network on a CPU asks for hundreds of such blocks a batch: XMAG-lite
spent more time in the kernel than in its convolutions (docs/benchmarks.md).

Below all folders of the package; imports nothing of it.
"""

from __future__ import annotations

import ctypes
import os
import platform

# <malloc.h> of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_SAME_IN_ENVIRONMENT = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
)
_LARGEST_INT = 2**31 - 1
_TOP_PAD = 2**28  # the heap grows by at least this, so seldom


def keep_freed_memory() -> bool:
    """Let malloc reuse large freed blocks, for this whole process and what it forks.

    Called by every command of `xmag`; a program of one's own calls it once, early. The process
    holds what it once needed until it ends, so its resident memory stays near its peak.

    Returns:
        Whether glibc was told: not where libc is another, nor where the environment already says
        how malloc shall behave (MALLOC_MMAP_MAX_ and its like, GLIBC_TUNABLES). A malloc that is
        preloaded in glibc's place does as it likes.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc" in tunables or not os.environ.keys().isdisjoint(_SAME_IN_ENVIRONMENT):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST_INT), (_M_TOP_PAD, _TOP_PAD))
    return all([mallopt(name, value) == 1 for name, value in settings])
