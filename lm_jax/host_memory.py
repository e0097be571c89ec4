"""The C library's memory, kept between steps where the CPU computes."""

import ctypes
import importlib.util
import os
import sys

_ARENA_MAX, _MMAP_THRESHOLD, _TOP_PAD, _TRIM_THRESHOLD = -8, -3, -2, -1  # mallopt's names, from malloc.h
_LARGE = 2**31 - 1  # bytes; mallopt takes an int
_PAD = 64 << 20  # bytes asked of the kernel at once


def keep_freed_memory() -> None:
    """Has glibc keep what is freed, up to 2 GiB, in one heap; elsewhere, and with an accelerator, does nothing.

    XLA allocates a step's temporaries anew in every step, from threads of its own, whose heaps are too small for them:
    by default glibc maps such a block and gives it back, and the kernel fills each page with zeros at first touch. Call
    it before threads start, since a thread stays with the heap that it began with.
    """
    if sys.platform != "linux" or not _computes_on_cpu():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    # Older ones refuse a threshold this large, and with any of the others set they keep the smallest one for good
    if mallopt(_MMAP_THRESHOLD, _LARGE):
        for parameter, value in ((_ARENA_MAX, 1), (_TRIM_THRESHOLD, _LARGE), (_TOP_PAD, _PAD)):
            mallopt(parameter, value)


def _computes_on_cpu() -> bool:
    """Without asking JAX, which would start its threads."""
    chosen = os.environ.get("JAX_PLATFORMS")
    return chosen == "cpu" if chosen else not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
