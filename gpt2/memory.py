"""The memory of a training step on a CPU, kept for the next one, and in huge pages."""

import ctypes
import mmap
import os

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h
HUGE = 2**21


def keep_freed():
    """Have malloc hand nothing back to the system, and use huge pages for a quarter of the machine's memory.

    By default glibc maps each tensor of more than 32 MB anew and gives it back when it is freed: a page fault for each
    4 KiB, in every step. And matrix products over small pages wait for the page tables. The memory is not touched here,
    only set aside: the process takes what it uses. Without glibc or Linux's huge pages, nothing changes.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
        libc.malloc.restype = ctypes.c_void_p
        heap = libc.malloc(ctypes.c_size_t(size))
        if heap:
            begin, end = -(-heap // HUGE) * HUGE, (heap + size) // HUGE * HUGE
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)
            libc.free(ctypes.c_void_p(heap))
    except (AttributeError, OSError, ValueError):
        pass  # another C library or system
